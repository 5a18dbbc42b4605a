"""The demo end to end, with fewer adapters, steps and questions."""

import json

import pytest

from poc_lora.errors import RequestError
from poc_lora.microworld import demo as microworld_demo
from poc_lora.reporting.sections_results import headline

SMALL = ["adapters.count=3", "train.max_steps=12", "lora.rank=4"]


def run(out):
    shown = []
    results = microworld_demo.demo(out, SMALL, show=lambda *things: shown.extend(things), limit=24)
    return results, shown


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "run"
    return out, *run(out)


def test_it_leaves_a_whole_run(demo):
    out, results, _ = demo
    files = (
        "config.yaml run.json metrics.jsonl adapters/02 merged/merge.json merged/rank_sweep.svg merged/rank_sweep.png"
    )
    for name in [*files.split(), "eval/results.md", "report.html"]:
        assert (out / name).exists(), name
    assert json.loads((out / "merged/adapter_config.json").read_text())["r"] == 3 * 4
    assert sum(results.questions.values()) == 8 * 24


def test_it_shows_the_papers_rows_and_two_sentences(demo):
    _, results, shown = demo
    assert shown[-2] == headline(results)[0]
    assert "truncated to rank 4 what one adapter costs" in shown[-1]
    rows = (demo[0] / "eval/results.md").read_text()
    for name in ("base", "LoRA (best)", "LoRA (average)", "PoC merge", "prediction ensemble"):
        assert f"| {name} |" in rows


def test_its_report_lacks_only_what_the_demo_does_not_measure(demo):
    out, results, _ = demo
    text = (out / "report.html").read_text()
    assert f"{100 * results.merged.average.value:.2f}" in text
    assert text.count("Left out:") == 1  # the validation loss
    assert [point.m for point in results.subsets.points] == [1, 2, 3]
    assert "ensemble of 3" in text
    assert "merge, rank 4" in text
    assert "cannot be compared with those of the real benchmarks" in text


def test_the_base_knows_the_world_better_than_chance(demo):
    _, results, _ = demo
    assert results.base.average.value > sum(results.chance.values()) / 8 + 0.2


def test_the_same_seed_gives_the_same_result(demo, tmp_path):
    out, results, _ = demo
    again, _ = run(tmp_path / "again")
    assert again.to_json() == results.to_json()
    for adapter in ("00", "02"):
        file = f"adapters/{adapter}/adapter_model.safetensors"
        assert (out / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def test_it_refuses_a_folder_with_something_in_it(demo):
    with pytest.raises(RequestError, match="exists already"):
        run(demo[0])


@pytest.mark.slow
def test_at_full_size_the_merge_beats_the_average_adapter(tmp_path):
    results = microworld_demo.demo(tmp_path / "demo", show=lambda *_: None)
    assert results.merged.average.value > results.average.average.value
