"""Which files are uploaded, and what is refused or left out."""

import contextlib
import json
import math
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from poc_lora.adapters.adapter import write_adapter
from poc_lora.artifacts.task_scores import Score
from poc_lora.errors import AdapterError, RequestError, RunError
from poc_lora.evaluation.variants import adapter_digest
from poc_lora.hub.collect import collect
from poc_lora.merging.folders import merge_folders
from tests.hub.conftest import change, make_run, small_adapter, snapshot, some_results, write_results
from tests.reporting.run_folder import task_results, write_scores


def paths(subject):
    return {file.path for file in subject.files}


def content(subject, path):
    (file,) = [file for file in subject.files if file.path == path]
    return json.loads(file.content)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("where", ["merged", "adapters/01"])
def test_an_adapter_that_is_a_link_is_refused(run, name, where):
    path = run / where / name
    path.rename(run / where / f"real-{name}")
    path.symlink_to(f"real-{name}")
    with pytest.raises(AdapterError, match=f"{name} is a link"):
        collect(run, members=True)


def test_a_merged_folder_that_is_a_link_is_refused(run, tmp_path):
    (run / "merged").rename(tmp_path / "elsewhere")
    (run / "merged").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AdapterError, match="merged is a link"):
        collect(run)


@pytest.mark.parametrize("name", ["adapters", "adapters/01"])
def test_members_that_are_links_are_refused(run, tmp_path, name):
    (run / name).rename(tmp_path / "elsewhere")
    (run / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AdapterError, match=f"{name} is a link"):
        collect(run, members=True)


def test_other_links_are_left_out_and_said_so(run, tmp_path):
    (tmp_path / "secret.svg").write_text("secret")
    (run / "figures" / "leak.svg").symlink_to(tmp_path / "secret.svg")
    (run / "merged" / "merge.json").rename(tmp_path / "merge.json")
    (run / "merged" / "merge.json").symlink_to(tmp_path / "merge.json")
    (run / "eval").rename(tmp_path / "eval")
    (run / "eval").symlink_to(tmp_path / "eval")
    subject = collect(run)
    assert subject.left_out == {
        "merged/merge.json": "a link",
        "eval/results.json": "a link",
        "eval": "a link",
        "figures/leak.svg": "a link",
    }
    assert not paths(subject) & {"merge.json", "results.json", "results.md", "figures/leak.svg"}


def test_held_out_rows_and_a_template_of_ones_own_stay_and_the_latter_is_said(run):
    assert (run / "held_out.jsonl").is_file()
    (run / "merged" / "chat_template.jinja").write_text("secret")
    subject = collect(run, members=True)
    assert not any(path.endswith((".jsonl", ".jinja")) for path in paths(subject))
    assert list(subject.left_out) == ["merged/chat_template.jinja"]


def test_a_folder_inside_a_link_is_not_looked_into(run, tmp_path):
    (run / "eval" / "figures").mkdir()
    (run / "eval" / "figures" / "private.svg").write_text("<svg/>")
    (run / "eval").rename(tmp_path / "elsewhere")
    (run / "eval").symlink_to(tmp_path / "elsewhere")
    subject = collect(run)
    assert "figures/private.svg" not in paths(subject)
    assert subject.left_out["eval"] == "a link"


@pytest.mark.parametrize("source", [".", "merged", "adapters/00"])
def test_a_run_whose_configuration_is_a_link_is_refused(run, tmp_path, source):
    (run / "config.yaml").rename(tmp_path / "secret.yaml")
    (run / "config.yaml").symlink_to(tmp_path / "secret.yaml")
    with pytest.raises(AdapterError, match=r"config\.yaml is a link"):
        collect(run / source)


def test_a_run_may_lie_behind_a_link(run, tmp_path):
    (tmp_path / "link").symlink_to(run)
    assert paths(collect(tmp_path / "link")) == paths(collect(run))


