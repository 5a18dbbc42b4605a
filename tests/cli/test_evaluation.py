"""`eval` and `report`: what they refuse, and what they write."""

import json
import shutil
from pathlib import Path
from typing import get_args

import pytest

from poc_lora.artifacts.results import Results
from poc_lora.artifacts.row_losses import RowLosses
from poc_lora.artifacts.study import Study
from poc_lora.config import PromptTemplate
from poc_lora.data.prompts import TEMPLATES
from poc_lora.microworld import DATA_DIR
from tests.reporting.run_folder import make_run, write_rows_and_tasks, write_scores


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--benchmarks", "openbookqa,trivia"], "'trivia'"),
        (["--benchmarks", "boolq"], "boolq/test.json"),
        (["--limit", "0"], "limit"),
        (["--ranks", "8,x"], "'8,x' is not a list of numbers"),
        (["--ranks", ""], "where: --ranks"),
        (["--ranks", "4,2"], "do not increase"),
        (["--ranks", "2,99"], "the merge has rank 4"),
    ],
)
def test_an_evaluation_that_cannot_be_done_is_refused(refused, trained, options, expected):
    assert expected in refused("eval", "run", "--data", ".", *options)


def test_evaluating_or_reporting_what_is_not_there_is_refused(refused, config):
    assert "where: none" in refused("eval", "none", "--data", ".")
    assert "where: none" in refused("report", "none")
    assert "--ranks is for benchmarks" in refused("eval", "run", "--rows", "train.json", "--ranks", "2")


def test_eval_list_shows_the_eight_benchmarks_and_needs_nothing_else(poc_lora, refused):
    status, out, _ = poc_lora("eval", "--list")
    assert status == 0
    for name in ("social_i_qa", "winogrande", "Rowan/hellaswag", "validation", "10,042", "33.33"):
        assert name in out
    assert "TARGETS is missing" in refused("eval", "--data", ".")
    assert "--data is missing" in refused("eval", "run")


def test_json_alone_is_on_stdout_and_is_the_file_of_results(poc_lora, trained):
    status, out, err = poc_lora("eval", "run", "--data", DATA_DIR, "--limit", "2", "--json")
    assert status == 0, err
    assert json.loads(out) == json.loads((trained.parent / "run/eval/results.json").read_text())
    status, out, err = poc_lora("eval", "run", "--rows", "train.json", "--json")
    assert status == 0, err
    assert json.loads(out) == json.loads((trained.parent / "run/eval-rows/rows.json").read_text())


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


@pytest.mark.parametrize("options", [["--prompt", "poem"], ["--protocol", "oracle"], ["--dtype", "int8"]])
def test_a_word_that_is_no_choice_is_refused(poc_lora, options):
    status, _, err = poc_lora("eval", "run", "--data", ".", *options)
    assert status == 2
    assert f"Invalid value for '{options[0]}'" in err


def test_every_prompt_template_can_be_chosen():
    assert set(get_args(PromptTemplate)) == set(TEMPLATES)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("eval --rows x.jsonl", "TARGETS is missing"),
        ("eval run --rows x.jsonl --data .", "--data is for benchmarks"),
        ("eval run --rows x.jsonl --subsets", "--subsets is for benchmarks"),
        ("eval run --rows x.jsonl --limit 3", "--limit is for benchmarks"),
        ("eval run --rows x.jsonl --protocol generate", "one protocol"),
        ("eval run --rows x.jsonl", "--rows x.jsonl"),
    ],
)
def test_rows_and_benchmarks_are_scored_apart(refused, words, said):
    assert said in refused(*words.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("eval --harness-tasks gsm8k", "TARGETS is missing"),
        ("eval run --harness-tasks gsm8k --data .", "--data is for benchmarks"),
        ("eval run --harness-tasks gsm8k --subsets", "--subsets is for benchmarks"),
        ("eval run run --harness-tasks gsm8k --study", "--study is for benchmarks"),
        ("eval run --harness-tasks gsm8k --rows x.jsonl", "--harness-tasks is for benchmarks"),
        ("eval run --harness-tasks gsm8k --protocol generate", "their own protocols"),
        ("eval run --harness-tasks gsm8k --prompt bare", "their own protocols"),
        ("eval run --data . --num-fewshot 3", "--num-fewshot is for tasks of lm-eval"),
        ("eval run --data . --apply-chat-template", "--apply-chat-template is for tasks of lm-eval"),
        ("eval run --rows x.jsonl --apply-chat-template", "--apply-chat-template is for benchmarks"),
        ("eval run --data . --include-path .", "--include-path is for tasks of lm-eval"),
    ],
)
def test_tasks_of_lm_eval_are_scored_apart(refused, words, said):
    assert said in refused(*words.split())


