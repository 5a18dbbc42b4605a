"""The command line with bad input: no traceback, exit status 2, and a message that says what, where and how."""

import json
import re
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
import yaml
from typer.main import get_command

from poc_lora.cli import app as cli
from tests.conftest import instruction_rows

VERBS = sorted(get_command(cli.app).commands)


@pytest.fixture
def poc_lora(monkeypatch, capsys):
    """Run the command line in this process; returns exit status, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["poc-lora", *map(str, arguments)])
        try:
            cli.main()
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.fixture
def refused(poc_lora):
    """Run the command line on a bad request and check that it is refused as one; returns the message."""

    def run(*arguments):
        status, _, err = poc_lora(*arguments)
        assert status == 2, err
        assert "Traceback" not in err
        assert err.startswith("poc-lora: ")
        return err

    return run


@pytest.fixture
def config(tmp_path, monkeypatch, tiny_model_dir):
    """A small run's configuration in an empty current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.json").write_text(json.dumps(instruction_rows(24)))
    settings = {
        "model": {"name": str(tiny_model_dir)},
        "lora": {"rank": 2, "targets": ["q_proj", "v_proj"]},
        "adapters": {"count": 2},
        "data": {"train": ["train.json"], "validation": 4},
        "optim": {"warmup_steps": 0},
        "train": {"max_steps": 2, "batch_size": 2, "tokens_per_microbatch": 512},
        "output": "run",
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture
def trained(config, poc_lora):
    """The same configuration after its run."""
    status, _, err = poc_lora("train", config)
    assert status == 0, err
    return config


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(poc_lora, verb):
    status, out, _ = poc_lora(verb, "--help")
    assert status == 0
    assert "Usage" in out
    assert "Example" in out or verb == "env"  # env takes nothing


def test_help_lists_the_verbs(poc_lora):
    status, out, _ = poc_lora("--help")
    assert status == 0
    assert {"demo", "check", "train", "merge", "eval", "report", "env"} <= set(VERBS)
    assert all(verb in out for verb in VERBS)


def test_the_module_refuses_bad_input_as_a_program(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "poc_lora", "check", "none.yaml"], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stderr == "poc-lora: no such file\n  where: none.yaml\n  fix:   check the path\n"
    assert result.stdout == ""


def test_check_prints_what_a_run_will_do(poc_lora, config):
    status, out, err = poc_lora("check", config, "train.max_steps=7")
    assert status == 0, err
    facts = dict(line.rsplit(maxsplit=1) for line in out.splitlines() if line.count("  "))
    assert facts["steps"] == "7"
    # q_proj 32 -> 32 and v_proj 32 -> 16, in two layers, at rank 2
    assert facts["parameters per adapter"] == str(2 * 2 * ((32 + 32) + (32 + 16)))
    assert (facts["training rows"], facts["validation rows"], facts["adapters"]) == ("20", "4", "2")
    table = out.split("\n\n")[0].splitlines()
    assert {re.search(r"\s{2,}(?=\S)", line).end() for line in table} == {
        len("supervised tokens per epoch and adapter  ")
    }
    assert "base weights                             float32" in table
    assert next(line for line in table if line.startswith("memory on")).endswith(" kB")
    assert f"poc-lora train {config} train.max_steps=7" in out
    assert not (config.parent / "run").exists()


@pytest.mark.parametrize("verb", ["check", "train"])
@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.temprature=1", "optim.temprature: no such key; did you mean 'optim.temperature'?"),
        ("optim.lr", "fix:   for example optim.lr=1e-4"),
        ("optim.lr=-1", "optim.lr: "),
        ("model.quantization=int4", "model.quantization: Input should be 'nf4' or 'int8' (got 'int4')"),
        ("train.gradient_checkpointing=1", "train.gradient_checkpointing: "),
        ("track=[tensorbord]", "track.0: "),
        ("trian.compile=true", "trian: no such key; did you mean 'train'?"),
        ("data.train=[none.json]", "where: none.json"),
        ("model.name=./none", "no base model at './none'"),
        ("model.name=.", "where: model.name"),
        ("lora.targets=[query]", "its linear layers are: down_proj, gate_proj, k_proj"),
        ("data.max_length=5", "24 rows lost their whole answer to data.max_length=5"),
        ("data.validation=24", "24 usable rows leave none to train on"),
    ],
)
def test_a_bad_setting_is_refused_with_its_remedy(refused, config, verb, override, expected):
    assert expected in refused(verb, config, override)


def test_a_missing_or_broken_configuration_is_named(refused, config):
    assert "where: none.yaml" in refused("train", "none.yaml")
    assert "cannot be read" in refused("train", config.parent)
    assert "not a mapping" in refused("train", "train.json")
    config.write_text("model: [\n")
    assert "not valid YAML" in refused("train", config)


def test_a_row_that_cannot_be_used_is_named(refused, config):
    (config.parent / "train.json").write_text(json.dumps([*instruction_rows(2), {"instruction": "a", "answer": "b"}]))
    message = refused("check", config)
    assert "'output' is missing" in message
    assert "train.json, row 3" in message


