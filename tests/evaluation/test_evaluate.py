"""Whole evaluations of tiny models: what is scored, what is written, what is refused."""

import dataclasses
import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import yaml

from poc_lora.adapters.adapter import Adapter, write_adapter
from poc_lora.adapters.factors import Factors
from poc_lora.artifacts.results import Results
from poc_lora.artifacts.variant_scores import VariantScores
from poc_lora.data.commonsense import find_benchmarks
from poc_lora.data.questions import read_questions
from poc_lora.errors import AdapterError, DataError, Interrupted, ModelError, RequestError, RunError
from poc_lora.evaluation import evaluator
from poc_lora.evaluation.answers import AnswerFile
from poc_lora.evaluation.evaluate import evaluate
from poc_lora.evaluation.protocols import harness
from poc_lora.evaluation.protocols.label import prepare, score_labels
from poc_lora.evaluation.variants import adapter_digest
from poc_lora.merging.folders import merge_folders
from poc_lora.models.load import load_base
from poc_lora.reporting.results_tables import notes

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
    assert Results.read(run / "eval" / "results.json") == results
    for variant in ("base", "adapter-00", "merged", "ensemble"):
        found = lines(run / "eval" / f"{variant}.jsonl")
        assert [(x["benchmark"], x["row"]) for x in found[:12]] == [("piqa", i) for i in range(1, 13)]
        summary = json.loads((run / "eval" / f"{variant}.json").read_text())
        right = sum(x["correct"] for x in found if x["benchmark"] == "piqa")
        assert summary["benchmarks"]["piqa"]["accuracy"] == pytest.approx(right / 12)
        for x in found:
            assert x["choice"] == max(x["log_probs"], key=x["log_probs"].get)


def test_the_digest_of_the_questions_changes_with_their_text_alone(run, data, tmp_path):
    first = evaluate([run], data=data, benchmarks=["piqa"], out=tmp_path / "one").questions_sha256
    shutil.rmtree(run / "merged")
    assert (
        evaluate([run], data=data, benchmarks=["piqa"], dtype="bfloat16", out=tmp_path / "two").questions_sha256
        == first
    )
    rows = (data / "piqa" / "test.json").read_text()
    (data / "piqa" / "test.json").write_text(rows.replace("Which thing 3", "Which cup 3"))
    assert evaluate([run], data=data, benchmarks=["piqa"], out=tmp_path / "one").questions_sha256 != first


def test_each_adapters_scores_are_those_of_the_base_with_its_update_added(run, data, tiny_model_dir):
    """Dense weights W + scale B A, one adapter at a time, against the pack."""
    evaluate([run], data=data, benchmarks=["openbookqa"])
    asked = read_questions(data, find_benchmarks(["openbookqa"])[0])
    adapters = [adapter(seed, tiny_model_dir) for seed in range(3)]
    variants = {f"adapter-{i:02d}": a for i, a in enumerate(adapters)} | {"merged": average(adapters)}
    seen = []
    for variant, each in variants.items():
        model, tokenizer = load_base(str(tiny_model_dir), device=torch.device("cpu"))
        for path, f in each.modules.items():
            model.get_submodule(path).weight.add_(f.scale * f.B @ f.A)
        expected = score_labels(model, prepare(asked, tokenizer, prompt="bare"))[0]
        found = torch.tensor([list(x["log_probs"].values()) for x in lines(run / "eval" / f"{variant}.jsonl")])
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
    assert results.questions == {"piqa": 5}
    assert results.prompt == "clean"
    alone = evaluate([run / "adapters" / "01"], data=data, benchmarks=["piqa"], out=tmp_path / "alone", limit=5)
    assert alone.merged is alone.ensemble is None
    assert alone.comparisons == {}
    assert alone.adapters["01"] == results.adapters["01"]


