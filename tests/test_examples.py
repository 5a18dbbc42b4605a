"""The examples run at toy size, on what they bring themselves, and do what they say."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from poc_lora.adapters.adapter import read_adapter
from poc_lora.merging.folders import merge_folders

FOLDER = Path(__file__).parents[1] / "scripts" / "examples"


def run(name, folder, *words):
    done = subprocess.run(
        [sys.executable, FOLDER / name, "--out", folder / "out", *map(str, words)],
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_tried_here():
    here = Path(__file__).read_text()
    assert all(f'run("{path.name}"' in here for path in FOLDER.glob("*.py"))


@pytest.mark.slow
def test_adapters_of_an_sft_trainer_are_merged(tmp_path):
    run("sft_trainer.py", tmp_path, "--adapters", 2, "--steps", 4)
    report = merge_folders([tmp_path / "out" / "0", tmp_path / "out" / "1"], tmp_path / "merged")
    assert report.rank == 32
    assert 0 < report.mean_cosine < 0.99


@pytest.mark.slow
def test_adapters_from_elsewhere_are_merged(tmp_path):
    shown = run("merge_adapters.py", tmp_path)
    assert "PEFT loads it: rank 30" in shown  # v_proj of all three: 8 + 16 + 6
    assert len(read_adapter(tmp_path / "out").modules) == 3 * 4
    assert "down_proj: relative error" in shown
    (tmp_path / "again").mkdir()
    one = tmp_path / "out"
    assert "rank 8" in run("merge_adapters.py", tmp_path / "again", one, "--rank", 8)


@pytest.mark.slow
def test_an_encoder_is_trained_in_a_pack(tmp_path):
    shown = run("encoder_classifier.py", tmp_path)
    accuracies = [float(value) for value in re.findall(r"accuracy ([\d.]+)", shown)]
    assert len(accuracies) == 6
    assert accuracies[4] == accuracies[5]  # the merge, by the bank and by PEFT
    # guessing gives half; 2,000 questions have a standard error of about 0.01
    assert min(accuracies) > 0.7
    assert {name.rpartition(".")[2] for name in read_adapter(tmp_path / "out").modules} == {"query", "value", "dense"}


def test_the_notebook_runs_cell_by_cell(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cells = json.loads((FOLDER / "first_steps.ipynb").read_text())["cells"]
    assert not any(cell.get("outputs") for cell in cells)
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    scope = {}
    for source in code:
        small = source.replace('"max_steps": 60', '"max_steps": 2').replace("limit=50", "limit=3")
        exec(compile(small, "first_steps.ipynb", "exec"), scope)  # noqa: S102
    assert "merge minus average adapter" in capsys.readouterr().out
    assert scope["model"].peft_config["default"].r == 64
    assert (tmp_path / "runs/first-steps/report.html").is_file()
