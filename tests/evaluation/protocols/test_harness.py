"""lm-eval over one loaded base: it chooses what the label protocol chooses, and leaves everything as it was."""

import importlib.util
import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from poc_lora.adapters.adapter import Adapter
from poc_lora.adapters.factors import Factors
from poc_lora.data.commonsense import BENCHMARKS, BY_FOLDER, find_benchmarks
from poc_lora.data.questions import read_questions
from poc_lora.errors import AdapterError, DataError, Interrupted, ModelError, RequestError
from poc_lora.evaluation import scores
from poc_lora.evaluation.answers import Item
from poc_lora.evaluation.protocols.harness import harness_answers, score_tasks
from poc_lora.evaluation.protocols.harness_tasks import TASKS_FOLDER, load_tasks, local_task
from poc_lora.evaluation.protocols.label import context_of, label_answers, prepare, score_labels
from poc_lora.evaluation.variants import Variants
from poc_lora.lora.bank import AdapterBank
from poc_lora.models.load import context_length, load_base
from tests.conftest import build_llama, build_tokenizer, instruction_rows

pytest.importorskip("lm_eval")

# Labels of one token and of several, labels that begin other labels, and sets of differing sizes within one file.
LABELS = {
    "social_i_qa": [("answer1", "answer2", "answer3")],
    "openbookqa": [("glass", "dark wood", "wool"), ("a hat kept in the shed", "cup", "old wool hat", "hall")],
    "ARC-Easy": [("answer1", "answer10", "answer"), ("answer1", "answer2", "answer3", "answer4", "answer5")],
    "boolq": [("true", "false")],
}
QUESTIONS = 24


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, sets in LABELS.items():
        rows = []
        for i in range(QUESTIONS):
            labels = sets[i % len(sets)]
            text = f"Which thing {i} is in the hall? {'It is old. ' * (i % 3)}\n\nAnswer format: {'/'.join(labels)}"
            rows.append(
                {
                    "instruction": text,
                    "input": "{{ x }} {y}" * (i % 3 == 0),
                    "output": "",
                    "answer": labels[i % len(labels)],
                }
            )
        (folder / name).mkdir()
        (folder / name / "test.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture
def base(tiny_model_dir):
    return load_base(str(tiny_model_dir), dtype="float32", device=torch.device("cpu"))


def adapter(seed, size=0.3):
    draws = torch.Generator().manual_seed(seed)
    shapes = {"model.layers.0.self_attn.q_proj": (32, 32), "model.layers.1.mlp.up_proj": (32, 48)}
    return Adapter(
        {
            path: Factors(
                size * torch.randn(2, d_in, generator=draws), size * torch.randn(d_out, 2, generator=draws), 2.0
            )
            for path, (d_in, d_out) in shapes.items()
        }
    )


def variants(adapters, out, merged=None):
    return Variants("base", None, "float32", None, "clean", adapters, merged, out)


def local_tasks(data, prompt="clean", names=tuple(LABELS)):
    return load_tasks(find_benchmarks(names), data=data, prompt=prompt)


def by_label(base, data, name, prompt="clean"):
    model, tokenizer = base
    asked = read_questions(data, find_benchmarks([name])[0])
    prepared = prepare(asked, tokenizer, prompt=prompt, max_length=context_length(model))
    return prepared, score_labels(model, prepared)[0]


def random_state():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002


def check_agreement(base, data, scored, prompt="clean"):
    found, results = scored
    chosen = set()
    for name in LABELS:
        prepared, log_probs = by_label(base, data, name, prompt)
        ours, theirs = log_probs, found[name].log_probs
        assert theirs.shape == ours.shape
        assert theirs.argmax(-1).tolist() == ours.argmax(-1).tolist()
        # lm-eval adds what all labels share, so scores differ by a constant of the question; float32 sums of few terms
        torch.testing.assert_close(theirs.log_softmax(-1), ours.log_softmax(-1), atol=2e-4, rtol=0)
        assert found[name].answers.tolist() == prepared.answers.tolist()
        assert not found[name].truncated.any()
        correct = ((ours.argmax(-1) == prepared.answers) & ~prepared.too_long).double()
        metrics = results["results"][local_task(find_benchmarks([name])[0])]
        assert metrics["acc,none"] == pytest.approx(correct.mean().item())
        assert metrics["acc_stderr,none"] == pytest.approx(scores.mean(correct).error)
        chosen |= {(name, i, c) for i, c in enumerate(theirs.argmax(-1).tolist())}
    return chosen


@pytest.mark.parametrize("prompt", ["clean", "bare"])
def test_the_label_protocol_and_lm_eval_choose_the_same(base, data, prompt):
    """The base, two adapters and their running merge, on every question."""
    model, tokenizer = base
    tasks = local_tasks(data, prompt)
    bank = AdapterBank.from_adapters(model, [adapter(1), adapter(2)])
    seen = []
    for view in (bank.disabled(), bank.only(0), bank.only(1), bank.merged()):
        with view:
            seen.append(check_agreement(base, data, score_tasks(model, tokenizer, tasks), prompt))
    assert len({frozenset(s) for s in seen}) == 4  # four variants that choose differently


CHOICES = ["in the old hall", "under a cup of wool \u2014 and glass", "shed", "the hat that is kept in the dark shed"]


@pytest.mark.parametrize("ascii", [True, False])
@pytest.mark.parametrize("form", ["question", "prompt"])
def test_free_choices_have_lm_evals_accuracies(base, tmp_path, form, ascii):
    """acc, acc_bytes, acc_norm where bytes are characters, and the log-likelihoods themselves."""
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    from poc_lora.evaluation.protocols.harness_model import LoadedModel
    from poc_lora.evaluation.protocols.harness_tasks import quiet_lm_eval

    model, tokenizer = base
    choices = [c.encode("ascii", "ignore").decode() if ascii else c for c in CHOICES]
    rows = [
        {form: f"{'It is old. ' * (i % 3)}Where is thing {i}?", "choices": choices[i % 2 :], "answer": i % 3}
        for i in range(QUESTIONS)
    ]
    (tmp_path / "quiz").mkdir()
    (tmp_path / "quiz" / "test.json").write_text(json.dumps(rows))
    asked = read_questions(tmp_path, find_benchmarks(["quiz"], tmp_path)[0])
    items = [Item("quiz", "test", row, question) for row, question in enumerate(asked, 1)]

    docs = [
        row | {"context": context_of(q, "clean"), "gold": q.answer_index} for row, q in zip(rows, asked, strict=True)
    ]
    (tmp_path / "docs.json").write_text(json.dumps(docs))
    config = {
        "task": "quiz",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "docs.json")}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "target_delimiter": " " if form == "prompt" else "",
        "metric_list": [{"metric": name} for name in ("acc", "acc_norm", "acc_bytes")],
    }
    bank = AdapterBank.from_adapters(model, [adapter(1)])
    for view in (bank.disabled(), bank.only(0)):
        with view, quiet_lm_eval():
            task = TaskManager(include_defaults=False).load([config])["tasks"]["quiz"]
            theirs = evaluate(lm=LoadedModel(model, tokenizer, lambda _: None), task_dict={"tasks": {"quiz": task}})
            (ours,) = label_answers(model, tokenizer, asked, prompt="clean")
        given = dict(zip(items, ours, strict=True))
        metrics = theirs["results"]["quiz"]
        assert scores.correct_by_benchmark(items, given)["quiz"].mean().item() == metrics["acc,none"]
        per_byte = scores.correct_per_byte(items, given)["quiz"].mean().item()
        assert per_byte == metrics["acc_bytes,none"]
        assert not ascii or per_byte == metrics["acc_norm,none"]
        for answer, sample in zip(ours, theirs["samples"]["quiz"], strict=True):
            assert answer.log_probs == pytest.approx([value for value, _ in sample["filtered_resps"]], abs=2e-4)