@pytest.mark.parametrize("protocol", ["label", "harness"])
def test_without_a_merge_the_exact_average_is_scored_as_the_merge(run, data, tmp_path, protocol):
    asked = dict(data=data, benchmarks=["piqa", "openbookqa"], protocol=protocol)
    merged = evaluate([run], **asked, out=tmp_path / "with")  # its merge is the exact average
    shutil.move(run / "merged", tmp_path / "merged")
    averaged = evaluate([run], **asked, out=tmp_path / "without")
    assert averaged.exact_average
    assert not merged.exact_average
    assert (averaged.merged_adapters, merged.merged_adapters) == (3, None)  # no merge.json tells
    assert averaged.model_copy(update={"exact_average": False, "merged_adapters": None}) == merged
    assert Results.read(tmp_path / "without" / "results.json") == averaged
    assert "exact average of the 3 adapters" in " ".join(notes(averaged))
    summary = json.loads((tmp_path / "without" / "merged.json").read_text())
    assert (summary["source"], summary["adapter_digest"]) == (None, None)
    loose = evaluate([run / "adapters" / f"{i:02d}" for i in range(3)], **asked, prompt="bare", out=tmp_path / "loose")
    assert loose == averaged


def test_what_was_scored_is_written_beside_its_accuracy(run, data):
    evaluate([run], data=data, benchmarks=["piqa"])
    for variant, folder in {"adapter-01": run / "adapters" / "01", "merged": run / "merged"}.items():
        summary = json.loads((run / "eval" / f"{variant}.json").read_text())
        assert summary["adapter_digest"] == adapter_digest(folder)
        assert summary["settings"]["dtype"] == "float32"


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
    by_lm_eval = evaluate([run], data=data, benchmarks=["piqa"], protocol="harness")
    assert by_lm_eval.too_long == results.too_long
    assert "PIQA: 4 of 12 questions do not fit the model's context and were cut" in " ".join(notes(by_lm_eval))


@pytest.mark.parametrize("protocol", ["label", "generate"])
def test_an_evaluation_in_which_no_question_fits_is_reported(run, data, protocol):
    path = data / "piqa" / "test.json"
    rows = json.loads(path.read_text())
    for row in rows:
        row["instruction"] = "wood " * 300 + row["instruction"]
    path.write_text(json.dumps(rows))
    evaluate([run], data=data, benchmarks=["piqa"], protocol=protocol, subsets=protocol == "label", out=run / "none")
    found = Results.read(run / "none" / "results.json")
    assert found.base.average.value == 0
    said = " ".join(notes(found))
    assert "12 of 12 questions do not fit" in said
    assert "nan" not in said


def test_an_adapter_of_another_base_is_refused(run, data):
    write_adapter(adapter(9, "other", targets={"model.layers.0.self_attn.q_proj": (16, 16)}), run / "adapters" / "03")
    with pytest.raises(AdapterError, match="q_proj"):
        evaluate([run], data=data, benchmarks=["piqa"])


def test_what_cannot_be_done_leaves_earlier_results_as_they_are(run, data, tmp_path, tiny_model_dir):
    evaluate([run], data=data, benchmarks=["piqa"], limit=3)
    evaluate([run], data=data, benchmarks=["piqa"], limit=3, protocol="harness")
    before = {path: path.read_bytes() for path in run.glob("eval*/*") if path.is_file()}
    write_adapter(adapter(9, "other", targets={"model.layers.0.self_attn.q_proj": (16, 16)}), run / "adapters" / "03")
    for protocol in ("label", "harness"):
        with pytest.raises(AdapterError, match="q_proj"):
            evaluate([run], data=data, benchmarks=["piqa"], protocol=protocol)
    assert {path: path.read_bytes() for path in before} == before


