"""scripts/benchmarks/mfnn.py at its smallest: the JSON is complete, fits together, and names no path."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmarks" / "mfnn.py"
LOOP = """
import json, sys
assert sys.argv[1:3] == ["--networks", "8"] or sys.argv[1:3] == ["--networks", "4"]
print(json.dumps({"neuron_samples_per_s": 1000000}))
"""


@pytest.mark.slow
def test_json_is_complete_and_consistent(tmp_path):
    loop = tmp_path / "secret" / "loop.py"
    loop.parent.mkdir()
    loop.write_text(LOOP)
    out = tmp_path / "found.json"
    options = ["--baseline", str(loop), "--rounds", "2", "--divide-steps", "50", "--out", str(out)]
    done = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found == json.loads(done.stdout)
    assert "--baseline loop.py" in found["command"]
    assert {"versions", "machine", "settings", "unit"} <= set(found)
    assert set(found["shapes"]) == {"d2", "d100"}
    for shape in found["shapes"].values():
        rates = shape["rates"]
        assert set(rates) == {"poc_lora", "poc_lora_without_noise", "matmuls", "loop"}
        for side in rates.values():
            assert len(side["rounds"]) == 2
            assert side["median"] == pytest.approx(statistics.median(side["rounds"]), abs=1)
        assert rates["loop"]["median"] == 1_000_000
        ratios = [ours / 1e6 for ours in rates["poc_lora"]["rounds"]]
        assert shape["poc_lora_over"]["loop"]["range"] == pytest.approx([min(ratios), max(ratios)], abs=1e-3)
