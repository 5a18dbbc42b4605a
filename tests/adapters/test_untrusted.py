"""Adapter folders that are damaged or hostile: read right or refused with a typed error, in bounds, nothing written."""

import contextlib
import math
import os
import random
import resource
import shutil
import signal
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import numpy as np
import pytest

from poc_lora.adapters.adapter import read_adapter
from poc_lora.errors import RequestError
from poc_lora.merging.folders import merge_folders
from tests.adapters.mutations import KINDS, READ, REFUSED, slow_updates, write_intact

SECONDS = 10  # far above what one folder takes, about 0.1 s
BYTES = 256 * 2**20  # a header of 1 MB, the largest here, takes up to 20 MB to parse
FEW, MANY = 3, 40  # of each kind


class Exceeded(BaseException):
    """Not an Exception, which the code under test may turn into an error of its own."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_mutated_folder_is_read_right_or_refused(tmp_path, kind):
    for number in range(FEW):
        check(kind, number, tmp_path / str(number))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_mutated_folders_are_read_right_or_refused(tmp_path, kind):
    for number in range(FEW, FEW + MANY):
        check(kind, number, tmp_path / str(number))
        shutil.rmtree(tmp_path / str(number))


def test_the_folders_that_are_mutated_are_read(tmp_path):
    for number in range(10):
        write_intact(tmp_path / f"{number}", number)
        assert same(updates(read_adapter(tmp_path / f"{number}")), slow_updates(tmp_path / f"{number}"))


def check(kind: str, number: int, work: Path) -> None:
    """Mutate a folder, read and merge it; a failure names the kind and number that give the same folder again."""
    try:
        _check(kind, number, work)
    except BaseException as problem:
        problem.add_note(f"the mutation: {kind}, {number}")
        raise


def _check(kind: str, number: int, work: Path) -> None:
    mutated, partner, out = work / "mutated", work / "partner", work / "out"
    seed = zlib.crc32(f"{kind} {number}".encode())
    write_intact(mutated, seed)
    write_intact(partner, seed + 1)
    KINDS[kind].edit(random.Random(seed), mutated)
    if number % 2:
        out.mkdir()  # an empty folder may be merged into
    before = contents(work)
    merged = found = None
    with bounded():
        try:
            found = read_all(mutated)
        except RequestError as problem:
            check_message(problem)
        try:
            merge_folders([mutated, partner], out)
            merged = read_all(out)
        except RequestError as problem:
            check_message(problem)
    assert found is not None or merged is None, "merged, but not read alone"
    assert found is None or KINDS[kind].expected != REFUSED, "read, but must be refused"
    assert found is not None or KINDS[kind].expected != READ, "refused, but must be read"
    if found is not None:
        assert same(found, slow_updates(mutated))
    if merged is None:
        assert contents(work) == before
        return
    assert sorted(p.name for p in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors", "merge.json"]
    shutil.rmtree(out)
    if number % 2:
        out.mkdir()
    assert {k: v for k, v in contents(work).items() if k != "out"} == {k: v for k, v in before.items() if k != "out"}
    members = [found, slow_updates(partner)]
    for name in {**found, **members[1]}:
        expected = sum(member.get(name, 0.0) / 2 for member in members)
        # Both factors are rounded to float32, and an update that is tiny beside its factors loses more.
        assert np.allclose(merged[name], expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max()), name


def read_all(folder: Path) -> dict[str, np.ndarray]:
    return updates(read_adapter(folder))


def updates(adapter) -> dict[str, np.ndarray]:
    """The change of every module's weight, as the base keeps it, from what the reader gives."""
    found = {}
    for name in adapter.modules:
        factors = adapter.modules[name]
        assert math.isfinite(factors.scale)
        A, B = factors.A.double().numpy(), factors.B.double().numpy()
        assert np.isfinite(A).all()
        assert np.isfinite(B).all()
        update = factors.scale * (B @ A)
        found[name] = update.T if name in adapter.embeddings else update
    return found


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].shape == expected[name].shape
        and np.allclose(found[name], expected[name], rtol=1e-9, atol=1e-12 * np.abs(expected[name]).max())
        for name in expected
    )


def check_message(problem: RequestError) -> None:
    """It fits on a screen, cannot drive the terminal, and does not blame the file for memory that ran out."""
    text = str(problem)
    assert len(text) < 4000
    assert all(character.isprintable() or character == "\n" for character in text), ascii(text)
    assert "memory" not in text, text


def contents(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Everything below a folder, links not followed: what it is, how large, and when it was last written."""
    found = {}
    below = [Path(parent) / name for parent, folders, files in os.walk(folder) for name in (*folders, *files)]
    for path in below:
        status = path.lstat()
        is_out = path == folder / "out"  # made anew where a merge fails
        found[str(path.relative_to(folder))] = (status.st_mode, 0, 0) if is_out else _facts(status)
    return found


def _facts(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_mode, status.st_size, status.st_mtime_ns


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """At most SECONDS, and BYTES of further address space where the system counts it."""
    started = time.monotonic()
    with alarm(), memory_limit():
        yield
    assert time.monotonic() - started < SECONDS


@contextlib.contextmanager
def alarm() -> Iterator[None]:
    """Interrupts also what waits in the kernel, such as the opening of a pipe."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise Exceeded(f"more than {SECONDS} s")

    handler = signal.signal(signal.SIGALRM, ring)
    left, _ = signal.setitimer(signal.ITIMER_REAL, SECONDS)  # pytest-timeout's, of the whole test
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left)
        signal.signal(signal.SIGALRM, handler)


@contextlib.contextmanager
def memory_limit() -> Iterator[None]:
    size = Path("/proc/self/statm")
    if not size.exists():  # Linux alone holds to RLIMIT_AS
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(size.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