def test_a_report_of_an_evaluation_of_other_weights_says_so_on_the_terminal(poc_lora, config):
    run = make_run(Path("made"))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (run / "merged" / name).write_text("as evaluated")
    write_scores(run / "eval", "merged", run / "merged")
    assert "have changed" not in poc_lora("report", "made")[1]
    (run / "merged" / "adapter_model.safetensors").write_text("merged anew")
    status, out, err = poc_lora("report", "made")
    assert status == 0, err
    assert "The weights of the merge have changed since this evaluation: evaluate again.\n" in out


def test_a_report_of_rows_and_tasks_of_other_weights_says_so_on_the_terminal(poc_lora, config):
    run = make_run(Path("made"))
    for folder in ("merged", "adapters/00", "adapters/01"):
        (run / folder).mkdir(parents=True, exist_ok=True)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            (run / folder / name).write_text(folder)
    write_rows_and_tasks(run)
    assert "have changed" not in poc_lora("report", "made")[1]
    (run / "merged" / "adapter_model.safetensors").write_text("merged anew")
    out = poc_lora("report", "made")[1]
    assert "The weights of the merge have changed since the evaluation on rows: evaluate again.\n" in out
    assert "The weights of the merge have changed since the evaluation on tasks of lm-eval: evaluate again.\n" in out


def test_losses_of_another_merge_are_not_reported_as_those_of_the_present_one(poc_lora, trained):
    note = "The weights of the merge have changed since the evaluation on rows: evaluate again."
    assert poc_lora("merge", "run", "--out", "run/merged")[0] == 0
    status, out, err = poc_lora("eval", "run", "--rows", "train.json")
    assert status == 0, err
    assert "the merge of 2 adapters" in out
    assert "have changed" not in poc_lora("report", "run")[1]
    shutil.rmtree("run/merged")
    assert poc_lora("merge", "run", "--rank", "1", "--out", "run/merged")[0] == 0
    assert note in poc_lora("report", "run")[1]
    assert Path("run/report.html").read_text().count(note) == 1
    assert poc_lora("eval", "run", "--rows", "train.json")[0] == 0
    assert note not in poc_lora("report", "run")[1]


def test_a_study_evaluates_each_run_as_it_would_be_alone(poc_lora, refused, trained):
    quiz = [{"question": f"Which is {i}?", "choices": ["cup", "old hat"], "answer": i % 2} for i in range(6)]
    Path("tasks/quiz").mkdir(parents=True)
    Path("tasks/quiz/test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in quiz))
    assert poc_lora("train", trained, "adapters.seed=1", "output=other")[0] == 0
    assert poc_lora("eval", "other", "--data", "tasks")[0] == 0
    alone = Results.read(Path("other/eval/results.json"))
    status, out, err = poc_lora("eval", "--study", "run", "other", "--data", "tasks")
    assert status == 0, err
    assert "12.7 standard errors" in out
    assert "next: poc-lora report run --compare other" in out
    assert Results.read(Path("other/eval/results.json")) == alone
    study = Study.read(Path("run/study.json"))
    for variant, scored in (("average", alone.average), ("merged", alone.merged)):
        assert study.measures["accuracy"][variant].values[1] == scored.average.value
    assert set(study.measures) == {"accuracy", "nll", "held_out_loss"}
    status, out, err = poc_lora("eval", "--study", "run", "other", "--rows", "train.json", "--out", "rows-study")
    assert status == 0, err
    losses = RowLosses.read(Path("other/eval-rows/rows.json"))
    study = Study.read(Path("rows-study/study.json"))
    assert study.measures["rows_loss"]["merged"].values[1] == sum(losses.merged) / sum(losses.tokens)
    assert set(study.measures) == {"rows_loss", "held_out_loss"}
    assert "one run is no study" in refused("eval", "--study", "run", "--rows", "train.json")
