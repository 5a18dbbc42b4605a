"""Any task of lm-eval over one loaded base: the numbers of lm-eval's own model with a PEFT adapter."""

import json
import math
import random
import shutil
import signal

import numpy as np
import pytest
import torch
import yaml
from tokenizers import processors

from poc_lora.adapters.adapter import write_adapter
from poc_lora.artifacts.task_scores import TaskResults
from poc_lora.errors import AdapterError, DataError, Interrupted, RequestError
from poc_lora.evaluation import tasks as module
from poc_lora.evaluation.scores import paired_difference
from poc_lora.evaluation.tasks import evaluate_tasks
from poc_lora.evaluation.variants import adapter_digest
from poc_lora.models.load import load_tokenizer
from tests.conftest import build_llama, build_tokenizer, instruction_rows
from tests.evaluation import test_evaluate
from tests.evaluation.test_evaluate import adapter

pytest.importorskip("lm_eval")

run = test_evaluate.run  # the fixture
WORDS = ["hall", "old wool hat", "dark wood", "glass cup", "shed", "a hat kept in the shed"]
DOCUMENTS = 12


@pytest.fixture(autouse=True)
def few_tasks(monkeypatch, tmp_path):
    """lm-eval's own folder of tasks takes ten seconds to read; and its data sets a network."""
    from lm_eval.tasks import TaskManager

    whole = TaskManager.__init__
    monkeypatch.setattr(TaskManager, "__init__", lambda self, **given: whole(self, **given, include_defaults=False))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    """YAML files of tasks of every kind, on JSON files beside them."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    docs = [
        {
            "question": f"Where is thing {i}? {'It is old. ' * (i % 3)}",
            "choices": WORDS[i % 3 : i % 3 + 3],
            "gold": i % 3,
            "answer": WORDS[i % 6],
            "text": f"The {WORDS[i % 6]} is old. " * (1 + 9 * (i % 4)),  # some are longer than the context
        }
        for i in range(DOCUMENTS)
    ]
    for name, rows in {"docs": docs, "few": docs[:5], "shots": docs[::-1]}.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))

    def task(name, docs="docs", **config):
        files = {"test": str(folder / f"{docs}.json"), "train": str(folder / "shots.json")}
        described = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": files},
            "training_split": "train",
            "test_split": "test",
            "doc_to_text": "{{question}}",
            "metadata": {"version": 1.5},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(described | config))

    def metrics(*names):
        return [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]

    choice = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "gold"}
    task("quiz_a", **choice, metric_list=metrics("acc", "acc_norm"), tag="quizzes")
    task("quiz_b", docs="few", **choice, metric_list=metrics("acc", "acc_norm"), tag="quizzes", num_fewshot=2)
    task(
        "written",
        output_type="generate_until",
        doc_to_target="answer",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
        metric_list=metrics("exact_match"),
        filter_list=[
            {"name": "first", "filter": [{"function": "regex", "regex_pattern": "(\\w+)"}, {"function": "take_first"}]},
            {"name": "whole", "filter": [{"function": "take_first"}]},
        ],
    )
    perplexities = [{"metric": name} for name in ("word_perplexity", "bits_per_byte")]
    task("read", output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="text", metric_list=perplexities)
    last = [
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
    ]
    task("last", docs="few", output_type="loglikelihood", doc_to_target=" {{answer}}", metric_list=last)
    group = {"group": "both", "task": ["quiz_a", "quiz_b"], "metadata": {"version": 3}}
    group["aggregate_metric_list"] = [{"metric": "acc", "weight_by_size": True}]
    (folder / "both.yaml").write_text(yaml.safe_dump(group))
    plain = {"group": "plain", "task": ["both", "written"]}
    (folder / "plain.yaml").write_text(yaml.safe_dump(plain))
    return folder


NAMES = ["both", "written", "read", "last"]


@pytest.fixture
def few_resamples(monkeypatch):
    """lm-eval's 100,000 of a perplexity take seconds, of which it has no need here."""
    from lm_eval.api import metrics

    whole = metrics.bootstrap_stderr
    monkeypatch.setattr(metrics, "bootstrap_stderr", lambda f, values, iters: whole(f, values, 2000))


