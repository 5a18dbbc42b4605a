"""scripts/benchmarks/real_model.py at its smallest, on the embedded model."""

import importlib
import json
import re
import statistics
from pathlib import Path

import numpy as np
import pytest

from poc_lora.data.commonsense import BENCHMARKS
from poc_lora.microworld import DATA_DIR, MODEL_DIR

FOLDER = Path(__file__).parents[1] / "scripts" / "benchmarks"
README, EVIDENCE = FOLDER.parents[1] / "README.md", FOLDER.parents[1] / "docs" / "evidence.md"


@pytest.mark.slow
def test_a_study_keeps_every_score_and_is_not_run_twice(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    script = importlib.import_module("real_model")
    monkeypatch.setattr(importlib.import_module("real_model_rows"), "QUESTIONS", 3)
    jobs = [
        script.Job("choices", "choices", members=2, packs=2, steps=2, batch=2),
        script.Job("labels_longer", "labels", members=1, packs=2, steps=3, batch=2),
        script.Job("docstrings", "docstrings", members=2, packs=1, steps=1, batch=2, learn="last"),
    ]
    monkeypatch.setattr(script, "JOBS", {job.name: job for job in jobs})
    script.write_rows(DATA_DIR, tmp_path / "rows")
    for _ in range(2):
        script.study(str(MODEL_DIR), tmp_path / "rows", tmp_path / "out", list(script.JOBS), 600)
    assert capsys.readouterr().out.count("choices: ") == 2  # rows and one study: the second time it was there

    with np.load(tmp_path / "out" / "choices.npz") as found:
        names, scores = found["variants"].tolist(), found["scores"]
    assert names == ["base", *(f"adapter_{slot}" for slot in range(4)), "merge_2_0", "merge_2_2"]
    assert scores.shape[:2] == (len(names), 3 * len(BENCHMARKS))
    assert not np.array_equal(scores[1], scores[2])
    found = json.loads((tmp_path / "out" / "choices.json").read_text())
    assert [len(step) for step in found["losses"]] == [4, 4]
    assert len({found["heldout"][name] for name in ("base", "adapter_0", "adapter_1", "merge_2_0", "line_0_0.5")}) == 5
    shown = script.summary(tmp_path / "out")
    for name in ("base", "best", "ensemble", "merge of 2", "labels_longer", "docstrings"):
        assert name in shown


@pytest.mark.slow
def test_packs_that_differ_by_the_seed_are_one_row_of_the_summary_and_are_kept(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(FOLDER))
    script = importlib.import_module("real_model")
    jobs = [script.Job(f"small_{s}", "docstrings", members=2, packs=1, steps=2, batch=2, seed=s) for s in (1, 2)]
    monkeypatch.setattr(script, "JOBS", {job.name: job for job in jobs})
    script.write_rows(DATA_DIR, tmp_path / "rows")
    found = {}
    for out in ("first", "again"):
        script.study(str(MODEL_DIR), tmp_path / "rows", tmp_path / out, list(script.JOBS), 600, tmp_path / "packs")
        found[out] = [json.loads((tmp_path / out / f"{job.name}.json").read_text()) for job in jobs]
        monkeypatch.setattr(script.Pack, "step", None)  # the second time nothing is trained
    assert [run["heldout"] for run in found["first"]] == [run["heldout"] for run in found["again"]]
    shown = script.summary(tmp_path / "first").splitlines()
    assert [line.split()[:2] for line in shown if " adapter " in line] == [["small", "adapter"]]
    (merge,) = (line for line in shown if "small" in line and "merge of 2 " in line)
    means = [run["heldout"]["merge_2_0"] for run in found["first"]]
    assert f"{np.mean(means):.3f} ±" in merge


def test_the_figure_and_the_readme_have_the_losses_of_evidence_md(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    script = importlib.import_module("real_model_figure")
    sections = EVIDENCE.read_text().split("\n## ")[1:3]
    for axes, section in zip(script.figure(FOLDER / "results" / "real_model_h200").axes, sections, strict=True):
        rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| ") and " M " in line]
        shown = [row for row in rows if not re.search("averaged|adapter, running", row[0])]
        losses = [re.findall(r"\d\.\d{3}", row[2])[0] for row in shown]
        average, best, *merges = losses
        drawn = [text.get_text() for text in axes.texts]
        assert sorted(drawn) == sorted([average, *merges, best])
        assert drawn[:4] == [average, *merges[:3]]
        assert f"| {average} | {best} | {' | '.join(merges[:3])} | |" in README.read_text().replace("**", "")


def test_the_packs_of_a_job_are_told_apart(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    script = importlib.import_module("real_model_figure")
    job = script.Job("choices", "choices", members=4, packs=2)
    heldout = {f"adapter_{slot}": float(slot) for slot in range(8)}
    heldout |= {name: statistics.mean(members) for name, members in job.merges()}
    first, second = script.losses_by_size(heldout, job)
    assert first == {1: [0, 1, 2, 3], 2: [0.5, 2.5], 4: [1.5]}
    assert second == {1: [4, 5, 6, 7], 2: [4.5, 6.5], 4: [5.5]}