def test_pictures_of_the_merge_are_taken(run):
    (run / "merged" / "rank_sweep.svg").write_text("<svg/>")
    assert "figures/rank_sweep.svg" in paths(collect(run))


def test_an_evaluation_is_known_by_its_weights_and_not_by_times(run):
    for thing, folder in [("merged", run / "merged"), ("adapter-00", run / "adapters" / "00")]:
        write_scores(run / "eval", thing, folder)
    os.utime(run / "eval" / "results.json", ns=(0, 0))  # as a copy may have it
    assert collect(run).evaluation is not None
    assert collect(run / "adapters" / "00").evaluation is not None
    shutil.rmtree(run / "merged")
    merge_folders([run], run / "merged", rank=1)
    os.utime(run / "eval" / "results.json")
    subject = collect(run)
    assert subject.evaluation is None
    assert subject.left_out == {"eval/results.json": "the weights have changed since: evaluate again"}


def write_tasks(run, **changes):
    digests = {"merged": adapter_digest(run / "merged")}
    digests |= {f"adapter-{path.name}": adapter_digest(path) for path in (run / "adapters").iterdir()}
    found = task_results().model_copy(update={"adapter_digests": digests, "base_model": str(run / "base")} | changes)
    (run / "eval-tasks").mkdir()
    found.write(run / "eval-tasks" / "tasks.json")
    return found


def test_tasks_of_lm_eval_are_taken_without_what_is_private(run):
    found = write_tasks(run)
    subject = collect(run)
    assert subject.tasks.tasks == found.tasks
    shown = content(subject, "tasks.json")
    assert "adapter_digests" not in shown
    assert shown["base_model"] == "base"


def test_tasks_of_a_single_adapter_are_its_own(run):
    write_tasks(run)
    metric = collect(run / "adapters" / "00").tasks.tasks["read"].metrics["word_perplexity,none"]
    assert metric.adapters == {"00": Score(13.0, math.nan)}
    assert (metric.best, metric.average, metric.merged) == ("00", Score(13.0, math.nan), None)


def test_tasks_of_other_weights_are_left_out(run):
    write_tasks(run)
    shutil.rmtree(run / "merged")
    merge_folders([run], run / "merged", rank=1)
    subject = collect(run)
    assert (subject.tasks, "tasks.json" in paths(subject)) == (None, False)
    assert subject.left_out["eval-tasks/tasks.json"] == "the weights have changed since: evaluate again"


def test_tasks_that_name_no_weights_are_left_out(run):
    write_tasks(run, adapter_digests={})
    subject = collect(run)
    assert subject.tasks is None
    assert subject.left_out["eval-tasks/tasks.json"] == "not an evaluation of this adapter: evaluate again"


@pytest.mark.parametrize("name", ["../../secret", "a\0b", "x" * 5000, "\ud800"])
def test_a_name_in_results_json_leads_nowhere(tmp_path, name):
    write_adapter(small_adapter(0), tmp_path / "a")
    write_results(tmp_path / "a", some_results([name], merged=False))
    (tmp_path / "a" / "adapter-..").mkdir()
    (tmp_path / "secret.json").write_text("no JSON")
    with contextlib.suppress(RunError):
        collect(tmp_path / "a")


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("eval/results.json", {"chance": {}}),
        ("merged/merge.json", {"sources": 5}),
        ("run.json", {"versions": 3}),
    ],
)
def test_a_damaged_file_is_named(run, name, fields):
    change(run / name, **fields)
    with pytest.raises(RunError) as problem:
        collect(run)
    assert name.rpartition("/")[2] in str(problem.value)


def test_pictures_are_taken_from_run_evaluation_and_figures(run):
    (run / "eval" / "figures").mkdir()
    (run / "eval" / "figures" / "table.svg").write_text("<svg/>")
    (run / "figures" / "data.csv").write_text("1")
    (run / "figures" / "deep").mkdir()
    (run / "figures" / "deep" / "deep.png").write_text("1")
    figures = {path for path in paths(collect(run)) if path.startswith("figures/")}
    assert figures == {"figures/curves.svg", "figures/spectrum.png", "figures/table.svg"}