def test_every_thing_is_scored_over_one_base_which_is_given_back(base, data, tmp_path):
    model, tokenizer = base
    pad, modules = tokenizer.pad_token, [type(m) for m in model.modules()]
    adapters = {"00": adapter(1), "01": adapter(2)}
    average = Adapter(
        {
            path: Factors(
                torch.cat([a.modules[path].A for a in adapters.values()]),
                torch.cat([a.modules[path].B for a in adapters.values()], dim=1),
                1.0,  # the adapters' own 2 by 1/2
            )
            for path in adapters["00"].modules
        }
    )
    scored = variants(adapters, tmp_path / "out", average)
    items, found = harness_answers(model, tokenizer, local_tasks(data), scored, data=data, limit=10)
    assert [item.benchmark for item in items] == [name for name in LABELS for _ in range(10)]
    assert set(found) == {"base", "adapter-00", "adapter-01", "merged"}
    assert [type(m) for m in model.modules()] == modules
    assert tokenizer.pad_token == pad is None
    bank = AdapterBank.from_adapters(model, list(adapters.values()))
    views = {"base": bank.disabled, "merged": bank.merged}
    views |= {f"adapter-0{i}": lambda i=i: bank.only(i) for i in range(2)}
    for variant, answers in found.items():
        with views[variant]():
            for name in LABELS:
                _, ours = by_label(base, data, name)
                asked = [item for item in items if item.benchmark == name]
                for item, row in zip(asked, ours[:10], strict=True):
                    theirs = torch.tensor(answers[item].log_probs)
                    expected = row[: len(theirs)].log_softmax(-1)
                    torch.testing.assert_close(theirs.log_softmax(-1), expected, atol=1e-3, rtol=0)
        written = json.loads((tmp_path / "out" / "harness" / variant / "results.json").read_text())
        for name in LABELS:
            task = local_task(find_benchmarks([name])[0])
            asked = [item for item in items if item.benchmark == name]
            right = [float(answers[item].choice == item.question.answer) for item in asked]
            assert written["results"][task]["acc,none"] == pytest.approx(sum(right) / 10)
            assert written["n-samples"][task] == {"original": QUESTIONS, "effective": 10}
            lines = (tmp_path / "out" / "harness" / variant / f"samples_{task}.jsonl").read_text().splitlines()
            samples = [json.loads(line) for line in lines]
            assert [s["doc_id"] for s in samples] == list(range(10))
            assert [s["acc"] for s in samples] == right
            assert float(samples[0]["filtered_resps"][1][0]) == pytest.approx(answers[asked[0]].log_probs[1])


