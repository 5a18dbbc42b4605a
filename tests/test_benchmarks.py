"""The other benchmarks at their smallest: they run, and their JSON is complete."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from poc_lora.config import validate
from poc_lora.merging.folders import merge_folders
from poc_lora.microworld import DATA_DIR, MODEL_DIR
from poc_lora.training.train import train

FOLDER = Path(__file__).parents[1] / "scripts" / "benchmarks"


def run(name, *words):
    done = subprocess.run([sys.executable, FOLDER / name, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_demo_on_many_seeds(tmp_path):
    out, figure = tmp_path / "seeds.json", tmp_path / "demo.png"
    small = ["adapters.count=8", "train.max_steps=1", "lora.rank=1"]
    run("demo_seeds.py", "--seeds", 0, 2, "--temperatures", "0", "--out", out, *small)
    (seeds,) = json.loads(out.read_text())["temperatures"].values()
    for found in seeds.values():
        assert len(found["adapters"]) == 8
        # After one step at the start of the warm-up all are about the base, which scores 80.4.
        assert all(70 < value < 90 for value in (*found["adapters"], *found["merges"]["8"], found["ensemble"]))
    assert "| 0 |" in run("demo_seeds.py", "--summary", out, "--figure", figure)
    assert figure.stat().st_size > 10_000


@pytest.mark.slow
def test_the_weights_to_keep(tmp_path):
    out = tmp_path / "keep.json"
    small = ["adapters.count=2", "train.max_steps=2", "train.validate_every=1", "lora.rank=1"]
    run("keep.py", "--seeds", 0, 1, "--out", out, *small)
    for seeds in json.loads(out.read_text())["settings"].values():
        (found,) = seeds.values()
        assert found["best"]["adapter"][0] <= found["last"]["adapter"][0]  # the loss that chose
        assert set(found["best_steps"]) <= {1, 2}
    assert "few rows: best at step" in run("keep.py", "--summary", out)


@pytest.mark.slow
def test_students_and_screening_of_the_demo(tmp_path):
    packs, students, screening = tmp_path / "packs", tmp_path / "distil.json", tmp_path / "screening.json"
    ranks = tmp_path / "ranks.json"
    settings = ["adapters.count=8", "train.max_steps=1", "lora.rank=1", f"data.train={DATA_DIR / 'boolq'}"]
    small = ["--packs", packs, "--limit", 10, *settings]
    run("distil.py", "--seeds", 0, 1, "--steps", 1, "--batch", 2, "--out", students, *small)
    (found,) = json.loads(students.read_text())["seeds"].values()
    # The first step's learning rate is 0, so all are the base.
    scored = [found["merge"], found["ensemble"], *found["truncated"].values(), *found["students"]]
    assert len({each["accuracy"] for each in scored}) == 1
    assert "| rank 16, distilled |" in run("distil.py", "--summary", students)
    run("ranks.py", "--seeds", 0, 1, "--out", ranks, *small)
    (found,) = json.loads(ranks.read_text())["seeds"].values()
    assert {(each["accuracy"], *each["difference"]) for each in found["ranks"].values()} == {(found["merge"], 0, 0, 0)}
    assert "| rank 64 |" in run("ranks.py", "--summary", ranks)
    run("screening.py", "--seeds", 0, 1, "--out", screening, *small)
    (found,) = json.loads(screening.read_text())["seeds"].values()
    assert found["1"]["left_out"] == []
    assert found["1"]["all"] == found["without"]
    assert "| 4 |" in run("screening.py", "--summary", screening)


@pytest.mark.slow
def test_tuned_merges_of_the_demo(tmp_path):
    out = tmp_path / "tune.json"
    small = ["adapters.count=3", "train.max_steps=3", "lora.rank=1", f"data.train={DATA_DIR / 'boolq'}"]
    run("tune.py", "--seeds", 0, 1, "--limit", 10, "--out", out, *small)
    (found,) = json.loads(out.read_text())["seeds"].values()
    assert all(found[way]["tuning_gain"] >= 0 for way in ("weights", "scale"))  # the loss that chose
    assert found["scales"]["tuning_gain"] >= found["scale"]["tuning_gain"]
    assert sum(found["weights"]["factors"]) == pytest.approx(3, abs=1e-3)
    assert "| weights |" in run("tune.py", "--summary", out)


@pytest.mark.slow
def test_the_losers_of_a_sweep(tmp_path):
    out = tmp_path / "stop_losers.json"
    settings = ["train.max_steps=4", "train.batch_size=2", "lora.rank=1", f"data.train={DATA_DIR / 'boolq'}"]
    run("stop_losers.py", "--seeds", 0, 1, "--limit", 10, "--out", out, *settings)
    (found,) = json.loads(out.read_text())["seeds"].values()
    assert [len(losses) for losses in found["losses"].values()] == [8, 8, 8]
    assert len(set(found["losses"]["third"])) == 1  # the first step's learning rate is 0, so all are the base
    assert len(set(found["losses"]["end"])) > 1
    assert len(found["survivors"]) == len(found["more_rows"]["losses"]) == 4
    assert "| a third | 4 of 8 |" in run("stop_losers.py", "--summary", out)


@pytest.mark.slow
def test_merging_from_files_to_files(tmp_path):
    run("merge.py", "files", "--layers", 1, "--rounds", 1, "--folder", tmp_path, "--out", tmp_path / "merge.json")
    found = json.loads((tmp_path / "merge.json").read_text())
    assert set(found["seconds"]) == {"copy", "exact", "truncated"}
    assert 50 < found["peak_megabytes_over_output_exact"] < 1000


@pytest.mark.slow
def test_answers_per_second(tmp_path):
    settings = {
        "model": {"name": str(MODEL_DIR)},
        "lora": {"rank": 2, "alpha": 4},
        "adapters": {"count": 2},
        "data": {"train": [str(DATA_DIR)], "prompt": "bare", "validation": 0},
        "train": {"max_steps": 1, "batch_size": 2},
        "output": str(tmp_path / "run"),
    }
    done = train(validate(settings, where="test"))
    merge_folders([done.folder], done.folder / "merged")
    words = ["--data", DATA_DIR, "--limit", 6, "--rounds", 1, "--prompt", "bare", "--out", tmp_path / "evaluate.json"]
    run("evaluate.py", done.folder, *words)
    found = json.loads((tmp_path / "evaluate.json").read_text())
    assert set(found["answers_per_s"]) == {"label", "generate_baseline", "harness_baseline"}
    assert found["same_choice"]["label and lm-eval"] == 1
    assert found["settings"]["questions"] == 6


@pytest.mark.slow
def test_one_process_and_two(tmp_path):
    out = tmp_path / "processes.json"
    run("processes.py", "--rounds", 1, "--out", out, "train.max_steps=1", "adapters.count=2", "lora.rank=1")
    found = json.loads(out.read_text())
    assert len(found["tokens_per_s"]) == 2
    (ratio,) = found["ratio"]["rounds"]
    one, two = (each["median"] for each in found["tokens_per_s"].values())
    assert ratio == pytest.approx(two / one, rel=0.01, abs=6e-4)  # it is rounded to three decimals


@pytest.mark.slow
def test_what_a_float8_base_changes(tmp_path):
    out = tmp_path / "quantization.json"
    run("quantization.py", MODEL_DIR, "--rows", 4, "--steps", 2, "--out", out, "adapters.count=2")
    found = json.loads(out.read_text())["kinds"]
    assert found["float32"]["kl"] == found["float32"]["gradient_distance"] == 0
    bfloat16, fp8 = found["bfloat16"], found["fp8"]
    assert 0 < bfloat16["kl"] < fp8["kl"]
    assert fp8["gradient_cosine"] < bfloat16["gradient_cosine"] < 1
    assert [len(kind["training"]) for kind in (bfloat16, fp8)] == [2, 2]


@pytest.mark.slow
def test_bfloat16_on_a_cpu_by_width(tmp_path):
    out = tmp_path / "dtypes.json"
    run("cpu_dtypes.py", "--turns", 1, "--widths", 128, "--out", out)
    (found,) = json.loads(out.read_text())["shapes"]
    seconds = found["step_s"]
    assert found["faster_by"]["step"] == pytest.approx(seconds["float32"] / seconds["bfloat16"], rel=0.01)
    assert found["faster_by"]["product"] > 0


@pytest.mark.slow
def test_what_computing_activations_again_saves(tmp_path):
    out = tmp_path / "recomputation.json"
    run("recomputation.py", "--turns", 1, "--out", out)
    found = json.loads(out.read_text())
    for dtype in ("float32", "bfloat16"):
        none, parts, layers = (found[dtype][kind] for kind in ("none", "norms and gates", "layers"))
        assert none["peak_bytes"] > parts["peak_bytes"] > layers["peak_bytes"]
        assert all(kind["same_bits"] for kind in (none, parts, layers))
