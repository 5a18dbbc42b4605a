"""The model card: what huggingface_hub reads in it, and that it says nothing that is not known."""

import ast
import dataclasses
import json
import re
import shutil

import pytest
import torch
import transformers
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

from poc_lora.adapters.adapter import Adapter, write_adapter
from poc_lora.adapters.factors import Factors
from poc_lora.artifacts.results import Estimate
from poc_lora.data.commonsense import BY_FOLDER
from poc_lora.errors import AdapterError, RequestError
from poc_lora.hub.card import eval_results_files, model_card
from poc_lora.hub.collect import collect
from poc_lora.hub.usage import usage
from poc_lora.merging.folders import merge_folders
from tests.hub.conftest import change, make_run, small_adapter, some_results, write_results
from tests.reporting.run_folder import task_results


def card(source, **options):
    licence, revision = options.pop("licence", None), options.pop("revision", None)
    return model_card(collect(source, **options), "me/demo", licence=licence, revision=revision)


def loaded(text, tmp_path):
    (tmp_path / "README.md").write_text(text)
    return ModelCard.load(tmp_path / "README.md")


def benchmark(text):
    """The table of how an adapter was made."""
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", text.partition("## Evaluation")[0], flags=re.MULTILINE)
    return {key: value for key, value in rows if key != "---"}


def test_the_library_reads_the_metadata(run, tmp_path):
    data = loaded(card(run, licence="apache-2.0"), tmp_path).data
    assert (data.base_model, data.base_model_relation, data.library_name) == ("org/base", "adapter", "peft")
    assert (data.license, data.pipeline_tag, data.datasets) == ("apache-2.0", "text-generation", ["org/rows"])
    assert data.tags == ["lora", "poc-lora", "merge"]
    assert data.model_name == "demo"
    assert [(r.dataset_type, r.dataset_split, r.metric_type, r.metric_value) for r in data.eval_results] == [
        (f.source, f.split, "accuracy", 81.17) for f in BY_FOLDER.values()
    ]
    assert [r.dataset_config for r in data.eval_results if r.dataset_config] == ["ARC-Challenge", "ARC-Easy"]


def test_metadata_survive_the_library_s_round_trip(run, tmp_path):
    text = card(run)
    read = loaded(text, tmp_path)
    assert yaml.safe_load(read.data.to_yaml()) == yaml.safe_load(text.split("---\n")[1])
    assert str(read).partition("# demo")[2] == text.partition("# demo")[2]


def test_eval_results_are_what_the_library_parses(run):
    files = eval_results_files(collect(run).evaluation)
    entries = [entry for file in files for entry in parse_eval_result_entries(yaml.safe_load(file.content))]
    assert [e.dataset_id for e in entries] == [f.source for f in BY_FOLDER.values()]
    assert {e.value for e in entries} == {81.17}
    assert len({file.path for file in files}) == len({(e.dataset_id, e.task_id) for e in entries}) == 8
    assert all(file.path.startswith(".eval_results/") and file.path.endswith(".yaml") for file in files)


def test_questions_of_ones_own_are_not_given_out_as_a_benchmark_s(tmp_path):
    subject = collect(make_run(tmp_path / "run", real=False))
    text = model_card(subject, "me/demo")
    assert eval_results_files(subject.evaluation) == []
    results = loaded(text, tmp_path).data.eval_results
    assert {r.dataset_type for r in results} == {"custom"}
    assert [r.dataset_name for r in results] == [
        f"400 questions in the format of {f.short}" for f in BY_FOLDER.values()
    ]
    assert "Not the benchmark's own test questions" in text
    assert "Not the benchmark's own test questions" not in card(make_run(tmp_path / "real"))


def test_tasks_of_lm_eval_have_a_table(run):
    found = task_results().model_copy(update={"apply_chat_template": True})
    subject = dataclasses.replace(collect(run), tasks=found)
    text = model_card(subject, "me/demo")
    section = text.partition("## Tasks of lm-eval\n")[2].partition("\n## ")[0]
    lines = section.splitlines()
    assert "|  | documents | base | LoRA (best) | LoRA (average) | PoC merge |" in lines
    assert any(line.startswith("| quiz, 5-shot: acc (strict) ↑ | 40 |") for line in lines)
    assert "- Prompts were in the chat template, with each example as two turns." in lines
    assert "| member" not in section  # of a group
    assert "## Tasks of lm-eval" not in card(run)