def test_the_same_evaluation_writes_the_same_bytes_and_draws_nothing(base, data, tmp_path):
    model, tokenizer = base
    before = random_state()
    for name in ("one", "two"):
        harness_answers(model, tokenizer, local_tasks(data), variants({"a": adapter(1)}, tmp_path / name), data=data)
    assert random_state() == before
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*.json*"))
    assert len(files) == 2 * (1 + len(LABELS))
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_ties_go_to_the_first_label_in_both_protocols(base, data):
    """With a head of zeros every token is as probable as any other, so that labels of equal length tie exactly."""
    model, tokenizer = base
    model.lm_head.weight.data = torch.zeros_like(model.lm_head.weight)
    chosen = check_agreement(base, data, score_tasks(model, tokenizer, local_tasks(data)))
    assert {c for name, _, c in chosen if name == "social_i_qa"} == {0}


def test_a_tokenizer_that_ends_texts_with_eos_agrees_too(data):
    from tokenizers import processors

    tokenizer = build_tokenizer([row["instruction"] for row in instruction_rows(30)])
    special = [("<s>", 0), ("</s>", 1)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=special
    )
    model = build_llama(len(tokenizer)).requires_grad_(False)
    assert tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id
    check_agreement((model, tokenizer), data, score_tasks(model, tokenizer, local_tasks(data)))