def test_a_file_in_place_of_the_results_folder_is_refused_before_a_model_is_loaded(run, data, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for out in (tmp_path / "notes.txt", tmp_path / "notes.txt" / "eval"):
        with pytest.raises(RequestError, match=r"(a file stands where|Not a directory)[\s\S]*notes.txt"):
            evaluate([run], data=data, benchmarks=["piqa"], out=out, base="/no/such/base")


def test_a_narrower_evaluation_keeps_the_answers_of_a_wider_one(run, data, monkeypatch):
    wide = evaluate([run], data=data, benchmarks=["piqa", "openbookqa"])
    narrow = evaluate([run], data=data, benchmarks=["openbookqa"], limit=2)
    assert narrow.questions == {"openbookqa": 2}
    assert narrow == Results.read(run / "eval" / "results.json")
    kept = lines(run / "eval" / "adapter-00.jsonl")
    assert len(kept) == 24
    assert [(x["benchmark"], x["row"]) for x in kept[:3]] == [("openbookqa", 1), ("openbookqa", 2), ("piqa", 1)]
    monkeypatch.setattr(evaluator, "label_answers", None)  # is not called again
    assert evaluate([run], data=data, benchmarks=["piqa", "openbookqa"]) == wide


def test_scores_that_are_not_numbers_are_an_error(run, data, tiny_model_dir):
    write_adapter(adapter(9, tiny_model_dir, size=1e18), run / "adapters" / "03")
    with pytest.raises(AdapterError, match="not numbers"):
        evaluate([run], data=data, benchmarks=["piqa"])
    assert not (run / "eval" / "results.json").exists()


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"limit": 0}, RequestError, "limit is 0"),
        ({"prompt": "fancy"}, RequestError, "no prompt template"),
        ({"base": "/no/such/base"}, ModelError, "/no/such/base"),
        ({"benchmarks": None}, DataError, "social_i_qa is missing"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused(run, data, change, error, said):
    with pytest.raises(error, match=said):
        evaluate([run], **({"data": data, "benchmarks": ["piqa"]} | change))


CHOICES = [
    {"question": "Where is the hat?", "choices": ["in the old hall", "under a cup of wool", "shed"], "answer": 2},
    {"question": "What is old?", "choices": ["the hat", "a cup that is kept in the dark shed"], "answer": "the hat"},
    {"prompt": "The glass is made of", "choices": ["wool", "dark wood \u2014 old", "glass"], "answer": 1},
]


def test_the_results_say_how_many_adapters_were_merged(run, data):
    assert evaluate([run], data=data, benchmarks=["piqa"]).merged_adapters is None  # there is no merge.json
    shutil.rmtree(run / "merged")
    assert evaluate([run], data=data, benchmarks=["piqa"]).merged_adapters == 3  # the exact average
    merge_folders([run], run / "merged", leave_out=[run / "adapters" / "01"])
    assert evaluate([run], data=data, benchmarks=["piqa"]).merged_adapters == 2
    assert Results.read(run / "eval" / "results.json").merged_adapters == 2
    one = evaluate([run / "adapters" / "01"], data=data, benchmarks=["piqa"], out=run / "one")
    assert (one.merged, one.merged_adapters) == (None, None)


@pytest.fixture
def own(data):
    """A benchmark beside the eight: rows with choices, in JSON lines."""
    (data / "quiz").mkdir()
    (data / "quiz" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHOICES * 3))
    return data


def test_a_benchmark_beside_the_eight_is_scored_with_them(run, own):
    results = evaluate([run], data=own)
    assert list(results.questions.items()) == [("piqa", 12), ("openbookqa", 12), ("quiz", 9)]
    assert results.chance["quiz"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 3) / 3)
    assert list(results.merged.per_byte) == ["quiz"]
    given = [x for x in lines(run / "eval" / "merged.jsonl") if x["benchmark"] == "quiz"]
    per_byte = [max(x["log_probs"], key=lambda text, x=x: x["log_probs"][text] / len(text.encode())) for x in given]
    right = [choice == x["answer"] for choice, x in zip(per_byte, given, strict=True)]
    assert results.merged.per_byte["quiz"].value == pytest.approx(sum(right) / 9)
    own_values = [scored.per_byte["quiz"].value for scored in results.adapters.values()]
    assert results.average.per_byte["quiz"].value == pytest.approx(sum(own_values) / 3)
    assert Results.read(run / "eval" / "results.json") == results