def test_a_benchmark_beside_the_eight_is_called_by_its_name(run, tmp_path):
    subject = collect(run)
    before = subject.evaluation
    own = {"my quiz": Estimate(0.5, 0.1)}
    results = before.results.model_copy(
        update={
            name: row.model_copy(update={"benchmarks": row.benchmarks | own})
            for name in ("base", "average", "merged", "ensemble")
            if (row := getattr(before.results, name))
        }
        | {
            "adapters": {
                name: row.model_copy(update={"benchmarks": row.benchmarks | own})
                for name, row in before.results.adapters.items()
            },
            "questions": before.results.questions | {"my quiz": 40},
            "too_long": before.results.too_long | {"my quiz": 0},
            "chance": before.results.chance | {"my quiz": 0.25},
        }
    )
    scored = before.scored.model_copy(update={"benchmarks": before.scored.benchmarks | own})
    subject = dataclasses.replace(subject, evaluation=dataclasses.replace(before, results=results, scored=scored))
    text = model_card(subject, "me/demo")
    assert len(eval_results_files(subject.evaluation)) == 8
    entry = loaded(text, tmp_path).data.eval_results[-1]
    assert (entry.dataset_type, entry.dataset_name, entry.metric_value) == ("custom", "40 questions of my quiz", 50)
    assert "| my quiz |" in text


def test_how_it_was_made_is_what_the_run_says(run):
    text = card(run)
    made = benchmark(text)
    assert made["adapters merged (M)"] == "2"
    assert made["λ (temperature of the noise)"] == "0.0003"
    assert (made["rank"], made["rank and alpha in training"], made["length"]) == ("4", "2 and 4", "7 steps")
    assert (
        made["data"]
        == "[org/rows](https://huggingface.co/datasets/org/rows), `train.jsonl` (SHA-256 `abababababababab`)"
    )
    assert "secret-project" not in text
    assert "the merge of 2 adapters by the average of the products B·A" in text
    shutil.rmtree(run / "merged")
    merge_folders([run / "adapters" / "00"], run / "merged")
    assert "the merge of 1 adapter by the average of the products B·A" in card(run)


@pytest.mark.parametrize(("steps", "said"), [(20, "20 warm-up steps"), ("auto", "warm-up over a tenth of the steps")])
def test_the_warm_up_is_said(run, steps, said):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["optim"]["warmup_steps"] = steps
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert said in benchmark(card(run))["optimizer"]


def test_weights_that_are_not_those_of_the_last_step_are_said(run):
    assert "weights" not in benchmark(card(run))
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["train"] |= {"keep": "best", "validate_every": 2}
    config["data"]["validation"] = 3
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    said = "of each adapter those of lowest validation loss, measured every 2 steps"
    assert benchmark(card(run))["weights kept"] == said
    change(run / "run.json", best_steps={"0": 6, "1": 4})
    assert benchmark(card(run))["weights kept"] == f"{said}: of steps 4 to 6"
    shutil.rmtree(run / "merged")
    merge_folders([run], run / "merged", weights=[0.75, 0.25])
    assert benchmark(card(run))["weights"] == "0.75, 0.25"  # of the merge: another row


