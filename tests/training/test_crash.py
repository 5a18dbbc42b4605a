"""Nothing is lost to kill -9: at every write, fsync and rename, and at moments drawn at random."""

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from poc_lora.config import dump_yaml
from poc_lora.training.train import train
from tests.training.conftest import config, facts, metrics, weights

OVERFITTING = {"optim__lr": 0.5, "optim__warmup_steps": 0, "train__validate_every": 1, "train__keep": "best"}


@pytest.mark.parametrize("changes", [{}, OVERFITTING], ids=["last", "best"])
def test_a_run_killed_inside_any_write_fsync_or_rename_goes_on_to_the_same_bits(settings, tmp_path, changes):
    changes = dict(adapters__count=2, train__max_steps=2, checkpoint__every_steps=1, data__validation=2) | changes
    small = config(settings, **changes)
    (tmp_path / "run.yaml").write_text(dump_yaml(small))
    ended = subprocess.run(
        [sys.executable, "-m", "tests.training.crash", str(tmp_path / "run.yaml"), str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
    )
    assert ended.returncode == 0, ended.stderr
    reference = facts(tmp_path / "reference")
    assert reference.get("best_steps") == ({"0": 1, "1": 1} if "train__keep" in changes else None)
    points = json.loads(ended.stdout)
    assert [point for point in points if point["problem"]] == []
    kinds = Counter(point["point"] for point in points)
    # Two commits at least, of two adapters and a manifest each, and two finished adapters.
    assert kinds["in _write_state"] >= 4
    assert kinds["in save_file"] >= 2
    assert kinds["in write"] >= 5
    assert min(kinds["before fsync"], kinds["after fsync"]) >= 20
    assert min(kinds["before rename"], kinds["after rename"]) >= 3
    assert kinds["metrics"] >= 3


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_killed_at_random_moments_loses_nothing(settings, tmp_path):
    long = dict(train__max_steps=400, checkpoint__every_steps=7, data__validation=2)
    expected = train(config(settings, **long))
    step = size(expected.folder / "metrics.jsonl") / 400  # bytes that a step adds
    folder = tmp_path / "killed"
    (tmp_path / "run.yaml").write_text(dump_yaml(config(settings, **long, output=str(folder))))
    draw, steps = random.Random(0), []
    for _ in range(20):
        process = start(tmp_path / "run.yaml", resume=(folder / "config.yaml").exists())
        # While it imports, loads or takes up a commit; or else after its first step.
        deadline = time.monotonic() + (draw.uniform(0, 6) if draw.random() < 0.3 else 120)
        before = size(folder / "metrics.jsonl")
        while size(folder / "metrics.jsonl") <= before and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.005)
        further = before + draw.uniform(0, 20) * step  # 20 times so many steps at most are not the end
        while before < size(folder / "metrics.jsonl") < further and process.poll() is None:
            time.sleep(0.002)
        assert process.poll() is None, process.communicate()
        process.kill()
        process.wait()
        newest = max((folder / "checkpoints").glob("commit_*/manifest.json"), default=None)
        steps.append(json.loads(newest.read_text())["adapters"]["0"]["step"] if newest else 0)
    assert steps == sorted(steps)  # what was committed was never lost
    assert 0 < steps[-1] < 400
    process = start(tmp_path / "run.yaml", resume=True)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    for adapter in range(3):
        a, b = weights(expected.folder, adapter), weights(folder, adapter)
        assert all(torch.equal(a[name], b[name]) for name in a)
    logged = [(line["step"], line["adapter"]) for line in metrics(folder) if "loss" in line]
    assert sorted(logged) == [(step, adapter) for step in range(1, 401) for adapter in range(3)]


def start(path, *, resume):
    return subprocess.Popen(
        [sys.executable, "-m", "poc_lora", "train", str(path), *(["--resume"] if resume else [])],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )


def size(path):
    return path.stat().st_size if path.exists() else 0