@pytest.mark.parametrize("protocol", ["generate", "harness"])
def test_free_choices_are_not_asked_by_protocols_of_labels(run, own, protocol):
    with pytest.raises(RequestError, match="--protocol label"):
        evaluate([run], data=own, protocol=protocol)


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
        Results.read(tmp_path / "results.json")


def test_questions_that_were_answered_are_not_asked_again(run, data, monkeypatch):
    whole = evaluate([run], data=data, benchmarks=["piqa"], subsets=True)
    before = {path.name: path.read_bytes() for path in (run / "eval").glob("*.jsonl")}

    def never(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr(evaluator, "label_answers", never)
    assert evaluate([run], data=data, benchmarks=["piqa"], subsets=True) == whole
    assert {path.name: path.read_bytes() for path in (run / "eval").glob("*.jsonl")} == before
    evaluate([run], data=data, benchmarks=["piqa"], limit=5)  # a part of it
    for change in ({"prompt": "clean"}, {"dtype": "bfloat16"}, {"benchmarks": ["openbookqa"]}):
        with pytest.raises(AssertionError):
            evaluate([run], data=data, **{"benchmarks": ["piqa"], **change})
    write_adapter(adapter(7, "x"), run / "other")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (run / "adapters" / "01" / name).write_bytes((run / "other" / name).read_bytes())
    with pytest.raises(AssertionError):
        evaluate([run], data=data, benchmarks=["piqa"])


def test_a_finished_evaluation_is_read_without_its_base(run, data, monkeypatch):
    first = evaluate([run], data=data, benchmarks=["openbookqa", "piqa"], subsets=True)
    assert list(first.calibration_of_adapters) == ["00", "01", "02"]
    assert first.calibration["best"] == first.calibration_of_adapters[first.best]
    module = sys.modules[evaluate.__module__]

    def refuse(*arguments, **options):
        raise AssertionError("the base was loaded")

    monkeypatch.setattr(module, "load_base_of", refuse)
    assert evaluate([run], data=data, benchmarks=["openbookqa", "piqa"], subsets=True) == first
    assert evaluate([run], data=data, benchmarks=["piqa"]).questions == {"piqa": 12}
    with pytest.raises(AssertionError, match="was loaded"):
        evaluate([run], data=data, benchmarks=["piqa"], prompt="clean")


@pytest.mark.parametrize("protocol", ["label", "generate"])
def test_an_interrupted_evaluation_resumes_to_the_same_results(run, data, tmp_path, monkeypatch, protocol):
    expected = evaluate([run], data=data, benchmarks=["piqa"], protocol=protocol, out=tmp_path / "straight")
    monkeypatch.setattr(evaluator, "QUESTIONS_PER_BATCH", 5)
    calls = []
    answers = evaluator.Protocol.answers

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) in (2, 5, 6):
            signal.raise_signal(signal.SIGINT)  # seen at the next commit
        return answers(*args, **kwargs)

    monkeypatch.setattr(evaluator.Protocol, "answers", interrupted)
    out = tmp_path / "parts"
    for _ in range(3):
        with pytest.raises(Interrupted, match="answers so far are kept"):
            evaluate([run], data=data, benchmarks=["piqa"], protocol=protocol, out=out)
        assert not (out / "results.json").exists()
    found = evaluate([run], data=data, benchmarks=["piqa"], protocol=protocol, out=out)
    assert len(calls) == 9  # three parts for each of merge, base and pack: none was asked twice
    assert found == expected
    assert not list(out.glob("*.part-*"))