def test_files_of_a_folder_are_told_apart(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["train"] = ["secret-project"]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    files = {f"secret-project/{name}/train.json": name * 32 for name in ("ab", "cd")}
    (run / "run.json").write_text(json.dumps({"data_sha256": files}))
    text = card(run)
    assert "`ab/train.json` (SHA-256 `abababababababab`), `cd/train.json`" in benchmark(text)["data"]
    assert "secret-project" not in text


def test_training_without_noise_is_not_called_noisy(run):
    assert "with a noisy AdamW" in card(run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["optim"]["temperature"] = 0.0
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    text = card(run)
    assert "noisy" not in text
    assert benchmark(text)["λ (temperature of the noise)"] == "0"


def test_varied_values_are_all_said_of_the_merge_and_its_own_of_an_adapter(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["adapters"]["vary"] = {"optim.lr": [1e-4, 3e-4], "optim.temperature": [0.0, 1e-5], "lora.alpha": [4.0, 8.0]}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    made = benchmark(card(run))
    assert made["optimizer"].startswith("noisy AdamW, lr 0.0001, 0.0003 by adapter, ")
    assert made["λ (temperature of the noise)"] == "0, 1e-05 by adapter"
    assert made["rank and alpha in training"] == "2 and 4, 8 by adapter"
    quiet, noisy = (benchmark(card(run / "adapters" / name)) for name in ("00", "01"))
    assert quiet["optimizer"].startswith("AdamW, lr 0.0001, ")
    assert noisy["optimizer"].startswith("noisy AdamW, lr 0.0003, ")
    assert (noisy["λ (temperature of the noise)"], noisy["rank and alpha in training"]) == ("1e-05", "2 and 8")


def test_varied_values_are_those_of_the_adapters_that_were_merged(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["adapters"]["vary"] = {"optim.lr": [1e-4, 3e-4], "optim.temperature": [1e-5, 0.0]}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    shutil.rmtree(run / "merged")
    merge_folders([run], run / "merged", leave_out=[run / "adapters" / "00"])
    made = benchmark(card(run))
    assert made["adapters left out"] == "1"
    assert made["optimizer"].startswith("AdamW, lr 0.0003, ")
    assert made["λ (temperature of the noise)"] == "0"


def test_the_table_and_its_row_are_those_of_the_adapter(run):
    assert "| PoC merge | **81.17 ± 1.00** |" in card(run)
    assert "This adapter is the row `PoC merge`." in card(run)
    member = card(run / "adapters" / "00")
    assert "This adapter is the row `00`." in member
    assert "| `00` | 70.00 ± 1.00 |" in member
    assert "value: 70.0\n" in member
    assert "81.17" not in member.partition("\n---\n")[0]
    assert "adapters merged" not in benchmark(member)


def test_an_adapter_of_unknown_origin_has_no_story(tmp_path):
    write_adapter(small_adapter(0), tmp_path / "alone")
    text = card(tmp_path / "alone")
    assert "Its training is not recorded." in text
    assert list(benchmark(text)) == ["rank"]
    assert not {"λ", "NoisyAdamW", "noisy", "## Evaluation"} & set(
        re.findall(r"λ|NoisyAdamW|noisy|## Evaluation", text)
    )
    data = loaded(text, tmp_path).data
    assert data.eval_results is None
    assert data.datasets is None
    assert data.license is None
    assert "No licence was stated" in text


def test_a_merge_of_adapters_from_elsewhere_names_them(tmp_path):
    for i in range(2):
        write_adapter(small_adapter(i), tmp_path / f"theirs-{i}")
    merge_folders([tmp_path / "theirs-0", tmp_path / "theirs-1"], tmp_path / "out", method="soup")
    text = card(tmp_path / "out")
    assert "- `theirs-0`, SHA-256 `" in text
    assert "How its adapters were trained is not recorded." in text
    assert "a model soup" in text
    assert "λ" not in text


def test_a_merge_that_left_adapters_out_is_still_the_run_s_and_says_so(run):
    before = benchmark(card(run))
    shutil.rmtree(run / "merged")
    merge_folders([run], run / "merged", leave_out=[run / "adapters" / "00"])
    made = benchmark(card(run))
    assert (made["adapters merged (M)"], made["adapters left out"]) == ("1", "1")
    assert "adapters left out" not in before
    assert made["length"] == before["length"]


def test_a_merge_of_other_adapters_than_the_run_s_does_not_take_its_story(run):
    write_adapter(small_adapter(7), run / "adapters" / "02")
    subject = collect(run)
    assert subject.config is None
    assert subject.evaluation is None
    assert subject.left_out == {"eval/results.json": "not an evaluation of this adapter: evaluate again"}
    assert "λ" not in model_card(subject, "me/demo")


def test_an_evaluation_older_than_the_weights_is_not_theirs(run):
    shutil.rmtree(run / "merged")
    merge_folders([run], run / "merged", rank=1)
    subject = collect(run)
    assert subject.evaluation is None
    assert subject.left_out == {"eval/results.json": "the weights have changed since: evaluate again"}
    assert subject.config is not None


def test_results_of_another_protocol_are_taken_where_there_are_no_others(run):
    (run / "eval").rename(run / "eval-generate")
    assert "This adapter is the row `PoC merge`." in card(run)


def test_an_evaluation_beside_a_loose_adapter_is_taken(tmp_path):
    write_adapter(small_adapter(0), tmp_path / "alone")
    write_results(tmp_path / "alone", some_results(["alone"], merged=False))
    assert "This adapter is the row `LoRA alone`." in card(tmp_path / "alone")
    write_results(tmp_path / "alone", some_results(["alone", "other"], merged=False))
    text = card(tmp_path / "alone")
    assert "This adapter is the row `alone`." in text
    assert "\n| `alone` | 70.00" in text
    write_results(tmp_path / "alone", some_results(["others", "too"], merged=False))
    assert "## Evaluation" not in card(tmp_path / "alone")


@pytest.mark.parametrize(
    ("rank", "expected"),
    [(2, "--max-lora-rank 8 "), (64, "--max-lora-rank 64 "), (300, "--max-lora-rank 320 "), (513, "ranks up to 512")],
)
def test_vllm_is_given_a_rank_that_it_takes(tmp_path, rank, expected):
    write_adapter(small_adapter(0, rank=rank), tmp_path / "a")
    assert expected in card(tmp_path / "a")
    assert ("vllm serve" in card(tmp_path / "a")) == (rank <= 512)


def test_vllm_is_not_promised_modules_trained_whole(tmp_path):
    write_adapter(small_adapter(0, whole={"lm_head.weight": torch.ones(3, 8)}), tmp_path / "a")
    assert "vllm serve" not in card(tmp_path / "a")


def test_usage_names_repository_branch_and_members(run):
    text = card(run, members=True, revision="v2")
    assert 'PeftModel.from_pretrained(base, "me/demo", revision="v2")' in text
    assert 'base.load_adapter("me/demo", adapter_kwargs={"revision": "v2"})' in text
    assert 'subfolder="adapters/00", revision="v2"' in text
    for code in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        compile(code, "card", "exec")


@pytest.mark.parametrize("licence", ["Apache 2.0", "", "mit\nfoo: bar", "-"])
def test_what_is_no_licence_s_identifier_is_refused(run, licence):
    with pytest.raises(RequestError, match="licence's identifier"):
        card(run, licence=licence)


def test_text_of_a_file_ends_neither_code_nor_table(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "run.json").write_text('{"data_sha256": {"a`|b\\n---\\n<script>.json": "`|"}}')
    made = card(run).partition("## Evaluation")[0]
    assert "<script>" not in made
    assert "`a??b?---??script?.json`" in made


def test_a_revision_is_a_quoted_literal(tmp_path):
    write_adapter(dataclasses.replace(small_adapter(0), revision="refs/pr/1"), tmp_path / "a")
    assert 'from_pretrained("org/base", revision="refs/pr/1")' in card(tmp_path / "a")
    attack = 'main"); __import__("os").system("id") #\n```\n<img src=x>'
    change(tmp_path / "a" / "adapter_config.json", revision=attack)
    with pytest.raises(AdapterError, match="revision"):
        card(tmp_path / "a")
    subject = dataclasses.replace(collect(make_run(tmp_path / "run")), base_revision=attack)
    (block,) = re.findall(r"```python\n(.*?)\n```", usage(subject, "me/demo", None), flags=re.DOTALL)
    calls = [node.func for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
    assert {call.attr for call in calls} == {"from_pretrained"}


def test_text_of_results_and_versions_is_not_markup(tmp_path):
    run = make_run(tmp_path / "run")
    attack = "x`<img src=x>\n\n# Hello [a](b)"
    scored = some_results(["00", "01"])
    changes = dict(base_model=attack, prompt=attack, protocol=attack, unread={attack: 0.5})
    changes |= dict(control=scored.base, control_name=attack)
    write_results(run / "eval", scored.model_copy(update=changes))
    change(run / "merged" / "merge.json", versions={"torch": attack})
    change(run / "run.json", versions={attack: attack})
    text = card(run) + card(run / "adapters" / "00")
    assert "<img" not in text.replace("\\<img", "")
    assert "\n# Hello" not in text
    assert "[a](b)" not in text


@pytest.mark.parametrize(
    ("task", "kind"),
    [
        ("CAUSAL_LM", "AutoModelForCausalLM"),
        ("SEQ_CLS", "AutoModelForSequenceClassification"),
        ("TOKEN_CLS", "AutoModelForTokenClassification"),
        ("SEQ_2_SEQ_LM", "AutoModelForSeq2SeqLM"),
        ("QUESTION_ANS", "AutoModelForQuestionAnswering"),
        ("FEATURE_EXTRACTION", "AutoModel"),
        (None, "AutoModel"),
    ],
)
def test_the_class_is_that_of_the_task(tmp_path, task, kind):
    write_adapter(small_adapter(0), tmp_path / "a")
    change(tmp_path / "a" / "adapter_config.json", task_type=task)
    text = card(tmp_path / "a")
    assert f"base = {kind}.from_pretrained(" in text
    assert hasattr(transformers, kind)
    assert ("vLLM" in text) == (task == "CAUSAL_LM")
    assert ("does not name its task" in text) == (task is None)
    pipeline = loaded(text, tmp_path).data.pipeline_tag
    assert (pipeline == "text-generation") == (task == "CAUSAL_LM")


def test_a_classifier_is_loaded_with_its_number_of_classes(tmp_path):
    write_adapter(small_adapter(0, whole={"score.weight": torch.ones(3, 8)}, task="SEQ_CLS"), tmp_path / "a")
    assert '.from_pretrained("org/base", num_labels=3)' in card(tmp_path / "a")


def test_a_weighted_merge_and_the_rank_asked_for_are_said(tmp_path):
    run = make_run(tmp_path / "run")
    assert "weights" not in benchmark(card(run))
    shutil.rmtree(run / "merged")
    merge_folders([run], run / "merged", weights=[0.75, 0.25], rank=3)
    text = card(run)
    assert "exact or, with a rank, its best approximation, with the weights 0.75, 0.25" in text
    made = benchmark(text)
    assert (made["weights"], made["rank asked for"], made["rank"]) == ("0.75, 0.25", "3", "3")


def test_the_modules_saved_whole_are_said_to_be_averaged_or_the_same(tmp_path):
    for i in range(2):
        whole = {"score.weight": torch.ones(3, 8) * i, "model.embed_tokens.weight": torch.ones(9, 8)}
        write_adapter(small_adapter(i, whole=whole, task="SEQ_CLS"), tmp_path / f"{i}")
    merge_folders([tmp_path / "0", tmp_path / "1"], tmp_path / "merged", modules_to_save="mean")
    text = card(tmp_path / "merged")
    assert re.search(r"\| saved whole, averaged \| `score.weight` +\|", text)
    assert re.search(r"\| saved whole, the same in all adapters \| `model.embed_tokens.weight` +\|", text)


def test_the_citation_is_there(run):
    assert "@inproceedings{nitanda2025propagation," in card(run)


def test_the_same_run_has_the_same_card(run):
    assert card(run, members=True) == card(run, members=True)


def test_the_ranks_of_modules_that_differ_are_a_range(tmp_path):
    modules = {f"layers.{i}.q_proj": Factors(torch.ones(r, 4), torch.ones(5, r)) for i, r in enumerate((1, 3))}
    write_adapter(Adapter(modules, base_model="org/base"), tmp_path / "a")  # written with one rank
    assert benchmark(card(tmp_path / "a"))["rank"] == "3"
