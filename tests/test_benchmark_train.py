"""scripts/benchmarks/train.py at its smallest: the JSON is complete and its numbers fit together."""

import importlib
import json
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "scripts" / "benchmarks" / "train.py"
SIZES = "--shape tiny --adapters 2 --batch 4 --steps 3 --rows 256".split()


def run(*arguments: str) -> tuple[dict, str]:
    done = subprocess.run([sys.executable, str(SCRIPT), *SIZES, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.mark.slow
def test_json_is_complete_and_consistent(tmp_path):
    found, shown = run("--out", str(tmp_path / "found.json"), "optim.lr=1e-3")
    assert json.loads((tmp_path / "found.json").read_text()) == found

    seconds, tokens = found["seconds_per_step"], found["tokens_per_step"]
    assert set(seconds) == {"packed", "trainer", "loop"}
    assert len(tokens) == 3
    for name, side in seconds.items():
        assert len(side) == 3
        assert found["tokens_per_s"][name] == pytest.approx(sum(tokens) / sum(side), rel=1e-2)
        assert name in shown
    for name, faster in found["packed_is_faster_by"].items():
        ratios = [b / p for b, p in zip(seconds[name], seconds["packed"], strict=True)]
        assert faster["median"] == pytest.approx(statistics.median(ratios), rel=2e-2)
        assert faster["range"] == pytest.approx([min(ratios), max(ratios)], rel=2e-2)

    flops = found["flops"]
    embedding = 2048 * 128
    assert flops["model_flops_per_token"] == 4 * (found["settings"]["parameters"] - embedding)
    assert flops["achieved_flops_per_s"] == pytest.approx(
        flops["model_flops_per_token"] * found["tokens_per_s"]["packed"], rel=1e-3
    )
    assert flops["share_of_matmul"] == pytest.approx(
        flops["achieved_flops_per_s"] / flops["matmul_flops_per_s"], abs=1e-4
    )

    memory = found["peak_memory_bytes"]
    assert set(memory) == {*seconds, "packed_alone"}
    assert all(peak > 4 * found["settings"]["parameters"] for peaks in memory.values() for peak in peaks)
    assert 0 < found["real_token_share"] <= 1
    assert found["settings"]["overrides"] == ["optim.lr=1e-3"]
    assert found["command"].endswith("optim.lr=1e-3")
    assert {"versions", "machine"} <= set(found)


def test_in_every_step_all_sides_train_on_the_same_rows(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    sides, train = (importlib.import_module(name) for name in ("sides", "train"))
    a = train.parse_arguments(SIZES)
    work = train.random_work(a, train.run_config(a), torch.device("cpu"))
    rows = Counter()

    def see(_, arguments, named):
        rows.update(tuple(i for i in row.tolist() if i) for row in named["input_ids"])  # 0 is padding, and in no row

    work.model.model.register_forward_pre_hook(see, with_kwargs=True)  # the sides' copies have it too
    seen = {}
    for name in sides.SIDES:
        with sides.training(name, work, 3) as side:
            seen[name] = []
            for step in range(3):
                rows.clear()
                side.step(step)
                seen[name].append(Counter(rows))
    assert seen["packed"] == seen["loop"] == seen["trainer"]
    assert [sum(step.values()) for step in seen["packed"]] == [2 * 4] * 3
    assert [sum(len(row) * n for row, n in step.items()) for step in seen["packed"]] == [*map(work.tokens, range(3))]


@pytest.mark.slow
def test_a_mistyped_setting_is_named_without_a_traceback():
    done = subprocess.run([sys.executable, str(SCRIPT), "train.compil=true"], capture_output=True, text=True)
    assert done.returncode != 0
    assert "did you mean 'train.compile'" in done.stderr
    assert "Traceback" not in done.stderr
