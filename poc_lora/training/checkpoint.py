"""Numbered commits of a run's state: atomic, checksummed, one file per adapter, written in the background.

    checkpoints/commit_00007/  manifest.json  adapter_00.safetensors ...  best_00.safetensors ...

A commit holds the weights and moments of every adapter that has begun and not finished. Under `train.keep: best` it
also holds the state at the lowest validation loss so far: a link into the commit that was written before that
validation. The manifest gives every adapter's step and status, its place, and the checksum of every file. There is no
random state: draws are keyed, so weights, moments and step are all there is. Every rank writes the adapters placed on
it; rank 0 adds the manifest and publishes the commit by one rename.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from poc_lora.artifacts.schema import Artifact, Schema
from poc_lora.distributed import Ranks
from poc_lora.errors import CheckpointError, PocLoraError, RequestError, first_line, system_problem
from poc_lora.files import free_bytes_at, publish_folder, sha256_file, sync
from poc_lora.lora.bank import AdapterBank
from poc_lora.optim.noisy_adamw import NoisyAdamW
from poc_lora.training.placement import Placement, Progress

MANIFEST = "manifest.json"
MOMENTS = ("exp_avg", "exp_avg_sq")
FILES_AT_ONCE = 4  # written, hashed and read back in parallel

State = dict[str, torch.Tensor]  # one adapter's weights and moments, on the host


class FileEntry(Schema):
    """Size and checksum of a file of a commit."""

    bytes: int
    sha256: str


class Manifest(Artifact):
    """manifest.json: what a commit holds."""

    content: ClassVar[str] = "the manifest of a commit"
    fix: ClassVar[str] = "restore the file, or remove the commit"

    commit: int
    adapters: dict[int, Progress]
    placement: Placement
    files: dict[str, FileEntry]


@dataclass(frozen=True)
class Commit:
    """A verified commit on disk."""

    folder: Path
    manifest: Manifest

    @property
    def number(self) -> int:
        return self.manifest.commit

    @property
    def progress(self) -> dict[int, Progress]:
        return self.manifest.adapters


class Commits:
    """The commits under `root`, written by all ranks together in the background, one at a time.

    As a context manager it waits, on exit, for the commit under way.

    Args:
        root: The folder checkpoints/ of the run.
        ranks: The ranks of the run.
        placement: Which rank trains, and therefore writes, which adapters.
        keep: How many of the newest intact commits to keep.
        last: The commit that is resumed, if any.
    """

    def __init__(self, root: Path, ranks: Ranks, placement: Placement, *, keep: int, last: Commit | None = None):
        self.root, self.keep, self._ranks, self._placement = root, keep, ranks, placement
        self._mine = placement.of(ranks.process_index)
        self._channel = ranks.channel("commits")
        self._number = max(_numbers(root), default=0)
        self._last = last.folder if last else root  # not used before an adapter has begun
        self._files = dict(last.manifest.files) if last else {}  # of the newest commit: at least this rank's
        self._best_steps = {a: state.best_step for a, state in last.progress.items()} if last else {}  # in it
        self._intact = [last.number] if last else []
        self._background = ThreadPoolExecutor(max_workers=1, thread_name_prefix="commits")
        self._under_way: Future[None] | None = None
        self.seconds = 0.0  # that training waited for commits
        self.slowest = 0.0  # seconds that the slowest commit took to write

    def __enter__(self) -> "Commits":
        return self

    def __exit__(self, *_: object) -> None:
        self._background.shutdown(wait=True)

    def start(self, progress: Mapping[int, Progress], bank: AdapterBank | None, optimizer: NoisyAdamW | None) -> None:
        """Start the next commit when the previous one is written. All ranks must call it.

        The state of the adapters in the bank is copied before the call returns, so training may continue. Those of
        adapters that have begun and wait for their turn are hard links to the previous commit. So are best states: a
        step is committed before it is validated, so its file is there.

        Args:
            progress: Of all adapters, the same on every rank.
            bank: The adapters that this rank trains at present, if any.
            optimizer: Their optimizer.

        Raises:
            CheckpointError: The previous commit could not be written; earlier ones remain valid.
        """
        self.wait()
        began = time.perf_counter()
        self._number += 1
        states = {} if bank is None or optimizer is None else _snapshot(bank, optimizer, progress)
        begun = [adapter for adapter in self._mine if progress[adapter].begun]
        links = {_file_name(adapter): _file_name(adapter) for adapter in begun if adapter not in states}
        for adapter in begun:
            if best := progress[adapter].best_step:
                unchanged = self._best_steps.get(adapter) == best
                links[_best_name(adapter)] = _best_name(adapter) if unchanged else _file_name(adapter)
        self._best_steps = {adapter: state.best_step for adapter, state in progress.items()}
        manifest = Manifest(
            commit=self._number,
            adapters=dict(sorted(progress.items())),
            placement=self._placement,
            files={},
        )
        self._under_way = self._background.submit(self._write, self._number, states, links, manifest)
        self.seconds += time.perf_counter() - began

    def check(self) -> None:
        """Raise CheckpointError if the commit under way has already failed."""
        if self._under_way is not None and self._under_way.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the commit under way. Raises CheckpointError if it could not be written."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            began = time.perf_counter()
            under_way.result()
            self.seconds += time.perf_counter() - began

    def restore(self, progress: Mapping[int, Progress], bank: AdapterBank, optimizer: NoisyAdamW) -> None:
        """Restore weights, moments and step counts of the bank's adapters from the newest commit, bitwise.

        An adapter that had diverged stays dropped, one that had not begun keeps its initial state.
        Raises CheckpointError if a file cannot be used.
        """
        self.wait()
        for slot, adapter in enumerate(bank.adapters):
            if progress[adapter].status == "diverged":
                bank.drop(slot)
            elif progress[adapter].begun:
                _restore(self._last / _file_name(adapter), progress[adapter].step, bank, optimizer, slot)

    def restore_best(self, progress: Mapping[int, Progress], bank: AdapterBank) -> None:
        """Set the weights of the bank's adapters to their best, from the newest commit.

        Those whose last step is their best stay as they are. Raises CheckpointError if a file cannot be used.
        """
        self.wait()
        for slot, adapter in enumerate(bank.adapters):
            if 0 < progress[adapter].best_step < progress[adapter].step and slot not in bank.dropped:
                state = _load_state(self._last / _best_name(adapter), bank.rows[slot])
                with torch.no_grad():
                    bank.rows[slot].copy_(state["weights"])

    def _write(self, number: int, states: dict[int, State], links: dict[str, str], manifest: Manifest) -> None:
        """Write commit `number` together with the other ranks, in the background thread."""
        began = time.perf_counter()
        folder = _folder(self.root, number)
        aside = self.root / f".{folder.name}"
        try:
            files = self._write_files(aside, states, links)
            reports = self._channel.gather({name: entry.to_json() for name, entry in files.items()})
            if self._ranks.process_index == 0:
                every = {name: FileEntry(**entry) for report in reports for name, entry in report.items()}
                manifest.model_copy(update={"files": every}).write(aside / MANIFEST)
                publish_folder(aside, folder)
            self._channel.barrier()
        except (OSError, SafetensorError, RequestError, CheckpointError) as problem:
            self._clear(aside)
            reason = problem.what if isinstance(problem, PocLoraError) else system_problem(problem)[0]
            fix = "make room or repair the folder; --resume continues from the previous commit"
            if not self.root.parent.is_dir():
                fix = "the run folder was moved or removed while the run was in it: start again"
            needed = sum(tensor.nbytes for state in states.values() for tensor in state.values())
            raise CheckpointError(
                f"commit {number} could not be written: {reason}"
                f" (it takes {needed:,} bytes, {free_bytes_at(self.root):,} are free)",
                where=folder,
                fix=fix,
            ) from problem
        self._last, self._files = folder, files
        if self._ranks.process_index == 0:
            self._prune(number)
        self.slowest = max(self.slowest, time.perf_counter() - began)

    def _write_files(self, aside: Path, states: dict[int, State], links: dict[str, str]) -> dict[str, FileEntry]:
        """Write this rank's files in parallel and verify them; returns their entries of the manifest.

        links: Names of files that the previous commit has, by their names in this one.
        """
        self.root.mkdir(exist_ok=True)  # but not a run folder that was removed
        aside.mkdir(exist_ok=True)  # all ranks write to one folder
        for name, before in links.items():
            _link(self._last / before, aside / name)
        files = {name: self._files[before] for name, before in links.items()}
        with ThreadPoolExecutor(max_workers=FILES_AT_ONCE) as pool:
            written = pool.map(lambda item: _write_state(aside / _file_name(item[0]), item[1]), states.items())
            return files | dict(written)

    def _clear(self, aside: Path) -> None:
        """Remove this rank's files of a failed commit; other ranks may still be writing to the folder."""
        for adapter in self._mine:
            (aside / _file_name(adapter)).unlink(missing_ok=True)
            (aside / _best_name(adapter)).unlink(missing_ok=True)
        if self._ranks.process_index == 0:
            (aside / MANIFEST).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty
            aside.rmdir()

    def _prune(self, number: int) -> None:
        """Remove all commits but the newest that are known to be intact."""
        self._intact = [*self._intact, number][-self.keep :]
        for old in _numbers(self.root):
            if old not in self._intact:
                shutil.rmtree(_folder(self.root, old), ignore_errors=True)