def test_generated_answers_have_no_ensemble_and_count_those_without_a_label(run, data):
    results = evaluate([run], data=data, benchmarks=["piqa"], protocol="generate")
    assert results.ensemble is None
    assert set(results.unread) == {"base", "merged", "adapter-00", "adapter-01", "adapter-02"}
    for variant, share in results.unread.items():
        found = lines(run / "eval-generate" / f"{variant}.jsonl")
        assert share == pytest.approx(sum(x["choice"] is None for x in found) / 12)
        assert all(isinstance(x["text"], str) for x in found)
    assert Results.read(run / "eval-generate" / "results.json") == results
    assert "no label was found" in " ".join(notes(results))


def test_the_best_adapter_is_chosen_on_validation_questions_where_there_are_some(run, data):
    chosen = evaluate([run], data=data, benchmarks=["openbookqa"])
    assert chosen.best_chosen_on == "test"
    rows = json.loads((data / "openbookqa" / "test.json").read_text())
    said = {name: lines(run / "eval" / f"adapter-{name}.jsonl") for name in chosen.adapters}
    choices = {name: [x["choice"] for x in answers] for name, answers in said.items()}
    best = []
    for name, own in choices.items():  # validation answers that are one adapter's own choices
        validation = [row | {"answer": choice} for row, choice in zip(rows, own, strict=True)]
        (data / "openbookqa" / "validation.json").write_text(json.dumps(validation))
        results = evaluate([run], data=data, benchmarks=["openbookqa"])
        assert results.best_chosen_on == "validation"
        assert choices[results.best] == own
        assert results.questions == {"openbookqa": 12}
        assert results.adapters == chosen.adapters
        assert len(lines(run / "eval" / f"adapter-{name}.jsonl")) == 24
        assert len(lines(run / "eval" / "merged.jsonl")) == 12
        best.append(results.best)
    assert evaluate([run], data=data, benchmarks=["openbookqa"], subsets=True).best_chosen_on == "validation"
    assert len(set(best)) > 1
    assert "on validation questions" in " ".join(notes(results))


def test_the_merge_is_scored_truncated_to_ranks(run, data, tmp_path):
    results = evaluate([run], data=data, benchmarks=["openbookqa"], merge_ranks=[2, 4])
    assert [one.rank for one in results.truncated] == [2, 4]
    assert results.merged_rank == 6
    for one in results.truncated:
        folder = tmp_path / f"rank{one.rank}"
        report = merge_folders(run / "merged", folder, rank=one.rank)
        alone = evaluate(folder, data=data, benchmarks=["openbookqa"], prompt="bare", out=tmp_path / "alone")
        assert (one.benchmarks, one.average) == (alone.average.benchmarks, alone.average.average)
        given, expected = (
            lines(run / f"eval/rank-{one.rank}.jsonl"),
            lines(tmp_path / f"alone/adapter-{folder.name}.jsonl"),
        )
        for ours, theirs in zip(given, expected, strict=True):
            assert ours["log_probs"] == pytest.approx(theirs["log_probs"], abs=1e-4)
        assert one.error == pytest.approx(max(module.error for module in report.modules.values()), abs=1e-6)
        assert one.bytes == tensor_bytes(folder)
        gap = one.average.value - results.merged.average.value
        assert one.difference.value == pytest.approx(gap)
        assert one.difference.low <= gap <= one.difference.high
        assert VariantScores.read(run / f"eval/rank-{one.rank}.json").average.accuracy == one.average.value
    assert results.merged_bytes == tensor_bytes(run / "merged")
    shutil.rmtree(run / "merged")  # then of the exact average
    again = evaluate([run], data=data, benchmarks=["openbookqa"], merge_ranks=[2, 4])
    assert (again.merged_rank, again.merged_bytes) == (results.merged_rank, results.merged_bytes)
    for one, two in zip(again.truncated, results.truncated, strict=True):
        assert one.error == pytest.approx(two.error)
        assert one.model_copy(update={"error": two.error}) == two


