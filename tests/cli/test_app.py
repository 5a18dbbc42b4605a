"""The command line as a whole: help, and how errors are shown."""

import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
from typer.main import get_command

from poc_lora.cli import app as cli

VERBS = sorted(get_command(cli.app).commands)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(poc_lora, verb):
    status, out, _ = poc_lora(verb, "-h")
    assert poc_lora(verb, "--help") == (status, out, "")
    assert status == 0
    assert "Usage" in out
    assert "Example" in out or verb == "env"  # env takes nothing


def test_help_lists_the_verbs(poc_lora):
    status, out, _ = poc_lora("--help")
    assert status == 0
    assert {"demo", "check", "train", "merge", "eval", "report", "env"} <= set(VERBS)
    assert all(verb in out for verb in VERBS)


def test_a_shell_completes_verbs_and_options(poc_lora, monkeypatch):
    monkeypatch.setenv("_POC_LORA_COMPLETE", "complete_bash")
    for words, number, expected in [("poc-lora tr", 1, "train"), ("poc-lora merge --rank-", 2, "--rank-sweep")]:
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(number))
        assert poc_lora() == (0, f"{expected}\n", "")


def test_the_module_refuses_bad_input_as_a_program(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "poc_lora", "check", "none.yaml"], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stderr == "poc-lora: no such file\n  where: none.yaml\n  fix:   check the path\n"
    assert result.stdout == ""


def cpu_allocator_failure():
    try:
        torch.empty(2**50)
    except RuntimeError as problem:
        return problem


@pytest.mark.parametrize(
    "problem",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        cpu_allocator_failure(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: not enough memory: you tried to ..."),
        MemoryError(),
        MemoryError("Unable to allocate 8 EiB"),
    ],
    ids=lambda problem: type(problem).__name__,
)
def test_out_of_memory_is_reported_with_its_own_words_and_a_remedy(poc_lora, monkeypatch, problem):
    monkeypatch.setattr(cli, "app", Mock(side_effect=problem))
    status, _, err = poc_lora("train")
    assert status == 1
    assert err.startswith(
        f"poc-lora: out of memory{': ' if str(problem) else ''}{problem}\n  fix:   in training, lower"
    )
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: an illegal memory access was encountered",
        "required memory format is channels_last",
        "DataLoader worker is killed by signal: Bus error. It might be out of shared memory",
    ],
)
def test_other_errors_that_speak_of_memory_stay_a_traceback(poc_lora, monkeypatch, text):
    monkeypatch.setattr(cli, "app", Mock(side_effect=RuntimeError(text)))
    with pytest.raises(RuntimeError, match=text):  # Python prints it, and exits with status 1
        poc_lora("train")


def test_a_switch_shows_the_traceback_behind_a_message(poc_lora, refused, config, monkeypatch):
    config.write_text("model: [\n")
    plain = refused("train", config)
    monkeypatch.setenv("POC_LORA_TRACEBACK", "1")
    status, _, err = poc_lora("train", config)
    assert status == 2
    assert err.startswith("Traceback (most recent call last):\n")
    assert "\nyaml.parser.ParserError: " in err
    assert "direct cause of the following exception" in err
    assert err.endswith(plain)
    monkeypatch.setenv("POC_LORA_TRACEBACK", "0")
    assert refused("train", config) == plain
    monkeypatch.setenv("POC_LORA_TRACEBACK", "perhaps")
    assert "POC_LORA_TRACEBACK is 'perhaps'" in refused("train", config)


def test_the_switch_shows_where_memory_ran_out(poc_lora, monkeypatch):
    monkeypatch.setenv("POC_LORA_TRACEBACK", "1")
    monkeypatch.setattr(cli, "app", Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory.\x1b[2J")))
    status, _, err = poc_lora("train")
    assert status == 1
    assert "\ntorch.OutOfMemoryError: CUDA out of memory.\\x1b[2J\n" in err


def test_help_names_the_switch(poc_lora):
    assert "POC_LORA_TRACEBACK=1" in poc_lora("--help")[1]