def newest_commit(root: Path) -> tuple[Commit | None, list[str]]:
    """Find the newest intact commit.

    Args:
        root: The folder checkpoints/ of a run.

    Returns:
        The commit, or None if there are none, and a line for each newer commit that is damaged.

    Raises:
        CheckpointError: There are commits, but none is intact.
    """
    problems: list[str] = []
    numbers = sorted(_numbers(root), reverse=True)
    for number in numbers:
        folder = _folder(root, number)
        try:
            return _verified(folder), problems
        except PocLoraError as problem:
            problems.append(f"{folder}: {first_line(problem)}")
    if numbers:
        raise CheckpointError("no commit of this run is intact:", details=problems, where=root)
    return None, problems


def _snapshot(bank: AdapterBank, optimizer: NoisyAdamW, progress: Mapping[int, Progress]) -> dict[int, State]:
    """Copy the state of the adapters in training to the host; from a GPU into pinned memory, which torch reuses."""
    states: dict[int, State] = {}
    for slot, adapter in enumerate(bank.adapters):
        if progress[adapter].begun:
            row = bank.rows[slot]
            moments = {name: optimizer.state[row].get(name, torch.zeros_like(row)) for name in MOMENTS}
            states[adapter] = {name: _copy(t.detach()) for name, t in {"weights": row, **moments}.items()}
    if bank.weights.is_cuda:
        torch.cuda.synchronize(bank.weights.device)
    return states


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return host.copy_(tensor, non_blocking=tensor.is_cuda)


