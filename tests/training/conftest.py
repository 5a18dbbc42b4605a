"""A small run's settings, and ways to change, read and interrupt one."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from poc_lora.config import validate
from poc_lora.training.step import Pack


@pytest.fixture
def settings(tiny_model_dir, train_file, tmp_path):
    return {
        "model": {"name": str(tiny_model_dir)},
        "lora": {"rank": 2, "alpha": 4, "targets": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]},
        "adapters": {"count": 3, "seed": 1},
        "data": {"train": [str(train_file)], "validation": 6, "prompt": "bare", "max_length": 128, "learn": "all"},
        "optim": {"lr": 1e-2, "warmup_steps": 2, "temperature": 1e-5},
        "train": {"max_steps": 6, "batch_size": 4, "tokens_per_microbatch": 512},
        "checkpoint": {"every_steps": 2},
        "output": str(tmp_path / "run"),
    }


def config(settings, **changes):
    """The settings as a RunConfig, with keys changed (`__` for the dot)."""
    merged = {name: dict(value) if isinstance(value, dict) else value for name, value in settings.items()}
    for dotted, value in changes.items():
        section, _, key = dotted.partition("__")
        if key:
            merged[section][key] = value
        else:
            merged[section] = value
    return validate(merged, where="test")


def weights(folder, adapter):
    return load_file(Path(folder) / "adapters" / f"{adapter:02d}" / "adapter_model.safetensors")


def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def facts(folder):
    return json.loads((Path(folder) / "run.json").read_text())


def stop_after(monkeypatch, step, *, passes=0):
    """Make the process behave as if it were killed when it has come to optimizer step `step` for `passes` + 1 times.

    Returns a function that undoes it.
    """
    original, seen = Pack.step, []

    def killed(self, number, *rest):
        seen.append(number)
        if seen.count(step) > passes:
            raise KeyboardInterrupt
        return original(self, number, *rest)

    monkeypatch.setattr(Pack, "step", killed)
    return lambda: monkeypatch.setattr(Pack, "step", original)