def test_a_run_without_a_merge_says_how_to_make_one(run):
    shutil.rmtree(run / "merged")
    with pytest.raises(RunError, match="no merged adapter") as problem:
        collect(run)
    assert f"poc-lora merge {run}" in str(problem.value)


def test_a_run_whose_single_adapters_are_gone_still_has_its_merge(run):
    shutil.rmtree(run / "adapters")
    assert "merge.json" in paths(collect(run))
    with pytest.raises(AdapterError):
        collect(run, members=True)


def test_only_a_run_has_members(run):
    with pytest.raises(RequestError, match="only a run"):
        collect(run / "merged", members=True)


def test_what_is_not_there_or_no_adapter_is_refused(tmp_path):
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(AdapterError):
            collect(folder)


def test_a_factor_that_is_not_finite_is_refused(run):
    path = run / "merged" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[max(tensors)][0, 0] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(AdapterError, match="NaN or infinity"):
        collect(run)


def test_what_is_not_plain_lora_is_refused(run):
    path = run / "merged" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}))
    with pytest.raises(AdapterError, match="use_dora"):
        collect(run)


@pytest.mark.parametrize("base", [None, "/home/someone/model", "./model", "a/b/c"])
def test_a_base_model_without_a_name_is_asked_for(tmp_path, base):
    write_adapter(small_adapter(0, base=base), tmp_path / "a")
    with pytest.raises(RequestError, match="base model") as problem:
        collect(tmp_path / "a")
    assert "--base-model ORG/NAME" in str(problem.value)
    config = content(collect(tmp_path / "a", base_model="org/base"), "adapter_config.json")
    assert config["base_model_name_or_path"] == "org/base"


def test_a_folder_here_is_not_taken_for_a_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "llama").mkdir(parents=True)
    write_adapter(small_adapter(0, base="models/llama"), tmp_path / "a")
    with pytest.raises(RequestError, match="folder models/llama"):
        collect(tmp_path / "a")


@pytest.mark.parametrize("name", ["a/b/c", "", "../x", "a b", "/x"])
def test_a_name_that_is_none_is_refused(run, name):
    with pytest.raises(RequestError, match="not a Hub id"):
        collect(run, base_model=name)


def test_what_is_uploaded_tells_no_local_path(tmp_path):
    base = str(tmp_path / "private" / "model")
    subject = collect(make_run(tmp_path / "run", base=base), members=True, base_model="org/base")
    texts = {file.path: file.content.decode() for file in subject.files if isinstance(file.content, bytes)}
    assert len(texts) == 6
    assert not [path for path, text in texts.items() if str(tmp_path) in text]
    assert content(subject, "results.json")["base_model"] == "org/base"
    assert {s["base_model"] for s in content(subject, "merge.json")["sources"]} == {"org/base"}
    assert "Base model `org/base`" in texts["results.md"]


def test_all_else_of_a_configuration_is_as_it_was(run):
    written = json.loads((run / "merged" / "adapter_config.json").read_text())
    assert content(collect(run), "adapter_config.json") == written
    assert content(collect(run), "merge.json") == json.loads((run / "merged" / "merge.json").read_text())
    assert content(collect(run), "results.json") == json.loads((run / "eval" / "results.json").read_text())


def test_a_merge_elsewhere_takes_nothing_from_the_folder_around_it(run, tmp_path):
    merge_folders([run], run / "other")
    subject = collect(run / "other")
    assert paths(subject) == {"adapter_config.json", "adapter_model.safetensors", "merge.json"}
    assert subject.config is None


def test_collecting_writes_nothing(run):
    before = snapshot(run)
    collect(run, members=True)
    assert snapshot(run) == before