def test_questions_beyond_the_context_are_counted_as_the_label_protocol_counts_them(base, data, tmp_path):
    model, tokenizer = base
    rows = json.loads((data / "boolq" / "test.json").read_text())
    for row, words in zip(rows, range(0, 240, 10), strict=True):
        row["instruction"] = "wood " * words + row["instruction"]
    (tmp_path / "boolq").mkdir()
    (tmp_path / "boolq" / "test.json").write_text(json.dumps(rows))
    prepared, log_probs = by_label(base, tmp_path, "boolq")
    assert 0 < prepared.too_long.sum() < len(rows)
    found, _ = score_tasks(model, tokenizer, local_tasks(tmp_path, names=["boolq"]))
    assert found["boolq"].truncated.tolist() == prepared.too_long.tolist()
    fits = ~prepared.too_long
    assert torch.equal(found["boolq"].log_probs[fits].argmax(-1), log_probs[fits].argmax(-1))
    assert found["boolq"].log_probs.isfinite().all()  # scored, as lm-eval does


def test_scores_that_are_not_numbers_are_an_error(base, data, tmp_path):
    model, tokenizer = base
    tasks = local_tasks(data, names=["boolq"])
    with pytest.raises(AdapterError, match="not numbers"):
        harness_answers(model, tokenizer, tasks, variants({"a": adapter(1, size=1e18)}, tmp_path), data=data)
    assert sorted(p.name for p in (tmp_path / "harness").iterdir()) == ["base"]
    assert not any("Bank" in type(m).__name__ for m in model.modules())
    model.lm_head.weight.data = torch.full_like(model.lm_head.weight, torch.nan)
    with pytest.raises(ModelError, match="not numbers"):
        harness_answers(model, tokenizer, tasks, variants({"a": adapter(1)}, tmp_path), data=data)


def test_a_request_to_stop_is_heeded_between_answers(base, data, tmp_path):
    model, tokenizer = base
    stop = threading.Event()
    stop.set()
    with pytest.raises(Interrupted, match="lm-eval scored base"):
        harness_answers(
            model, tokenizer, local_tasks(data), variants({"a": adapter(1)}, tmp_path), data=data, stop=stop
        )
    assert list(tmp_path.iterdir()) == []
    assert not any("Bank" in type(m).__name__ for m in model.modules())


def test_every_benchmark_has_a_local_task_with_its_questions(tmp_path):
    for b in BENCHMARKS:
        (tmp_path / b.folder).mkdir()
        row = {"instruction": f"{b.folder}? Answer format: x/y", "answer": "y"}
        (tmp_path / b.folder / "test.json").write_text(json.dumps([row]))
    tasks = load_tasks(BENCHMARKS, data=tmp_path)
    assert list(tasks) == [b.folder for b in BENCHMARKS]
    for folder, task in tasks.items():
        assert f"{folder}? Answer format" in task.doc_to_text(task.eval_docs[0])
    assert {path.stem for path in TASKS_FOLDER.glob("*.yaml")} == {
        local_task(b).removeprefix("poc_lora_") for b in BENCHMARKS
    }


# A row of each data set as lm-eval's own tasks read it, whose right answer is the second.
HUB_ROWS = {
    "lighteval/siqa": {"context": "Kim lent Bo a tent.", "question": "Why?", "label": "2"}
    | {f"answer{x}": f"because {x}" for x in "ABC"},
    "baber/piqa": {"goal": "Dry a boot", "sol1": "Stuff it with snow.", "sol2": "Stuff it with paper.", "label": 1},
    "allenai/winogrande": {"sentence": "The cup broke as the _ was thin.", "option1": "hat", "option2": "cup"}
    | {"answer": "2"},
    "allenai/openbookqa": {
        "question_stem": "Ice is",
        "choices": {"text": ["hot", "water", "wood", "wool"], "label": ["A", "B", "C", "D"]},
        "answerKey": "B",
    },
    "allenai/ai2_arc": {
        "question": "Which is a metal?",
        "choices": {"text": ["tar", "tin", "tea"], "label": ["1", "2", "3"]},
        "answerKey": "2",
    },
    "aps/super_glue": {"question": "is snow white", "passage": "Snow is a form of ice.", "label": 1},
    "Rowan/hellaswag": {
        "activity_label": "Cooking",
        "ctx_a": "A man cuts an onion.",
        "ctx_b": "he",
        "endings": ["flies.", "cries.", "dries.", "fries."],
        "label": "1",
    },
}