def tensor_bytes(folder):
    """The bytes of an adapter's file without its header."""
    raw = (folder / "adapter_model.safetensors").read_bytes()
    return len(raw) - 8 - int.from_bytes(raw[:8], "little")


def test_ranks_added_later_are_all_that_is_asked(run, data, monkeypatch):
    first = evaluate([run], data=data, benchmarks=["openbookqa"], merge_ranks=[2])
    asked = []
    answers = evaluator.Evaluator.answer_batches

    def counted(self, names, items):
        asked.extend(names if items else [])
        return answers(self, names, items)

    monkeypatch.setattr(evaluator.Evaluator, "answer_batches", counted)
    results = evaluate([run], data=data, benchmarks=["openbookqa"], merge_ranks=[1, 2, 4])
    assert asked == ["rank-1", "rank-4"]
    assert results.truncated[1] == first.truncated[0]


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([0], "0"),
        ([4, 2], "increas"),
        ([2, 2], "increas"),
        ([2, 7], "the merge has rank 6"),
        (range(1, 66), "65 ranks"),
    ],
)
def test_ranks_that_the_merge_cannot_have_are_refused(run, data, ranks, expected):
    with pytest.raises(RequestError, match=expected) as problem:
        evaluate([run], data=data, benchmarks=["openbookqa"], merge_ranks=ranks)
    assert problem.value.where == "--ranks"
    assert problem.value.fix


def test_ranks_need_a_merge_and_a_protocol_that_scores_it(run, data, tmp_path):
    with pytest.raises(RequestError, match="no merge to truncate"):
        evaluate(run / "adapters/00", data=data, benchmarks=["openbookqa"], merge_ranks=[2], out=tmp_path / "one")
    with pytest.raises(RequestError, match="label or generate"):
        evaluate([run], data=data, benchmarks=["openbookqa"], merge_ranks=[2], protocol="harness")


def test_subsets_may_be_scored_on_the_first_questions(run, data):
    few = evaluate([run], data=data, benchmarks=["openbookqa"], limit=4, subsets=True).subsets
    found = evaluate([run], data=data, benchmarks=["openbookqa"], subsets=True, subset_limit=4)
    assert found.subsets == few.model_copy(update={"limit": 4})
    assert found.questions == {"openbookqa": 12}
    assert any("on the first 4 questions of each benchmark" in note for note in notes(found))


def test_subsets_are_the_merges_of_their_members(run, data, tmp_path, tiny_model_dir):
    results = evaluate([run], data=data, benchmarks=["openbookqa"], subsets=True)
    assert [point.m for point in results.subsets.points] == [1, 2, 3]
    (pair,) = [path for path in (run / "eval" / "subsets").iterdir() if path.name.startswith("2-")][:1]
    members = [int(name) for name in pair.stem.split("-")[1:]]
    both = average([adapter(seed, tiny_model_dir) for seed in members])
    write_adapter(dataclasses.replace(both, base_model=str(tiny_model_dir)), tmp_path / "both")
    evaluate([tmp_path / "both"], data=data, benchmarks=["openbookqa"], prompt="bare", out=tmp_path / "alone")
    for ours, theirs in zip(lines(pair), lines(tmp_path / "alone" / "adapter-both.jsonl"), strict=True):
        assert list(ours["log_probs"].values()) == pytest.approx(list(theirs["log_probs"].values()), abs=1e-4)
    assert "at least five adapters" in " ".join(notes(results))
    whole = lines(run / "eval" / "subsets" / "3-00-01-02.jsonl")
    for ours, theirs in zip(whole, lines(run / "eval" / "merged.jsonl"), strict=True):
        assert list(ours["log_probs"].values()) == pytest.approx(list(theirs["log_probs"].values()), abs=1e-4)
    long = [run / "adapters" / f"{i:02d}".ljust(120, "x") for i in range(3)]
    for i, folder in enumerate(long):
        shutil.copytree(run / "adapters" / f"{i:02d}", folder)
    loose = evaluate(long, data=data, benchmarks=["openbookqa"], subsets=True, prompt="bare", out=tmp_path / "long")
    assert loose.subsets.points == results.subsets.points
    with pytest.raises(RequestError, match="need the protocol label"):
        evaluate([run], data=data, benchmarks=["piqa"], subsets=True, protocol="generate")


