"""Commits that cannot be written, and run folders that cannot be used: clear errors, and nothing is lost."""

import errno
import json
import os
import re
import shutil
import threading
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors import SafetensorError

from poc_lora import files
from poc_lora.artifacts import schema
from poc_lora.distributed import Ranks
from poc_lora.errors import CheckpointError, RequestError, RunError
from poc_lora.training import checkpoint
from poc_lora.training.checkpoint import Commits, newest_commit
from poc_lora.training.placement import Placement, Progress
from poc_lora.training.step import Pack
from poc_lora.training.train import train
from tests.training.conftest import config, stop_after, weights


def failing(original, error, after):
    """`original`, which fails once it has been called `after` times for a commit's files."""
    calls = []

    def call(*arguments, **keywords):
        if any("checkpoints" in str(a) for a in arguments if isinstance(a, str | Path)):
            calls.append(1)
            if len(calls) > after:
                raise error
        return original(*arguments, **keywords)

    return call


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("module", "name", "error", "after"),
    [
        (checkpoint, "sync", FULL, 4),
        (checkpoint, "save_file", SafetensorError("No space left on device"), 4),
        (schema, "write_atomic", FULL, 1),
        (files.os, "rename", FULL, 1),
    ],
)
def test_a_full_disk_names_the_commit_and_the_bytes_and_the_run_goes_on_later(
    settings, tmp_path, monkeypatch, module, name, error, after
):
    expected = train(config(settings, output=str(tmp_path / "straight")))
    with monkeypatch.context() as patch:
        patch.setattr(module, name, failing(getattr(module, name), error, after))
        with pytest.raises(CheckpointError, match="No space left on device") as problem:
            train(config(settings))
    assert problem.value.where.endswith("commit_00002")
    assert re.search(r"it takes [\d,]{4,} bytes, [\d,]+ are free", str(problem.value))
    assert "--resume" in problem.value.fix
    folder = Path(settings["output"])
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["commit_00001"]
    done = train(config(settings), resume=True)
    for adapter in range(3):
        a, b = weights(expected.folder, adapter), weights(done.folder, adapter)
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_second_process_in_a_run_folder_is_refused_until_the_first_ends(settings):
    folder = Path(settings["output"])
    folder.mkdir()
    with FileLock(folder / ".lock"), pytest.raises(RunError, match="another process trains"):
        train(config(settings))
    train(config(settings))
    with FileLock(folder / ".lock"), pytest.raises(RunError, match="another process trains"):
        train(config(settings, adapters__count=4), resume=True)


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_loaded(settings):
    with pytest.raises(RequestError, match="cannot be written"):
        train(config(settings, output="/proc/poc_lora/run"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused(settings, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(RequestError, match="cannot be written"):
        train(config(settings, output=str(tmp_path / "closed/run")))


def test_a_request_that_is_refused_leaves_no_lock_behind(settings):
    with pytest.raises(RequestError):
        train(config(settings, lora__targets=["nothing"]))
    assert not Path(settings["output"]).exists()


def test_metrics_that_cannot_be_written_name_their_file(settings, monkeypatch):
    original = Path.open

    def full(path, mode="r", *rest, **keywords):
        if path.name == "metrics.jsonl" and mode == "a":
            raise FULL
        return original(path, mode, *rest, **keywords)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(CheckpointError, match=r"\d+ bytes could not be added: No space left") as problem:
        train(config(settings))
    assert problem.value.where.endswith("metrics.jsonl")


def names(folder):
    return sorted(p.name for p in (Path(folder) / "checkpoints").iterdir())


def interrupted(settings, monkeypatch, step, **changes):
    """A run that ended as if killed when it came to `step`."""
    heal = stop_after(monkeypatch, step)
    with pytest.raises(KeyboardInterrupt):
        train(config(settings, **changes))
    heal()


def test_a_damaged_commit_is_not_counted_among_those_to_keep(settings, monkeypatch):
    longer = dict(train__max_steps=12)
    interrupted(settings, monkeypatch, 5, **longer)
    folder = Path(settings["output"]) / "checkpoints"
    (folder / "commit_00002/manifest.json").write_text("{")
    interrupted_again = stop_after(monkeypatch, 5)  # after commit 3, of step 4 again
    with pytest.raises(KeyboardInterrupt):
        train(config(settings, **longer), resume=True)
    interrupted_again()
    assert names(settings["output"]) == ["commit_00001", "commit_00003"]
    (folder / "commit_00003/manifest.json").write_text("{")
    done = train(config(settings, **longer), resume=True)
    assert {state.status for state in done.progress.values()} == {"finished"}


def test_a_commit_that_lacks_the_state_of_an_adapter_is_passed_over(settings, monkeypatch):
    interrupted(settings, monkeypatch, 5)
    folder = Path(settings["output"]) / "checkpoints"
    manifest = json.loads((folder / "commit_00002/manifest.json").read_text())
    del manifest["files"]["adapter_01.safetensors"]
    (folder / "commit_00002/manifest.json").write_text(json.dumps(manifest))
    found, problems = newest_commit(folder)
    assert found.number == 1
    assert "no adapter_01.safetensors" in problems[0]


def test_a_disk_that_is_full_before_there_is_a_commit_is_named(settings, monkeypatch):
    original = Path.mkdir

    def full(path, *rest, **keywords):
        if "checkpoints" in str(path):
            raise FULL
        return original(path, *rest, **keywords)

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        train(config(settings))


class TwoRanks(Ranks):
    """The first of two, alone in this process; the other is what the test does."""

    def __init__(self):
        super().__init__(0, 2)


def test_a_rank_whose_commit_fails_leaves_what_the_others_write(tmp_path, monkeypatch):
    aside = tmp_path / "checkpoints/.commit_00001"
    aside.mkdir(parents=True)
    (aside / "adapter_01.safetensors").write_bytes(b"of the other rank")
    commits = Commits(tmp_path / "checkpoints", TwoRanks(), Placement([[[0], [1]]], 1), keep=2)
    monkeypatch.setattr(commits, "_write_files", failing(None, FULL, 0))
    commits.start({0: Progress(2), 1: Progress(2)}, None, None)
    with pytest.raises(CheckpointError, match="No space left"):
        commits.wait()
    assert (aside / "adapter_01.safetensors").exists()


def test_a_commit_that_fails_in_the_background_ends_the_run_at_the_next_step(settings, monkeypatch):
    steps, failed = [], threading.Event()
    original = Pack.step

    def counted(pack, number, *rest):
        steps.append(number)
        if number == 2:  # the commit of step 2 is under way
            assert failed.wait(30)
        return original(pack, number, *rest)

    def fails(*_):
        failed.set()
        raise FULL

    monkeypatch.setattr(Pack, "step", counted)
    monkeypatch.setattr(checkpoint, "_write_state", fails)
    with pytest.raises(CheckpointError, match=r"commit 1 could not be written: .*No space left"):
        train(config(settings, train__max_steps=400, checkpoint__every_steps=2))
    assert len(steps) < 10


def test_a_file_that_reads_back_otherwise_is_no_commit(settings, monkeypatch):
    original = checkpoint.sync

    def flip(path):
        original(path)
        if path.name == "adapter_01.safetensors":
            data = bytearray(path.read_bytes())
            data[-3] ^= 1
            path.write_bytes(data)

    monkeypatch.setattr(checkpoint, "sync", flip)
    with pytest.raises(CheckpointError, match="differs from what was written"):
        train(config(settings))


def test_training_goes_on_while_a_commit_is_written(settings, monkeypatch):
    stepped, write = threading.Event(), checkpoint._write_state
    original = Pack.step

    def step(pack, number, *rest):
        if number == 3:
            stepped.set()
        return original(pack, number, *rest)

    def slow(*arguments):
        assert stepped.wait(30)  # the file of step 2 waits for a step after it
        return write(*arguments)

    monkeypatch.setattr(Pack, "step", step)
    monkeypatch.setattr(checkpoint, "_write_state", slow)
    train(config(settings, checkpoint__every_steps=2))


def test_without_links_a_waiting_adapter_is_copied(settings, tmp_path, monkeypatch):
    straight = train(config(settings, output=str(tmp_path / "straight")))
    interrupted(settings, monkeypatch, 5)
    monkeypatch.setattr(os, "link", failing(None, OSError(errno.EPERM, "Operation not permitted"), 0))
    done = train(config(settings, adapters__per_device=1, checkpoint__keep=1), resume=True)
    for adapter in range(3):
        a, b = weights(straight.folder, adapter), weights(done.folder, adapter)
        for key in a:  # packs of other sizes round differently, and Adam divides by small moments
            torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("launched", "seconds", "said"), [(True, 45, True), (True, 1, False), (False, 45, False)])
def test_a_commit_that_outlasts_the_launchers_patience_says_what_to_set(
    settings, monkeypatch, capsys, launched, seconds, said
):
    monkeypatch.setattr(Commits, "slowest", property(lambda self: seconds, lambda self, value: None), raising=False)
    if launched:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    train(config(settings))
    errors = capsys.readouterr().err
    assert errors.count("TORCH_ELASTIC_SHUTDOWN_TIMEOUT=90") == (1 if said else 0)
    if said:
        monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "60")
        shutil.rmtree(settings["output"])
        train(config(settings))
        assert "TORCH_ELASTIC" not in capsys.readouterr().err