def _write_state(path: Path, state: State) -> tuple[str, FileEntry]:
    """Write one adapter's state and compare it with what is read back; returns the file's name, size and checksum."""
    save_file(state, path, metadata={"format": "pt"})
    sync(path)
    entry = FileEntry(bytes=path.stat().st_size, sha256=sha256_file(path))
    with safe_open(path, framework="pt") as written:
        # As integers, so that NaN equals NaN.
        same = all(torch.equal(written.get_tensor(n).view(torch.int32), t.view(torch.int32)) for n, t in state.items())
    if not same:
        raise CheckpointError("the file differs from what was written", where=path)
    return path.name, entry


def _link(source: Path, target: Path) -> None:
    """Link the file under a second name, or copy it if the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        sync(target)


def _load_state(path: Path, row: torch.Tensor) -> State:
    """Load one adapter's state. Raises CheckpointError unless its tensors have the shape of `row`."""
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as problem:
        raise CheckpointError(f"cannot be read: {problem}", where=path) from problem
    if any(name not in state or state[name].shape != row.shape for name in ("weights", *MOMENTS)):
        raise CheckpointError("the saved adapter has other shapes than this run", where=path)
    return state


def _restore(path: Path, step: int, bank: AdapterBank, optimizer: NoisyAdamW, slot: int) -> None:
    row, group = bank.rows[slot], optimizer.param_groups[slot]
    state = _load_state(path, row)
    with torch.no_grad():
        row.copy_(state["weights"])
    moments = {name: state[name].to(row.device) for name in MOMENTS}
    optimizer.state[row] = {"step": torch.tensor(float(step), device=row.device), **moments}
    group["noise_step"] = step


def _verified(folder: Path) -> Commit:
    """Verify the commit in `folder`. Raises if a file, or the state of an adapter, is missing or damaged."""
    manifest = Manifest.read(folder / MANIFEST)
    needed = {_file_name(adapter) for adapter, state in manifest.adapters.items() if state.begun}
    needed |= {_best_name(a) for a, state in manifest.adapters.items() if state.begun and state.best_step}
    if missing := needed - manifest.files.keys():
        raise CheckpointError(f"the commit has no {', '.join(sorted(missing))}", where=folder)
    with ThreadPoolExecutor(max_workers=FILES_AT_ONCE) as pool:
        list(pool.map(lambda item: _require_intact(folder / Path(item[0]).name, item[1]), manifest.files.items()))
    return Commit(folder, manifest)


def _require_intact(path: Path, entry: FileEntry) -> None:
    if not path.is_file() or path.stat().st_size != entry.bytes or sha256_file(path) != entry.sha256:
        raise CheckpointError("missing, truncated or changed since it was written", where=path)


def _file_name(adapter: int) -> str:
    return f"adapter_{adapter:02d}.safetensors"


def _best_name(adapter: int) -> str:
    return f"best_{adapter:02d}.safetensors"


def _folder(root: Path, number: int) -> Path:
    return root / f"commit_{number:05d}"


def _numbers(root: Path) -> Sequence[int]:
    return [int(p.name.removeprefix("commit_")) for p in root.glob("commit_*") if p.name[7:].isdigit()]
