"""Commits that cannot be written, and run folders that cannot be used: clear errors, and nothing is lost."""

import errno
import os
import re
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors import SafetensorError

from poc_lora import files
from poc_lora.errors import CheckpointError, RequestError, RunError
from poc_lora.training import checkpoint
from poc_lora.training.loop import train
from tests.training.conftest import config, weights


def failing(original, error, after):
    calls = []

    def call(*arguments, **keywords):
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
        (checkpoint, "save", SafetensorError("No space left on device"), 4),
        (checkpoint, "write_json", FULL, 1),
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
