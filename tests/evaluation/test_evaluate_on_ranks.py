"""Evaluations over several processes: questions shared, a base that is sharded, an end together."""

import dataclasses
import shutil

import pytest
import torch
import yaml

from poc_lora.adapters.adapter import write_adapter
from poc_lora.artifacts.results import Results
from poc_lora.evaluation.evaluate import evaluate
from tests.evaluation import test_evaluate
from tests.evaluation.test_evaluate import adapter, lines
from tests.launch import finish, processes

data, run = test_evaluate.data, test_evaluate.run  # the fixtures


def test_two_ranks_share_the_questions(run, data, tmp_path):
    alone = evaluate([run], data=data, out=tmp_path / "alone", benchmarks=["piqa", "openbookqa"])
    code = (
        "import sys; from poc_lora.evaluation import evaluator; evaluator.QUESTIONS_PER_BATCH = 4;"
        " from poc_lora.__main__ import main; main()"
    )
    arguments = ["eval", str(run), "--data", str(data), "--benchmarks", "piqa,openbookqa"]
    with processes(2, "-c", code, *arguments) as ranks:
        (first, shown, errors), (second, silent, _) = finish(ranks)
    assert (first, second) == (0, 0), errors
    assert "PoC merge" in shown
    assert silent == ""
    together = Results.read(run / "eval" / "results.json")
    assert together.adapters == alone.adapters
    assert together.merged == alone.merged
    assert together.ensemble == alone.ensemble


@pytest.mark.parametrize("size", [2, 3])
def test_a_base_that_was_sharded_for_training_is_sharded_for_its_questions(run, data, tmp_path, size):
    alone = evaluate([run], data=data, out=tmp_path / "alone", benchmarks=["piqa", "openbookqa"])
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["shard"] = True
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    code = (
        "from poc_lora.evaluation import evaluate as e; shard = e.shard_base;"
        " e.shard_base = lambda *a: print('shards') or shard(*a);"
        " from poc_lora.evaluation.protocols import label; label.TOKENS_PER_BATCH['cpu'] = 300;"
        " from poc_lora.__main__ import main; main()"
    )
    arguments = ["eval", str(run), "--data", str(data), "--benchmarks", "piqa,openbookqa"]
    with processes(size, "-c", code, *arguments) as ranks:
        (first, shown, errors), *others = finish(ranks)
    assert [first, *(status for status, _, _ in others)] == [0] * size, errors
    assert "PoC merge" in shown
    assert [out for _, out, _ in others] == ["shards\n"] * (size - 1)
    together = Results.read(run / "eval" / "results.json")
    assert together.adapters == alone.adapters
    assert (together.base, together.merged, together.ensemble) == (alone.base, alone.merged, alone.ensemble)
    for variant in ("base", "adapter-02", "merged"):
        ours, theirs = (lines(place / f"{variant}.jsonl") for place in (run / "eval", tmp_path / "alone"))
        for one, other in zip(ours, theirs, strict=True):
            assert one["log_probs"] == pytest.approx(other["log_probs"], abs=2e-5)


@pytest.mark.parametrize("protocol", ["generate", "label"])
def test_what_cannot_be_evaluated_on_a_sharded_base_is_refused(run, data, protocol):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["shard"] = True
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    if protocol == "label":
        whole = adapter(0, config["model"]["name"])
        head = {"lm_head.weight": torch.zeros(1)}
        write_adapter(dataclasses.replace(whole, modules_to_save=head), run / "adapters" / "03")
        shutil.rmtree(run / "merged")
    arguments = ["eval", str(run), "--data", str(data), "--benchmarks", "piqa", "--protocol", protocol]
    with processes(2, "-m", "poc_lora", *arguments) as ranks:
        (first, _, errors), (second, _, silent) = finish(ranks)
    assert (first, second) == (2, 2), errors
    assert "in one process" in errors
    assert "poc-lora:" not in silent


def test_a_rank_without_questions_ends_with_those_that_are_stopped(run, data):
    code = (
        "import signal; from poc_lora.evaluation import evaluator; asked = evaluator.Protocol.answers\n"
        "def stopped(*args, **kwargs): signal.raise_signal(signal.SIGTERM); return asked(*args, **kwargs)\n"
        "evaluator.Protocol.answers = stopped; from poc_lora.__main__ import main; main()"
    )
    arguments = ["eval", str(run), "--data", str(data), "--benchmarks", "piqa", "--limit", "1"]
    with processes(2, "-c", code, *arguments) as ranks:
        (first, _, errors), (second, _, silent) = finish(ranks)
    assert (first, second) == (130, 130), errors
    assert "the answers so far are kept" in errors
    assert "rank" not in errors
    assert "poc-lora:" not in silent
