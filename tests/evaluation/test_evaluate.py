"""Whole evaluations of tiny models: what is scored, what is written, what is refused."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml

from poc_lora.data.commonsense import find_benchmarks, read_questions
from poc_lora.errors import AdapterError, DataError, ModelError, RequestError, RunError
from poc_lora.evaluation.evaluate import evaluate
from poc_lora.evaluation.label import prepare, score_labels
from poc_lora.evaluation.results import read_results
from poc_lora.lora.adapter import Adapter, write_adapter
from poc_lora.lora.base import load_base
from poc_lora.lora.factors import Factors

TARGETS = {"model.layers.0.self_attn.q_proj": (32, 32), "model.layers.1.mlp.up_proj": (32, 48)}
REAL = Path(__file__).parents[2].parent / "shared" / "data" / "commonsense"


def adapter(seed, base, *, rank=2, size=0.3, targets=TARGETS):
    draws = torch.Generator().manual_seed(seed)
    modules = {
        path: Factors(
            size * torch.randn(rank, d_in, generator=draws), size * torch.randn(d_out, rank, generator=draws), 2.0
        )
        for path, (d_in, d_out) in targets.items()
    }
    return Adapter(modules, base_model=str(base))


def average(adapters):
    """The stacked factors of the mean of B A."""
    return Adapter(
        {
            path: Factors(
                torch.cat([a.modules[path].A for a in adapters]),
                torch.cat([a.modules[path].B * a.modules[path].scale for a in adapters], dim=1) / len(adapters),
            )
            for path in TARGETS
        }
    )


@pytest.fixture
def data(tmp_path):
    for name, labels in {"piqa": ("solution1", "solution2"), "openbookqa": ("glass", "dark wood", "wool")}.items():
        rows = [
            {
                "instruction": f"Which thing {i}? {'old ' * (i % 4)}\n\nAnswer format: {'/'.join(labels)}",
                "input": "",
                "answer": labels[i % len(labels)],
            }
            for i in range(12)
        ]
        path = tmp_path / "data" / name / "test.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(rows))
    return tmp_path / "data"


@pytest.fixture
def run(tmp_path, tiny_model_dir):
    folder = tmp_path / "run"
    folder.mkdir()
    config = {
        "model": {"name": str(tiny_model_dir)},
        "data": {"train": ["x.json"], "prompt": "bare"},
        "output": str(folder),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    adapters = [adapter(seed, tiny_model_dir) for seed in range(3)]
    for i, each in enumerate(adapters):
        write_adapter(each, folder / "adapters" / f"{i:02d}")
    write_adapter(dataclasses.replace(average(adapters), base_model=str(tiny_model_dir)), folder / "merged")
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_is_scored_whole(run, data, tiny_model_dir):
    results = evaluate([run], data=data, benchmarks=["openbookqa", "piqa"])
    assert (results.base_model, results.prompt) == (str(tiny_model_dir), "bare")
    assert list(results.questions) == ["piqa", "openbookqa"]
    assert list(results.adapters) == ["00", "01", "02"]
    assert results.chance == {"piqa": 0.5, "openbookqa": pytest.approx(1 / 3)}
    averages = {name: scored.average.value for name, scored in results.adapters.items()}
    assert results.adapters[results.best].average.value == max(averages.values())
    assert results.average.average.value == pytest.approx(sum(averages.values()) / 3)
    difference = results.merged.average.value - results.average.average.value
    assert results.comparisons["average"].value == pytest.approx(difference)
    assert 0 <= results.agreement <= 1
    assert read_results(run / "eval") == results
    for thing in ("base", "adapter-00", "merged", "ensemble"):
        found = lines(run / "eval" / f"{thing}.jsonl")
        assert [(x["benchmark"], x["row"]) for x in found[:12]] == [("piqa", i) for i in range(1, 13)]
        summary = json.loads((run / "eval" / f"{thing}.json").read_text())
        right = sum(x["correct"] for x in found if x["benchmark"] == "piqa")
        assert summary["benchmarks"]["piqa"]["accuracy"] == pytest.approx(right / 12)
        for x in found:
            assert x["choice"] == max(x["log_probs"], key=x["log_probs"].get)


def test_each_adapters_scores_are_those_of_the_base_with_its_update_added(run, data, tiny_model_dir):
    """Dense weights W + scale B A, one adapter at a time, against the pack."""
    evaluate([run], data=data, benchmarks=["openbookqa"])
    asked = read_questions(data, find_benchmarks(["openbookqa"])[0])
    adapters = [adapter(seed, tiny_model_dir) for seed in range(3)]
    things = {f"adapter-{i:02d}": a for i, a in enumerate(adapters)} | {"merged": average(adapters)}
    seen = []
    for thing, each in things.items():
        model, tokenizer = load_base(str(tiny_model_dir), device=torch.device("cpu"))
        for path, f in each.modules.items():
            model.get_submodule(path).weight.add_(f.scale * f.B @ f.A)
        expected = score_labels(model, prepare(asked, tokenizer, prompt="bare"))[0]
        found = torch.tensor([list(x["log_probs"].values()) for x in lines(run / "eval" / f"{thing}.jsonl")])
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
        seen.append(expected)
    assert not torch.allclose(seen[0], seen[1], atol=0.05)


def test_the_same_evaluation_writes_the_same_bytes(run, data, tmp_path):
    for name in ("one", "two"):
        evaluate([run], data=data, benchmarks=["piqa"], out=tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert "results.json" in files
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_loose_adapters_take_their_own_base(run, data, tmp_path):
    results = evaluate(
        [run / "adapters" / "01", run / "merged"],
        data=data,
        benchmarks=["piqa"],
        out=tmp_path / "out",
        limit=5,
    )
    assert list(results.adapters) == ["01", "merged"]
    assert results.merged is None
    assert results.comparisons == {}
    assert results.questions == {"piqa": 5}
    assert results.prompt == "clean"
    alone = evaluate([run / "adapters" / "01"], data=data, benchmarks=["piqa"], out=tmp_path / "alone", limit=5)
    assert alone.ensemble is None
    assert alone.adapters["01"] == results.adapters["01"]


def test_questions_beyond_the_context_are_counted_and_wrong(run, data):
    path = data / "piqa" / "test.json"
    rows = json.loads(path.read_text())
    for row in rows[:4]:
        row["instruction"] = "wood " * 300 + row["instruction"]
    path.write_text(json.dumps(rows))
    results = evaluate([run], data=data, benchmarks=["piqa"])
    assert results.too_long == {"piqa": 4}
    found = lines(run / "eval" / "ensemble.jsonl")
    assert [(x["choice"], x["correct"], x["log_probs"]) for x in found[:4]] == [(None, False, None)] * 4
    assert results.ensemble.benchmarks["piqa"].value == pytest.approx(sum(x["correct"] for x in found) / 12)


def test_an_adapter_of_another_base_is_refused(run, data):
    write_adapter(adapter(9, "other", targets={"model.layers.0.self_attn.q_proj": (16, 16)}), run / "adapters" / "03")
    with pytest.raises(AdapterError, match="q_proj"):
        evaluate([run], data=data, benchmarks=["piqa"])


def test_scores_that_are_not_numbers_are_an_error(run, data, tiny_model_dir):
    write_adapter(adapter(9, tiny_model_dir, size=1e18), run / "adapters" / "03")
    with pytest.raises(AdapterError, match="not numbers"):
        evaluate([run], data=data, benchmarks=["piqa"])
    assert not (run / "eval" / "results.json").exists()


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"limit": 0}, RequestError, "limit of 0"),
        ({"prompt": "fancy"}, RequestError, "no prompt template"),
        ({"base": "/no/such/base"}, ModelError, "/no/such/base"),
        ({"benchmarks": None}, DataError, "social_i_qa is missing"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused(run, data, change, error, said):
    with pytest.raises(error, match=said):
        evaluate([run], **({"data": data, "benchmarks": ["piqa"]} | change))


def test_targets_must_be_one_run_or_adapters(run, data, tmp_path, tiny_model_dir):
    loose = run / "adapters" / "00"
    nameless = tmp_path / "nameless"
    write_adapter(Adapter(adapter(0, "x").modules), nameless)
    for targets, out, said in [
        ([], tmp_path, "takes one run"),
        ([tmp_path / "absent"], tmp_path, "no such folder"),
        ([tmp_path], tmp_path, "neither a run nor an adapter"),
        ([run, loose], tmp_path, "takes one run"),
        ([loose], None, "need a folder for the results"),
        ([loose, loose], tmp_path, "named twice"),
        ([nameless], tmp_path, "do not name their base"),
        ([loose, nameless], tmp_path, "different base models"),
    ]:
        with pytest.raises(RequestError, match=said):
            evaluate(targets, data=data, benchmarks=["piqa"], out=out)
    for each in (run / "adapters").iterdir():
        (each / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match="no finished adapters"):
        evaluate([run], data=data, benchmarks=["piqa"])


def test_results_of_something_else_are_refused(tmp_path):
    (tmp_path / "results.json").write_text('{"base": 3}')
    with pytest.raises(RunError, match="not the results"):
        read_results(tmp_path)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real benchmarks are not here")
def test_the_eight_real_benchmarks_are_scored(run):
    results = evaluate([run], data=REAL, limit=3)
    assert len(results.questions) == 8
    assert set(results.questions.values()) == {3}
