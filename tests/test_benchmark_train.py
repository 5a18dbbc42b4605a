"""scripts/benchmarks/train.py at its smallest: the JSON is complete and its numbers fit together."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "benchmarks" / "train.py"
SIZES = "--shape tiny --adapters 2 --batch 4 --steps 1 --rounds 2 --rows 256".split()


def run(*arguments: str) -> tuple[dict, str]:
    done = subprocess.run([sys.executable, str(SCRIPT), *SIZES, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.mark.slow
def test_json_is_complete_and_consistent(tmp_path):
    found, shown = run("--out", str(tmp_path / "found.json"), "optim.lr=1e-3", "adapters.per_device=1")
    assert json.loads((tmp_path / "found.json").read_text()) == found

    rates = found["tokens_per_s"]
    assert set(rates) == {"packed", "trainer", "loop"}
    for name, side in rates.items():
        assert len(side["rounds"]) == 2
        assert side["median"] == pytest.approx(statistics.median(side["rounds"]), abs=0.1)  # rounded to 0.1
        assert name in shown
    for name, ratio in found["ratio"].items():
        rounds = zip(ratio["rounds"], rates["packed"]["rounds"], rates[name]["rounds"], strict=True)
        for quotient, packed, baseline in rounds:  # rounded to 0.001, of rates rounded to 0.1
            rounding = 5e-4 + packed / baseline * (0.05 / packed + 0.05 / baseline)
            assert quotient == pytest.approx(packed / baseline, abs=1.1 * rounding)
        assert ratio["range"] == [min(ratio["rounds"]), max(ratio["rounds"])]
        assert ratio["median"] == pytest.approx(statistics.median(ratio["rounds"]), abs=2e-3)
    better = max(("trainer", "loop"), key=lambda name: rates[name]["median"])
    assert found["better_baseline"] == better
    assert found["ratio_to_better"] == found["ratio"][better]["median"]

    flops = found["flops"]
    embedding = 2048 * 128
    assert flops["model_flops_per_token"] == 4 * (found["settings"]["parameters"] - embedding)
    assert flops["achieved_flops_per_s"] == pytest.approx(flops["model_flops_per_token"] * rates["packed"]["median"])
    assert flops["share_of_matmul"] == pytest.approx(
        flops["achieved_flops_per_s"] / flops["matmul_flops_per_s"], abs=1e-4
    )

    memory = found["peak_memory_bytes"]
    assert memory["packed_to_packed_alone"] == pytest.approx(memory["packed"] / memory["packed_alone"], abs=1e-3)
    assert all(memory[name] > 4 * found["settings"]["parameters"] for name in rates)

    share = found["real_token_share"]
    assert 0 < share["random_order"] < share["group_by_length"] <= 1
    assert 0 < found["trainer_start_up_share"] < 1
    assert found["trainer_tokens_per_s_after_start_up"] > rates["trainer"]["median"]
    assert found["packed_first_round_s"] > 0
    assert found["settings"]["adapters_per_pack"] == 1
    assert found["settings"]["overrides"] == ["optim.lr=1e-3", "adapters.per_device=1"]
    assert found["command"].endswith("optim.lr=1e-3 adapters.per_device=1")
    assert {"versions", "machine"} <= set(found)


@pytest.mark.slow
def test_a_mistyped_setting_is_named_without_a_traceback():
    done = subprocess.run([sys.executable, str(SCRIPT), "train.compil=true"], capture_output=True, text=True)
    assert done.returncode != 0
    assert "did you mean 'train.compile'" in done.stderr
    assert "Traceback" not in done.stderr