def test_a_run_folder_in_use_is_left_as_it_is(refused, config):
    (config.parent / "run").mkdir()
    (config.parent / "run" / "thesis.txt").write_text("years of work")
    message = refused("train", config)
    assert "where: run" in message
    assert "--resume" in message
    assert [p.name for p in (config.parent / "run").iterdir()] == ["thesis.txt"]


def test_an_output_that_cannot_be_written_is_refused(refused, config):
    assert "cannot be written" in refused("train", config, "output=train.json/run")


def test_resuming_nothing_is_refused(refused, config):
    assert "there is no run to resume" in refused("train", config, "--resume")
    assert not (config.parent / "run").exists()


def test_resuming_with_a_changed_key_names_it(refused, trained):
    message = refused("train", trained, "--resume", "optim.lr=1e-3", "train.max_steps=9", "checkpoint.keep=3")
    assert "optim.lr was 0.0001, is 0.001" in message
    assert "train.max_steps was 2, is 9" in message
    assert "checkpoint" not in message


def test_merging_nothing_is_refused(refused, poc_lora, config):
    assert "where: none" in refused("merge", "none", "--out", "merged")
    (config.parent / "run" / "adapters").mkdir(parents=True)
    assert "no finished adapters" in refused("merge", "run", "--out", "merged")
    assert poc_lora("merge", "--out", "merged")[0] == 2
    assert not (config.parent / "merged").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--weights", "1,x"], "where: --weights"),
        (["--weights", "1"], "1 weights for 2 adapters"),
        (["--weights", "nan,1"], "not a finite number"),
        (["--weights", ""], "where: --weights"),
        (["--rank-sweep", "8,x"], "where: --rank-sweep"),
        (["--rank-sweep", "0"], "the ranks to keep are 0"),
        (["--method", "linear"], "one of: average, block, random, soup"),
        (["--method", "block"], "give a rank"),
        (["--dtype", "int8"], "where: --dtype"),
        (["--rank", "0"], "rank"),
    ],
)
def test_a_merge_with_bad_options_writes_nothing(refused, trained, options, expected):
    assert expected in refused("merge", "run", "--out", "merged", *options)
    assert not (trained.parent / "merged").exists()


def test_a_merge_never_replaces_a_folder(refused, trained):
    assert "exists already" in refused("merge", "run", "--out", "run")
    assert (trained.parent / "run" / "adapters" / "00").is_dir()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--benchmarks", "openbookqa,trivia"], "'trivia'"),
        (["--benchmarks", "boolq"], "boolq/test.json"),
        (["--limit", "0"], "limit"),
        (["--prompt", "poem"], "known: clean, bare"),
    ],
)
def test_an_evaluation_that_cannot_be_done_is_refused(refused, trained, options, expected):
    assert expected in refused("eval", "run", "--data", ".", *options)


def test_evaluating_or_reporting_what_is_not_there_is_refused(refused, config):
    assert "where: none" in refused("eval", "none", "--data", ".")
    assert "where: none" in refused("report", "none")


def test_eval_list_shows_the_eight_benchmarks_and_needs_nothing_else(poc_lora, refused):
    status, out, _ = poc_lora("eval", "--list")
    assert status == 0
    for name in ("social_i_qa", "winogrande", "Rowan/hellaswag", "validation", "10,042", "33.33"):
        assert name in out
    assert "TARGETS is missing" in refused("eval", "--data", ".")
    assert "--data is missing" in refused("eval", "run")


def test_a_report_of_a_run_that_was_only_trained(poc_lora, trained):
    status, out, err = poc_lora("report", "run")
    assert status == 0, err
    assert "the report: run/report.html" in out
    assert "Nothing has been evaluated" in (trained.parent / "run/report.html").read_text()
    assert not list(trained.parent.rglob("results.md"))


def test_runs_are_compared_only_when_asked(refused, trained):
    assert "fix:   for example: poc-lora report run --compare OTHER_RUN" in refused("report", "run", "other")
    assert "--compare needs runs" in refused("report", "run", "--compare")
    assert "was not evaluated" in refused("report", "run", "--compare", "run")


def test_a_rank_sweep_is_drawn_beside_merge_json(poc_lora, trained):
    for out in ("one", "two"):
        assert poc_lora("merge", "run", "--out", out, "--rank-sweep", "1,2,4")[0] == 0
    for name in ("rank_sweep.svg", "rank_sweep.png"):
        assert (trained.parent / "one" / name).read_bytes() == (trained.parent / "two" / name).read_bytes()
    status, _, _ = poc_lora("merge", "run", "--out", "plain")
    assert status == 0
    assert not list((trained.parent / "plain").glob("rank_sweep*"))


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
def test_out_of_memory_is_told_with_its_own_words_and_a_remedy(poc_lora, monkeypatch, problem):
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
