"""scripts/benchmarks/mfnn.py at its smallest: the JSON is complete, fits together, and names no path."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmarks" / "mfnn.py"


@pytest.mark.slow
def test_json_is_complete_and_consistent(tmp_path):
    out = tmp_path / "found.json"
    options = ["--rounds", "2", "--divide-steps", "50", "--out", str(out)]
    done = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found == json.loads(done.stdout)
    assert {"versions", "machine", "settings", "unit", "command"} <= set(found)
    assert set(found["shapes"]) == {"circle", "circle_batches", "regression", "regression_batches"}
    for shape in found["shapes"].values():
        rates = shape["rates"]
        assert set(rates) == {"poc_lora", "loop", "poc_lora_without_noise", "loop_without_noise", "matmuls"}
        for side in rates.values():
            assert len(side["rounds"]) == 2
            assert side["median"] == pytest.approx(statistics.median(side["rounds"]), abs=1)
        for name, ours, theirs in (
            ("loop", "poc_lora", "loop"),
            ("loop, both without noise", "poc_lora_without_noise", "loop_without_noise"),
        ):
            ratios = [a / b for a, b in zip(rates[ours]["rounds"], rates[theirs]["rounds"], strict=True)]
            assert shape["poc_lora_over"][name]["range"] == pytest.approx([min(ratios), max(ratios)], abs=1e-3)
