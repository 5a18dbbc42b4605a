"""The reproduce scripts end to end on the micro-world at toy size, and once more after an interruption."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SIZE = ["adapters.count=2", "lora.rank=2", "train.epochs=null", "train.max_steps=2", "optim.warmup_steps=1"]


def run(script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        [ROOT / "scripts" / script, "configs/demo.yaml", "poc_lora/microworld/data", *SIZE],
        cwd=ROOT,
        env=os.environ | {"PATH": path, "OUT": str(folder)} | environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_table_1_is_made_and_made_again_without_training(tmp_path):
    first = run("reproduce_table1.sh", tmp_path / "table1", EVAL="--limit 2 --benchmarks piqa,boolq")
    assert first.returncode == 0, first.stderr
    assert "PoC merge" in first.stdout
    results = (tmp_path / "table1" / "eval" / "results.json").read_bytes()
    (tmp_path / "table1" / "eval" / "results.json").unlink()  # as if stopped before its end
    again = run("reproduce_table1.sh", tmp_path / "table1", EVAL="--limit 2 --benchmarks piqa,boolq")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "table1" / "eval" / "results.json").read_bytes() == results


@pytest.mark.slow
def test_table_3_compares_temperatures_with_the_control(tmp_path):
    done = run(
        "reproduce_table3.sh", tmp_path / "table3", TEMPERATURES="0 1e-3", EVAL="--limit 2 --benchmarks piqa,boolq"
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "table3" / "lambda-1e-3" / "eval" / "results.json").read_text())
    assert results["control_name"] == "λ = 0"
    assert set(results["comparisons"]) == {"best", "average", "control"}


@pytest.mark.parametrize("script", ["reproduce_table1.sh", "reproduce_table3.sh"])
def test_without_arguments_the_usage_is_shown(script):
    done = subprocess.run([ROOT / "scripts" / script], capture_output=True, text=True)
    assert done.returncode == 2
    assert f"scripts/{script} CONFIG DATA" in done.stderr
