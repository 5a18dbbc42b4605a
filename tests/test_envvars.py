"""What is read from the environment: a value that cannot be used is named, and nobody sees a traceback."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from poc_lora.distributed import is_rank_0, open_ranks
from poc_lora.errors import RequestError
from poc_lora.models.load import default_device, resolve_dtype
from poc_lora.training.memory import free_bytes
from poc_lora.training.train import _restarted

CPU = torch.device("cpu")


def enter_ranks():
    with open_ranks(CPU):
        pass


def restarted():
    return _restarted(SimpleNamespace(output="nowhere"))


def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.parametrize("text", ["30m", "", "nan", "inf", "-1", "0", "1e300"])
def test_a_time_that_is_none_is_refused_where_ranks_are_opened(monkeypatch, text):
    monkeypatch.setenv("POC_LORA_HANG_SECONDS", text)
    with pytest.raises(RequestError) as refused:
        enter_ranks()
    assert f"POC_LORA_HANG_SECONDS is {text!r}, not a number of seconds above 0" in str(refused.value)
    assert refused.value.where == "POC_LORA_HANG_SECONDS"


@pytest.mark.parametrize(
    ("name", "text", "reader"),
    [
        ("RANK", "first", is_rank_0),
        ("RANK", "-1", is_rank_0),
        ("WORLD_SIZE", "two", enter_ranks),
        ("WORLD_SIZE", "0", enter_ranks),
        ("LOCAL_WORLD_SIZE", "two", lambda: free_bytes(CPU)),
        ("LOCAL_WORLD_SIZE", "0", lambda: free_bytes(CPU)),
        ("TORCHELASTIC_RESTART_COUNT", "once", restarted),
        ("SLURM_RESTART_COUNT", "once", restarted),
        ("ACCELERATE_USE_CPU", "perhaps", default_device),
        ("ACCELERATE_USE_FSDP", "perhaps", enter_ranks),
        ("ACCELERATE_MIXED_PRECISION", "bf61", lambda: resolve_dtype("auto", CPU)),
        ("ACCELERATE_MIXED_PRECISION", "fp8", lambda: resolve_dtype("auto", CPU)),
    ],
)
def test_a_malformed_value_is_refused_by_name(monkeypatch, name, text, reader):
    monkeypatch.setenv(name, text)
    with pytest.raises(RequestError) as refused:
        reader()
    assert f"the environment variable {name} is {text!r}, not " in str(refused.value)
    assert f"set {name} to " in refused.value.fix


def test_a_malformed_local_rank_is_refused_where_there_is_a_gpu(monkeypatch):
    gpu(monkeypatch)
    monkeypatch.setenv("LOCAL_RANK", "first")
    with pytest.raises(RequestError, match="LOCAL_RANK is 'first'"):
        default_device()


@pytest.mark.parametrize(("missing", "rank"), [("RANK", None), ("MASTER_ADDR", "1"), ("MASTER_PORT", "1")])
def test_one_of_several_processes_that_lacks_its_place_is_refused(monkeypatch, missing, rank):
    for name, text in {"WORLD_SIZE": "2", "RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        if name == missing:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, text)
    with pytest.raises(RequestError, match=missing):
        enter_ranks()


def test_a_rank_beyond_the_number_of_processes_is_refused(monkeypatch):
    for name, text in {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(RequestError, match="RANK is 2"):
        enter_ranks()


@pytest.mark.parametrize("text", ["1", "true", "True", "YES"])
def test_a_switch_is_read_as_accelerate_reads_it(monkeypatch, text):
    gpu(monkeypatch)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert default_device() == torch.device("cuda", 3)
    monkeypatch.setenv("ACCELERATE_USE_CPU", text)
    assert default_device() == CPU


def test_a_bad_value_stops_only_the_verbs_that_need_it(tmp_path):
    def program(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "poc_lora", *arguments],
            env={**os.environ, "POC_LORA_HANG_SECONDS": "30m"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    assert program("--help").returncode == 0
    assert program("env").returncode == 0
    refused = program("demo", "--out", "run")
    assert refused.returncode == 2
    assert refused.stderr == (
        "poc-lora: the environment variable POC_LORA_HANG_SECONDS is '30m', not a number of seconds above 0, such as"
        " 1800\n  where: POC_LORA_HANG_SECONDS\n"
        "  fix:   set POC_LORA_HANG_SECONDS to a number of seconds above 0, such as 1800, or unset it\n"
    )
    assert not (tmp_path / "run").exists()