def by_lm_eval(run, folder, peft=None, names=NAMES, *, tokenizer=None, **options):
    """lm-eval's own evaluation with its own model, and PEFT for the adapter."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    base = yaml.safe_load((run / "config.yaml").read_text())["model"]["name"]
    peft = None if peft is None else str(peft)
    model = HFLM(base, dtype="float32", device="cpu", batch_size=4, peft=peft, tokenizer=tokenizer)
    return simple_evaluate(model, tasks=list(names), task_manager=TaskManager(include_path=str(folder)), **options)


def check_equal(ours, variant, theirs):
    for name, task in ours.tasks.items():
        expected = theirs["results"][name]
        keys = {key for key in expected if "," in key and "_stderr" not in key}
        assert task.metrics.keys() == keys, name
        for key, metric in task.metrics.items():
            value, error = variant(metric)
            assert value == pytest.approx(expected[key], rel=1e-4), (name, key)
            their_error = expected[key.replace(",", "_stderr,")]
            assert (math.isnan(error) and their_error == "N/A") or error == pytest.approx(their_error, rel=1e-3)


def streams():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.json*")}


def test_every_variant_has_the_numbers_of_lm_evals_own_model(run, folder, few_resamples, monkeypatch):
    before = streams()
    found = evaluate_tasks([run], NAMES, include_path=folder)
    assert streams() == before
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    check_equal(found, lambda metric: metric.base, by_lm_eval(run, folder))
    check_equal(found, lambda metric: metric.adapters["01"], by_lm_eval(run, folder, run / "adapters" / "01"))
    check_equal(found, lambda metric: metric.merged, by_lm_eval(run, folder, run / "merged"))
    assert list(found.tasks) == ["both", "quiz_a", "quiz_b", "written", "read", "last"]
    assert [task.listed for task in found.tasks.values()] == [True, False, False, True, True, True]
    assert [task.documents for task in found.tasks.values()] == [17, 12, 5, 12, 12, 5]
    assert [task.fewshot for task in found.tasks.values()] == [None, 0, 2, 0, 0, 0]
    assert found.tasks["quiz_a"].version == "1.5"
    assert found.tasks["last"].metrics["perplexity,none"].higher_is_better is False
    assert found.adapter_digests["merged"] == adapter_digest(run / "merged")
    assert set(found.adapter_digests) == {"adapter-00", "adapter-01", "adapter-02", "merged"}
    assert TaskResults.read(run / "eval-tasks" / "tasks.json") == found


@pytest.mark.slow
def test_examples_and_limits_are_those_of_lm_eval(run, folder):
    found = evaluate_tasks([run], ["quiz_*"], include_path=folder, num_fewshot=3, limit=4)
    theirs = by_lm_eval(run, folder, run / "merged", ["quiz_a", "quiz_b"], num_fewshot=3, limit=4)
    check_equal(found, lambda metric: metric.merged, theirs)
    assert [(task.fewshot, task.documents) for task in found.tasks.values()] == [(3, 4), (3, 4)]
    lines = (run / "eval-tasks" / "merged" / "samples_quiz_a.jsonl").read_text().splitlines()
    assert [json.loads(line)["doc_id"] for line in lines] == [0, 1, 2, 3]
    prompts = [sample["arguments"][0][0] for sample in theirs["samples"]["quiz_a"]]
    assert [json.loads(line)["arguments"]["gen_args_0"]["arg_0"] for line in lines] == prompts
    assert prompts[0].count("Where is") == 4


TURNS = "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}</s>{% endfor %}"
PROMPTED = TURNS + "{% if add_generation_prompt %}assistant: {% endif %}"


@pytest.mark.slow
@pytest.mark.parametrize("template", [PROMPTED, TURNS], ids=["prompted", "ends with EOS"])
def test_prompts_in_the_chat_template_are_those_of_lm_eval(run, folder, tiny_model_dir, template):
    change(folder, "quiz_b", description="Answer in a word.")
    (run / "chat_template.jinja").write_text(template)
    names = ["quiz_b", "written", "last"]
    found = evaluate_tasks([run], names, include_path=folder, apply_chat_template=True)
    assert found.apply_chat_template
    tokenizer = load_tokenizer(str(tiny_model_dir), chat_template=template)
    how = {"names": names, "tokenizer": tokenizer, "apply_chat_template": True}
    check_equal(found, lambda metric: metric.base, by_lm_eval(run, folder, **how))
    theirs = by_lm_eval(run, folder, run / "merged", **how)
    check_equal(found, lambda metric: metric.merged, theirs)
    for name in names:
        lines = (run / "eval-tasks" / "merged" / f"samples_{name}.jsonl").read_text().splitlines()
        samples = [json.loads(line) for line in lines]
        prompts = [sample["arguments"][0][0] for sample in theirs["samples"][name]]
        assert [sample["arguments"]["gen_args_0"]["arg_0"] for sample in samples] == prompts
    first = json.loads((run / "eval-tasks" / "merged" / "samples_quiz_b.jsonl").read_text().splitlines()[0])
    prompt = first["arguments"]["gen_args_0"]["arg_0"]
    assert prompt.startswith("system: Answer in a word.</s>user: Where")
    assert prompt.count("</s>assistant: ") == (3 if template == PROMPTED else 2)


@pytest.mark.slow
def test_scores_with_and_without_the_chat_template_are_not_mixed(run, folder, monkeypatch):
    asked, score_task = [], module.score_task
    monkeypatch.setattr(
        module, "score_task", lambda *given, **named: asked.append(given[2].name) or score_task(*given, **named)
    )
    (run / "chat_template.jinja").write_text(PROMPTED)
    plain = evaluate_tasks([run], ["last"], include_path=folder)
    for _ in range(2):
        found = evaluate_tasks([run], ["last"], include_path=folder, apply_chat_template=True)
    assert len(asked) == 2 * 5
    assert (plain.apply_chat_template, found.apply_chat_template) == (False, True)
    assert found.tasks["last"].metrics != plain.tasks["last"].metrics
    (run / "chat_template.jinja").write_text(TURNS)
    evaluate_tasks([run], ["last"], include_path=folder, apply_chat_template=True)
    assert len(asked) == 3 * 5


def test_differences_are_those_of_the_documents(run, folder):
    found = evaluate_tasks([run], ["both"], include_path=folder)
    metric = found.tasks["both"].metrics["acc,none"]
    merged, *others = (
        torch.tensor(
            [
                json.loads(line)["acc"]
                for task in ("quiz_a", "quiz_b")
                for line in (run / "eval-tasks" / variant / f"samples_{task}.jsonl").read_text().splitlines()
            ]
        )
        for variant in ("merged", "base", "adapter-00", "adapter-01", "adapter-02")
    )
    values = [other.mean().item() for other in others[1:]]
    assert metric.best == f"0{values.index(max(values))}"
    rivals = {"base": others[0], "best": others[1 + int(metric.best)], "average": torch.stack(others[1:]).mean(0)}
    assert metric.comparisons.keys() == rivals.keys()
    for name, rival in rivals.items():
        assert metric.comparisons[name] == paired_difference({"all": merged}, {"all": rival}, seed=0)
    assert metric.average.value == pytest.approx(rivals["average"].mean().item())
    assert metric.average.error == pytest.approx(rivals["average"].std().item() / 17**0.5)
    assert found.tasks["quiz_a"].metrics["acc_norm,none"].comparisons.keys() == rivals.keys()


def test_adapters_without_a_merge_and_models_alone(run, folder, tiny_model_dir, tmp_path):
    loose = [run / "adapters" / name for name in ("00", "01")]
    found = evaluate_tasks(loose, ["quiz_a"], include_path=folder, out=tmp_path / "two")
    assert found.exact_average
    assert found.tasks["quiz_a"].metrics["acc,none"].merged is not None
    found = evaluate_tasks(loose[:1], ["quiz_a"], include_path=folder, out=tmp_path / "one")
    metric = found.tasks["quiz_a"].metrics["acc,none"]
    assert (metric.merged, metric.best, list(metric.comparisons)) == (None, "00", ["base"])
    found = evaluate_tasks([tiny_model_dir], ["quiz_a", "read"], include_path=folder, out=tmp_path / "none")
    metric = found.tasks["quiz_a"].metrics["acc,none"]
    assert (metric.average, metric.best, metric.comparisons) == (None, "", {})


class Stopped(Exception):
    pass


def test_an_interrupted_evaluation_resumes_at_its_task(run, folder, monkeypatch, tmp_path):
    whole = evaluate_tasks([run], ["both", "written"], include_path=folder, out=tmp_path / "whole")
    asked, score_task = [], module.score_task

    def stop_at_the_fifth(*given, variant, on_progress, **named):
        asked.append((variant, given[2].name))
        if len(asked) == 5:
            signal.raise_signal(signal.SIGINT)
        return score_task(*given, variant=variant, on_progress=on_progress, **named)

    monkeypatch.setattr(module, "score_task", stop_at_the_fifth)
    out = tmp_path / "parts"
    with pytest.raises(Interrupted, match="adapter-00, quiz_b"):
        evaluate_tasks([run], ["both", "written"], include_path=folder, out=out)
    assert not (out / "tasks.json").exists()
    (out / "base" / "quiz_a.json").write_text("{")  # damaged
    assert evaluate_tasks([run], ["both", "written"], include_path=folder, out=out) == whole
    assert asked[5:7] == [("base", "quiz_a"), ("adapter-00", "quiz_b")]
    assert len(asked) == 5 + 3 * 5 - 4 + 1
    assert files(out) == files(tmp_path / "whole")

    monkeypatch.setattr(module, "load_base_of", None)  # all is known: no model is loaded
    assert evaluate_tasks([run], ["both", "written"], include_path=folder, out=out) == whole
    assert len(asked) == 5 + 3 * 5 - 4 + 1


@pytest.mark.slow
@pytest.mark.parametrize("change", ["documents", "adapter", "filter", "limit"])
def test_what_has_changed_is_asked_again(run, folder, monkeypatch, tiny_model_dir, change):
    evaluate_tasks([run], ["written", "quiz_a"], include_path=folder)
    asked, score_task = [], module.score_task

    def watched(*given, variant, **named):
        asked.append((variant, given[2].name))
        return score_task(*given, variant=variant, **named)

    monkeypatch.setattr(module, "score_task", watched)
    limit, expected = None, {(v, "written") for v in ("base", "adapter-00", "adapter-01", "adapter-02", "merged")}
    if change == "documents":
        docs = json.loads((folder / "docs.json").read_text())
        docs[3]["answer"] = "attic"  # which the quiz has in no prompt, but in a document
        (folder / "docs.json").write_text(json.dumps(docs))
        expected |= {(variant, "quiz_a") for variant, _ in expected}
    elif change == "filter":
        path = folder / "written.yaml"
        path.write_text(path.read_text().replace("(\\w+)", "(\\w\\w+)"))
    elif change == "limit":
        limit = 5
        expected |= {(variant, "quiz_a") for variant, _ in expected}
    else:
        write_adapter(adapter(9, tiny_model_dir), run / "other")
        shutil.copytree(run / "other", run / "adapters" / "01", dirs_exist_ok=True)
        expected = {("adapter-01", "written"), ("adapter-01", "quiz_a")}
    evaluate_tasks([run], ["written", "quiz_a"], include_path=folder, limit=limit)
    assert set(asked) == expected


def refusal(*given, error=RequestError, **named):
    with pytest.raises(error) as caught:
        evaluate_tasks(*given, **named)
    return str(caught.value)


def test_unknown_tasks_are_refused_with_the_nearest(run, folder, monkeypatch):
    monkeypatch.setattr(module, "load_base_of", None)
    assert "did you mean quiz_" in refusal([run], ["quiz_c"], include_path=folder)
    assert "no task, group or tag 'x_*'" in refusal([run], ["x_*"], include_path=folder)
    assert "no task was named" in refusal([run], [], include_path=folder)
    assert "no such folder" in refusal([run], ["quiz_a"], include_path=folder / "none")
    assert "--num-fewshot" in refusal([run], ["quiz_a"], include_path=folder, num_fewshot=-1)
    assert "--limit" in refusal([run], ["quiz_a"], include_path=folder, limit=0)
    assert "has no chat template" in refusal([run], ["quiz_a"], include_path=folder, apply_chat_template=True)
    assert "Duplicate task 'quiz_a'" in refusal([run], ["both", "quiz_a"], include_path=folder, error=DataError)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"dataset_kwargs": {"trust_remote_code": True}}, "quiz_b asks to run code from the Hub"),
        ({"unsafe_code": True}, "quiz_b runs the code that the model writes"),
        ({"doc_to_image": "picture"}, "quiz_b needs pictures"),
    ],
)
@pytest.mark.parametrize("name", ["quiz_b", "both", "plain", "quizzes"])
def test_tasks_that_run_code_of_others_are_refused_by_name(run, folder, monkeypatch, given, said, name):
    """Alone, in a group, in a group of a group, and by a tag; before any data is loaded."""
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", None)
    path = folder / "quiz_b.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | given))
    assert said in refusal([run], [name], include_path=folder)


def test_members_of_a_group_without_metrics_are_listed(run, folder):
    found = evaluate_tasks([run], ["plain"], include_path=folder, limit=2)
    listed = {name: task.listed for name, task in found.tasks.items()}
    assert listed == {"plain": True, "both": True, "quiz_a": False, "quiz_b": False, "written": True}
    assert not found.tasks["plain"].metrics


def change(folder, name, **config):
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | config))


def test_failures_of_a_task_name_it(run, folder, monkeypatch):
    change(folder, "quiz_a", dataset_kwargs={"data_files": {"test": str(folder / "none.json")}})
    assert "cannot load quiz_a" in refusal([run], ["quiz_a"], include_path=folder, error=DataError)
    change(folder, "quiz_b", num_fewshot=50)
    assert "task quiz_b failed: ValueError" in refusal([run], ["quiz_b"], include_path=folder)
    change(folder, "written", generation_kwargs={"until": ["."], "max_gen_toks": 256})
    asked = "generates up to 256 tokens, and the base's context has 256"
    assert asked in refusal([run], ["read", "written"], include_path=folder)
    assert not (run / "eval-tasks").exists()


def test_scores_that_are_not_numbers_are_an_error(run, folder, tiny_model_dir):
    broken = adapter(1, tiny_model_dir)
    for factors in broken.modules.values():
        factors.A.fill_(1e30)
        factors.B.fill_(1e30)
    shutil.rmtree(run / "adapters" / "01")
    write_adapter(broken, run / "adapters" / "01")
    said = refusal([run], ["read"], include_path=folder, error=AdapterError)
    assert "adapter-01 on read" in said
    assert (run / "eval-tasks" / "adapter-00" / "read.json").is_file()
    assert not (run / "eval-tasks" / "adapter-01").exists()


def test_prompts_are_cut_as_lm_eval_cuts_them_and_counted(run, folder):
    docs = json.loads((folder / "few.json").read_text())
    docs[2]["question"] = "wood " * 300 + docs[2]["question"]
    (folder / "few.json").write_text(json.dumps(docs))
    change(folder, "written", dataset_kwargs={"data_files": {n: str(folder / "few.json") for n in ("train", "test")}})
    found = evaluate_tasks([run], ["quiz_b", "written"], include_path=folder)
    check_equal(found, lambda m: m.adapters["02"], by_lm_eval(run, folder, run / "adapters/02", ["quiz_b", "written"]))
    assert [task.truncated for task in found.tasks.values()] == [1, 1]


def test_a_pad_token_without_an_embedding_is_not_used(folder, padded_model_dir, tmp_path):
    found = evaluate_tasks([padded_model_dir], ["written"], include_path=folder, out=tmp_path / "out")
    assert found.tasks["written"].documents == DOCUMENTS


@pytest.mark.parametrize("adds_eos", [False, True])
def test_an_eos_that_the_tokenizer_adds_does_not_end_prompts(adds_eos):
    """What follows such an end is another text. One that is written, as by a chat template, stays."""
    from poc_lora.evaluation.protocols.harness_model import LoadedModel

    tokenizer = build_tokenizer([row["instruction"] for row in instruction_rows(30)])
    texts = ["Where is it?", "Where is the old hat?"]
    plain = tokenizer(texts)["input_ids"]
    if adds_eos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    model = LoadedModel(build_llama(len(tokenizer)), tokenizer, lambda _: None)
    for end, expected in {"": plain, "</s>": [[*ids, 1] for ids in plain]}.items():
        ended = [text + end for text in texts]
        ids, mask = model.tok_batch_encode(ended)
        assert [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)] == expected
        assert mask[0, 0] == 0  # padded on the left
        assert [model.tok_encode(text) for text in ended] == expected