@pytest.mark.slow
def test_lm_evals_own_tasks_are_scored_by_their_own_rules(base, monkeypatch):
    import datasets

    def on_the_hub(path, **_):
        rows = datasets.Dataset.from_list([HUB_ROWS[path]] * 3)
        return datasets.DatasetDict(train=rows, validation=rows, test=rows)

    monkeypatch.setattr(datasets, "load_dataset", on_the_hub)
    model, tokenizer = base
    before = random_state()
    tasks = load_tasks(BENCHMARKS, data=None)
    assert [task.config.task for task in tasks.values()] == [b.lm_eval for b in BENCHMARKS]
    found, results = score_tasks(model, tokenizer, tasks, limit=2)
    assert random_state() == before
    for folder, scored in found.items():
        assert scored.answers.tolist() == [1, 1]
        correct = scored.log_probs.argmax(-1) == scored.answers
        metrics = results["results"][BY_FOLDER[folder].lm_eval]
        assert metrics["acc,none"] == correct.double().mean().item(), folder
        assert results["n-shot"][BY_FOLDER[folder].lm_eval] == 0
    assert {f.log_probs.shape[1] for f in found.values()} == {2, 3, 4}
    assert "acc_norm,none" in results["results"]["hellaswag"]


def test_lm_evals_own_tasks_without_a_network_are_a_clear_error():
    with pytest.raises(DataError, match=r"'piqa'[\s\S]*Hub[\s\S]*--data"):
        load_tasks(find_benchmarks(["piqa"]), data=None)


def test_a_missing_library_is_named_with_its_remedy(data, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else find_spec(name, *a)
    )
    with pytest.raises(RequestError, match=r"pip install 'poc-lora\[harness\]'"):
        local_tasks(data)


def test_the_module_imports_no_lm_eval():
    module = "poc_lora.evaluation.protocols.harness"
    code = f"import {module}, sys; sys.exit('lm_eval' in sys.modules or 'datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_bad_requests_are_refused(data, tmp_path):
    with pytest.raises(DataError, match="piqa is missing"):
        local_tasks(data, names=["piqa"])
    with pytest.raises(RequestError, match="no prompt template"):
        local_tasks(data, prompt="fancy")


def lm_eval(*arguments):
    root = Path(__file__).parents[3]
    return subprocess.run(
        [sys.executable, "-m", "lm_eval", "--include_path", TASKS_FOLDER, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )


@pytest.mark.slow
def test_the_tasks_run_from_lm_evals_command_line(base, data, tiny_model_dir, tmp_path):
    done = lm_eval(
        *["--model", "hf", "--model_args", f"pretrained={tiny_model_dir},dtype=float32", "--device", "cpu"],
        *["--tasks", "poc_lora_siqa,poc_lora_obqa", "--metadata", json.dumps({"data": str(data)})],
        *["--output_path", tmp_path, "--log_samples"],
    )
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.rglob("results_*.json")
    results = json.loads(file.read_text())["results"]
    for task, name in {"poc_lora_siqa": "social_i_qa", "poc_lora_obqa": "openbookqa"}.items():
        prepared, log_probs = by_label(base, data, name)
        accuracy = ((log_probs.argmax(-1) == prepared.answers) & ~prepared.too_long).double().mean().item()
        assert results[task]["acc,none"] == pytest.approx(accuracy)


@pytest.mark.slow
def test_lm_evals_command_line_is_told_what_is_missing(tiny_model_dir):
    done = lm_eval("--model_args", f"pretrained={tiny_model_dir}", "--device", "cpu", "--tasks", "poc_lora_siqa")
    assert done.returncode != 0
    assert "--metadata" in done.stderr
