"""`check` and `train` with bad input: no traceback, exit status 2, and a message that says what, where and how."""

import json
import os
import re
import shutil

import pytest

from poc_lora.config import load_config
from poc_lora.microworld import MODEL_DIR
from poc_lora.training.checkpoint import Commits
from poc_lora.training.run import Run
from tests.conftest import instruction_rows


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


def test_check_and_train_print_one_json_object_alone(poc_lora, config):
    status, out, err = poc_lora("check", config, "--json")
    assert status == 0, err
    facts = json.loads(out)
    assert (facts["steps"], facts["adapters"], facts["warnings"]) == (2, 2, [])
    assert 0 < facts["bytes"]["peak"] < facts["bytes"]["free"]
    assert "bytes" not in poc_lora("check", config)[1].split()
    status, out, err = poc_lora("train", config, "--json")
    assert status == 0, err
    done = json.loads(out)
    assert done["folder"] == "run"
    assert done["progress"]["1"].items() >= {"step": 2, "status": "finished", "validated": 2}.items()
    assert done["held_out"][0]["rows"] == 4


def test_init_writes_a_configuration_that_check_takes_at_once(poc_lora, refused, config, tiny_model_dir):
    rows = ["--data", "train.json", "--data", "train.json"]
    status, out, err = poc_lora("init", "mine.yaml", "--model", tiny_model_dir, *rows)
    assert (status, err) == (0, "")
    assert out == "\nthe configuration: mine.yaml\nnext: poc-lora check mine.yaml\n"
    status, out, err = poc_lora("check", "mine.yaml")
    assert status == 0, err
    assert "runs/mine (new)" in out
    assert "where: mine.yaml" in refused("init", "mine.yaml")


def test_init_without_a_model_or_rows_takes_the_demos_and_says_so(poc_lora, config):
    status, out, _ = poc_lora("init", "mine.yaml", "--data", "train.json")
    assert status == 0
    assert out.startswith("model.name is the demo's: set your own in the file\n\nthe configuration: mine.yaml\n")
    assert load_config("mine.yaml").model.name == str(MODEL_DIR)


@pytest.mark.parametrize("verb", ["check", "train"])
@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.temprature=1", "optim.temprature: no such key; did you mean 'optim.temperature'?"),
        ("optim.lr", "fix:   for example optim.lr=1e-4"),
        ("optim.lr=-1", "optim.lr: "),
        ("model.quantization=int4", "model.quantization: Input should be 'nf4', 'int8' or 'fp8' (got 'int4')"),
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


@pytest.mark.parametrize("verb", ["check", "train"])
@pytest.mark.parametrize("output", ["train.json/run", "n" * 300, "new/" + "n" * 300])
def test_an_output_that_cannot_be_written_is_refused(refused, config, verb, output):
    message = refused(verb, config, f"output={output}")
    assert "cannot be written: " in message
    assert f"where: {output}" in message
    assert "fix: " in message
    assert not (config.parent / "new").exists()


@pytest.mark.parametrize("verb", ["check", "train"])
def test_an_output_without_permission_is_refused(refused, config, monkeypatch, verb):
    allowed = os.access  # of root, who may write anywhere
    monkeypatch.setattr("poc_lora.files.os.access", lambda path, mode: path != config.parent and allowed(path, mode))
    assert "cannot be written: Permission denied\n  where: run\n  fix:   check the perm" in refused(verb, config)


@pytest.mark.parametrize("override", ["data.train=[NAME]", "model.name=NAME"])
@pytest.mark.parametrize("verb", ["check", "train"])
def test_a_source_with_too_long_a_name_is_named(poc_lora, config, verb, override):
    name = "n" * 300
    status, _, err = poc_lora(verb, config, override.replace("NAME", name))
    assert status != 0
    assert "File name too long" in err
    assert f"where: {name}\n  fix:   give a shorter name" in err


@pytest.mark.parametrize(
    ("moment", "words"),
    [("start", "bytes could not be added: No such"), ("_write_files", "commit 1 could not be written: No such")],
)
def test_a_run_folder_that_is_removed_meanwhile_is_the_error_and_not_its_lock(
    poc_lora, config, monkeypatch, moment, words
):
    def remove_first(*arguments):
        shutil.rmtree(config.parent / "run")
        return then(*arguments)

    if moment == "_write_files":  # in the background, where the metrics' error may come first
        monkeypatch.setattr(Run, "log", lambda *_: None)
    then = getattr(Commits, moment)
    monkeypatch.setattr(Commits, moment, remove_first)
    status, _, err = poc_lora("train", config)
    assert status == 1
    assert words in err
    assert "fix:   the run folder was moved or removed while the run was in it" in err
    assert not (config.parent / "run").exists()  # nothing makes it anew


def test_resuming_a_run_that_is_not_there_starts_it(poc_lora, config):
    status, _, err = poc_lora("train", config, "--resume")
    assert status == 0, err
    assert (config.parent / "run" / "adapters" / "01").is_dir()


def test_resuming_with_a_changed_key_names_it(refused, trained):
    message = refused("train", trained, "--resume", "optim.lr=1e-3", "train.max_steps=9", "checkpoint.keep=3")
    assert "optim.lr was 0.0001, is 0.001" in message
    assert "train.max_steps was 2, is 9" in message
    assert "checkpoint" not in message


def test_what_to_run_next_follows_from_what_the_merge_is_worth(poc_lora, trained, monkeypatch):
    status, out, err = poc_lora("merge", "run", "--out", "run/merged")
    assert status == 0, err
    assert out.endswith("next: poc-lora eval run --rows run/held_out.jsonl\n")
    for better, words in [
        (1, 'the adapter to use: run/adapters/01\nnext: poc-lora sample run "A PROMPT OF YOURS"\n'),
        ("base", "adapters: run/adapters\nnext: poc-lora report run\n"),
        (None, "next: rm -r run/merged && poc-lora merge run --out run/merged\n"),
    ]:
        monkeypatch.setattr("poc_lora.reporting.screening.better_than_merge", lambda run, better=better: better)
        status, out, err = poc_lora("train", trained, "--resume")
        assert status == 0, err
        assert out.endswith(words)