def test_another_runs_merge_is_a_control(run, data, tmp_path, tiny_model_dir):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    config = yaml.safe_load((other / "config.yaml").read_text()) | {"optim": {"temperature": 0.0}}
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(RunError, match="the control run has no evaluated merge"):
        evaluate([run], data=data, benchmarks=["piqa"], control=other)
    evaluate([other], data=data, benchmarks=["piqa"], limit=3)
    with pytest.raises(RunError, match="did not answer piqa, row 4"):
        evaluate([run], data=data, benchmarks=["piqa"], control=other)
    theirs = evaluate([other], data=data, benchmarks=["piqa"])
    results = evaluate([run], data=data, benchmarks=["piqa"], control=other)
    assert results.control == theirs.merged == results.merged  # the same adapters
    assert results.control_name == "λ = 0"
    assert results.comparisons["control"].value == 0
    assert Results.read(run / "eval" / "results.json") == results
    for change, said in (
        ({"prompt": "clean"}, "prompt 'bare' in place of 'clean'"),
        ({"dtype": "bfloat16"}, "dtype 'float32' in place of 'bfloat16'"),
        ({"base": str(shutil.copytree(tiny_model_dir, tmp_path / "copy"))}, "base '"),
    ):
        with pytest.raises(RunError, match=said):
            evaluate([run], data=data, benchmarks=["piqa"], control=other, **change)
    config["model"]["quantization"] = "nf4"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(RunError, match="quantization None in place of 'nf4'"):
        evaluate([run], data=data, benchmarks=["piqa"], control=other)
    evaluate([other], data=data, benchmarks=["piqa"], protocol="generate", beams=2, limit=1)
    config["model"]["quantization"] = None
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(RunError, match="beams 2 in place of 1"):
        evaluate([run], data=data, benchmarks=["piqa"], protocol="generate", limit=1, control=other)
    rows = json.loads((data / "piqa" / "test.json").read_text())
    rows[1]["instruction"] = "And " + rows[1]["instruction"]
    (data / "piqa" / "test.json").write_text(json.dumps(rows))
    with pytest.raises(RunError, match="row 2, or that question has changed"):
        evaluate([run], data=data, benchmarks=["piqa"], control=other)


def test_a_run_on_a_quantised_base_is_scored_on_it(run, data):
    plain = evaluate([run], data=data, benchmarks=["openbookqa"])
    before = lines(run / "eval" / "base.jsonl")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["quantization"] = "nf4"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert evaluate([run], data=data, benchmarks=["openbookqa"]).questions == plain.questions
    after = lines(run / "eval" / "base.jsonl")
    assert [x["key"] for x in after] != [x["key"] for x in before]
    assert [x["log_probs"] for x in after] != [x["log_probs"] for x in before]


def test_lm_eval_gives_the_same_table(run, data):
    ours = evaluate([run], data=data, benchmarks=["piqa", "openbookqa"])
    theirs = evaluate([run], data=data, benchmarks=["piqa", "openbookqa"], protocol="harness")
    assert (theirs.protocol, theirs.prompt) == ("harness", "bare")
    assert theirs.adapters == ours.adapters
    assert (theirs.base, theirs.merged, theirs.ensemble) == (ours.base, ours.merged, ours.ensemble)
    assert theirs.comparisons == ours.comparisons
    assert Results.read(run / "eval-harness" / "results.json") == theirs
    found = json.loads((run / "eval-harness" / "harness" / "merged" / "results.json").read_text())
    assert found["results"]["poc_lora_piqa"]["acc,none"] == pytest.approx(theirs.merged.benchmarks["piqa"].value)
    for change in ({"control": run}, {"subsets": True}, {"data": None, "protocol": "label"}):
        with pytest.raises(RequestError):
            evaluate([run], **{"data": data, "benchmarks": ["piqa"], "protocol": "harness", **change})


