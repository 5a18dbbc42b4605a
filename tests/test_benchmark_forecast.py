"""The benchmark of forecasts: the formula, and that it runs."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from poc_lora.microworld import DATA_DIR

FOLDER = Path(__file__).parents[1] / "scripts" / "benchmarks"


@pytest.mark.parametrize(("M", "more"), [(4, 4), (8, 1), (8, 8)])
def test_what_more_adapters_bring_is_that_of_training_them_many_times(monkeypatch, M, more):
    """Slow: draw all adapters from one law, 1,000 times, and score their averages by a quadratic loss."""
    monkeypatch.syspath_prepend(str(FOLDER))
    more_adapters = importlib.import_module("forecast").more_adapters
    draw, optimum = np.random.default_rng(3), np.array([3.0, 0.0, 0.0, 0.0, 0.0])

    def loss(adapters):
        return float(((adapters.mean(0) - optimum) ** 2).sum())

    expected, came, inside = [], [], []
    for _ in range(1000):
        drawn = draw.normal(0, 0.3, (M + more, len(optimum)))
        forecast = more_adapters([loss(drawn[j : j + 1]) for j in range(M)], loss(drawn[:M]), more)
        expected.append(forecast.mean)
        came.append(loss(drawn[:M]) - loss(drawn))
        inside.append(abs(came[-1] - forecast.mean) < forecast.half_width)
    gaps = np.subtract(came, expected)
    assert gaps.mean() == pytest.approx(0, abs=4 * gaps.std() / len(gaps) ** 0.5)
    assert np.mean(expected) == pytest.approx(5 * 0.3**2 * (1 / M - 1 / (M + more)), rel=0.1)
    assert 0.92 < np.mean(inside) < 0.98  # the slope at the merge, which chance moves along, is nearly the adapters'


def run(*words):
    done = subprocess.run([sys.executable, FOLDER / "forecast.py", *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_forecasts_of_what_more_adapters_bring(tmp_path):
    out, again, packs = tmp_path / "forecast.json", tmp_path / "again.json", tmp_path / "packs"
    small = ["adapters.count=4", "train.max_steps=4", "lora.rank=1", f"data.train={DATA_DIR / 'boolq'}"]
    words = ["--seeds", 0, 1, "--rates", "8e-3", "--packs", packs, *small]
    run("--out", out, *words)
    run("--out", again, *words)  # of the packs that were kept
    found, same = (json.loads(file.read_text())["rates"]["8e-3"]["0"] for file in (out, again))
    assert found == same
    assert [len(found[f"{quarter}/4"]["losses"]) for quarter in (1, 2, 3, 4)] == [4 + 2 + 1] * 3 + [4 + 2 + 1 + 4]
    study = FOLDER / "results" / "real_model_h200" / "docstrings.json"
    shown = run("--summary", out, "--studies", study)
    assert [line.split(" | ")[:2] for line in shown.splitlines() if "→" in line] == [
        ["| demo, lr 8e-3 (1)", "2 → 4"],
        ["| demo, lr 8e-3 (1)", "2 → 3"],
        ["| docstrings (3)", "4 → 8"],
    ]
