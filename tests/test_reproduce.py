"""The reproduce scripts end to end on the micro-world at toy size, and once more after an interruption."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(script: str, folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        [ROOT / "scripts" / script, *(words or ["--toy"])],
        cwd=folder.parent,
        env=os.environ | {"PATH": path, "OUT": str(folder)} | environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_table_1_is_made_and_made_again_without_training(tmp_path):
    first = run("reproduce_table1.sh", tmp_path / "table1", EVAL="--limit 2 --benchmarks piqa,boolq")
    assert first.returncode == 0, first.stderr
    assert "| paper, Llama-3-8B: PoC merge | 82.04 |" in first.stdout  # beside ours
    assert re.search(r"^\| ours: LoRA \(worst\) \|  \| [\d.]+ \|", first.stdout, re.MULTILINE)
    assert re.search(r"^Collapsed adapters: [012] of 2\.$", first.stdout, re.MULTILINE)
    results = (tmp_path / "table1" / "eval" / "results.json").read_bytes()
    (tmp_path / "table1" / "eval" / "results.json").unlink()  # as if stopped before its end
    again = run("reproduce_table1.sh", tmp_path / "table1", EVAL="--limit 2 --benchmarks piqa,boolq")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "table1" / "eval" / "results.json").read_bytes() == results
    words = [str(ROOT / "configs" / "demo.yaml"), "data", "adapters.count=2", "optim.lr=0.5"]
    changed = run("reproduce_table1.sh", tmp_path / "table1", *words)
    assert changed.returncode == 2
    assert "optim.lr was" in changed.stderr


@pytest.mark.slow
def test_table_3_compares_temperatures_with_the_control(tmp_path):
    done = run(
        "reproduce_table3.sh", tmp_path / "table 3", TEMPERATURES="1e-3 0.0", EVAL="--limit 2 --benchmarks piqa,boolq"
    )
    assert done.returncode == 0, done.stderr
    assert "| 0, paper, Llama-2-7B | 80.74 | 69.15 |  | 43.56 |  |" in done.stdout
    assert re.search(r"^\| 1e-3, ours \|( [\d.]+ ± [\d.]+ \|){4} [012] of 2 \|$", done.stdout, re.MULTILINE)
    results = json.loads((tmp_path / "table 3" / "lambda-1e-3" / "eval" / "results.json").read_text())
    assert results["control_name"] == "λ = 0"
    assert set(results["comparisons"]) == {"best", "average", "control"}


def test_table_3_is_not_made_without_a_control(tmp_path):
    done = run("reproduce_table3.sh", tmp_path / "table3", TEMPERATURES="1e-6 1e-3")
    assert done.returncode == 2
    assert "TEMPERATURES lacks 0" in done.stderr


@pytest.mark.slow
def test_the_figures_are_made(tmp_path):
    done = run("reproduce_figures.sh", tmp_path / "figures")
    assert done.returncode == 0, done.stderr
    for name in ("figure1", "figure2", "figure2_long", "table2", "sweep", "pruning", "poc"):
        assert (tmp_path / "figures" / f"{name}-toy" / f"{name}.png").stat().st_size > 10_000
        assert list((tmp_path / "figures" / f"{name}-toy").glob(f"{name}*.csv"))


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["reproduce_table1.sh"], "scripts/reproduce_table1.sh CONFIG DATA"),
        (["reproduce_table3.sh", "--wrong"], "scripts/reproduce_table3.sh CONFIG DATA"),
        (["reproduce_figures.sh", "--wrong"], "scripts/reproduce_figures.sh --toy"),
    ],
)
def test_what_is_not_understood_shows_the_usage(words, shown):
    done = subprocess.run([ROOT / "scripts" / words[0], *words[1:]], capture_output=True, text=True)
    assert done.returncode == 2
    assert shown in done.stderr