@pytest.mark.parametrize(
    ("change", "said"),
    [({"protocol": "harnes"}, "no protocol"), ({"beams": 4}, "beams"), ({"beams": 0, "protocol": "generate"}, "beams")],
)
def test_an_unknown_protocol_is_refused(run, data, change, said):
    with pytest.raises(RequestError, match=said):
        evaluate([run], data=data, benchmarks=["piqa"], **change)


def test_questions_that_name_a_group_are_sampled_by_groups(run, data):
    alone = evaluate([run], data=data, benchmarks=["piqa", "openbookqa"])
    assert alone.groups == {}
    rows = json.loads((data / "piqa" / "test.json").read_text())
    for i, row in enumerate(rows):
        row["group"] = i // 4
    (data / "piqa" / "test.json").write_text(json.dumps(rows))
    grouped = evaluate([run], data=data, benchmarks=["piqa", "openbookqa"])
    assert grouped.groups == {"piqa": 3}
    for one, other in ((grouped.base, alone.base), (grouped.merged, alone.merged)):
        assert one.average.value == other.average.value
        assert one.benchmarks["openbookqa"] == other.benchmarks["openbookqa"]
    assert grouped.base.benchmarks["piqa"].error != alone.base.benchmarks["piqa"].error
    assert grouped.calibration["base"].nll.value == alone.calibration["base"].nll.value
    assert grouped.calibration["base"].nll.error != alone.calibration["base"].nll.error
    assert "PIQA: errors and intervals take the 3 groups of its 12 questions as the samples." in notes(grouped)


def test_answers_that_cannot_be_read_back_are_an_error(run, data, monkeypatch):
    monkeypatch.setattr(AnswerFile, "append", lambda *args: None)
    with pytest.raises(RunError, match=r"12 answers cannot be read back[\s\S]*base.jsonl"):
        evaluate([run], data=data, benchmarks=["piqa"])


def test_lm_eval_is_stopped_as_the_other_protocols_are(run, data, monkeypatch):
    scored = harness.score_tasks

    def stopped(*args, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        return scored(*args, **kwargs)

    monkeypatch.setattr(harness, "score_tasks", stopped)
    with pytest.raises(Interrupted, match="lm-eval"):
        evaluate([run], data=data, benchmarks=["piqa"], protocol="harness")


@pytest.mark.skipif(not REAL.is_dir(), reason="the real benchmarks are not here")
def test_the_eight_real_benchmarks_are_scored(run):
    results = evaluate([run], data=REAL, limit=3)
    assert len(results.questions) == 8
    assert set(results.questions.values()) == {3}


@pytest.mark.parametrize("protocol", ["label", "generate", "harness"])
def test_a_token_without_an_embedding_is_named_before_anything_runs(run, data, padded_model_dir, protocol):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["name"] = str(padded_model_dir)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    path = data / "piqa" / "test.json"
    rows = json.loads(path.read_text())
    rows[3]["instruction"] = f"[PAD] {rows[3]['instruction']}"
    path.write_text(json.dumps(rows))
    with pytest.raises(ModelError, match=r"'\[PAD\]', is beyond the base model's \d+ embeddings"):
        evaluate([run], data=data, benchmarks=["piqa"], protocol=protocol)
    assert not list(run.glob("eval*/results.json"))
    rows[3]["instruction"] = rows[3]["instruction"].removeprefix("[PAD] ")
    path.write_text(json.dumps(rows))
    evaluate([run], data=data, benchmarks=["piqa"], protocol=protocol)
