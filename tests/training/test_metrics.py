"""Trackers are given what metrics.jsonl holds, and nothing else; those that are not there are refused in time."""

import os
from pathlib import Path
from types import SimpleNamespace

import accelerate
import accelerate.tracking
import numpy as np
import pytest

from poc_lora.artifacts.metrics_line import MetricsLine, read_metrics
from poc_lora.errors import ConfigError
from poc_lora.training.metrics import MetricsLogger
from poc_lora.training.train import train
from tests.training.conftest import config, metrics

SECRETS = {"HF_TOKEN": "hf_PlantedSecret1", "WANDB_API_KEY": "PlantedSecret2" * 3, "COMET_API_KEY": "PlantedSecret3"}


def curves(folder):
    """Every scalar that TensorBoard shows: name -> [(step, value)]."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = {}
    for events in Path(folder).rglob("events.out.tfevents.*"):
        accumulator = reader.EventAccumulator(str(events)).Reload()
        for name in accumulator.Tags()["scalars"]:
            found[name] = [(event.step, event.value) for event in accumulator.Scalars(name)]
    return found


def written(folder, merge=lambda line: "merge"):
    """The same from metrics.jsonl, in the float32 that TensorBoard keeps."""
    found = {}
    for line in metrics(folder):
        name = merge(line) if line["adapter"] == "merge" else line["adapter"]
        for measure, value in line.items():
            if measure not in ("step", "adapter") and not isinstance(value, list):
                found.setdefault(f"{measure}/{name}", []).append((line["step"], float(np.float32(value))))
    return found


def test_tensorboard_shows_what_metrics_jsonl_holds(settings, monkeypatch):
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    done = train(config(settings, track=["tensorboard"], train__validate_every=3))
    shown = curves(done.folder)
    assert shown == written(done.folder)
    assert {"loss/0", "noise_norm/2", "lr/1", "validation_loss/base", "validation_loss/2"} < shown.keys()
    assert {"validation_loss/merge", "relative_standard_error/merge", "mean_cosine/merge"} < shown.keys()
    assert [step for step, _ in shown["loss/1"]] == [1, 2, 3, 4, 5, 6]
    lines = metrics(done.folder)
    assert set().union(*lines) <= MetricsLine.model_fields.keys()
    assert [line for _, line in read_metrics(done.folder / "metrics.jsonl", max_bytes=10**6)] == [
        MetricsLine.model_validate(line) for line in lines
    ]
    files = [path for path in done.folder.rglob("*") if path.is_file()]
    assert any("tfevents" in path.name for path in files)
    for path in files:
        assert not any(secret.encode() in path.read_bytes() for secret in SECRETS.values()), path


def test_what_is_kept_has_curves_of_its_own(settings):
    settings["optim"] |= {"lr": 5e-2, "schedule": "constant"}
    settings["train"] |= {"max_steps": 12, "validate_every": 2, "keep": "best"}
    shown = curves(train(config(settings, track=["tensorboard"])).folder)
    assert [step for step, _ in shown["validation_loss/0"]] == [2, 4, 6, 8, 10, 12]
    assert [step for step, _ in shown["kept_validation_loss/merge"]] == [12]
    assert not any(name.startswith(("kept/", "kept_kept")) for name in shown)


def test_each_pack_has_a_curve_for_its_own_merge(settings):
    done = train(config(settings, track=["tensorboard"], adapters__per_device=2, train__validate_every=3))
    shown = curves(done.folder)
    of_pack = {(0, 1): "merge_0-1", (2,): "merge_2-2"}
    expected = written(done.folder, merge=lambda line: of_pack[tuple(line["members"])])
    expected = {name: values for name, values in expected.items() if not np.isnan(values[0][1])}  # of one adapter
    assert shown == expected
    assert {"validation_loss/merge_0-1", "validation_loss/merge_2-2"} < shown.keys()


class Recorder:
    def __init__(self, name):
        self.name, self.calls = name, []

    def log(self, values, step=None):
        self.calls.append((values, step))


def test_wandb_gets_steps_as_a_value_since_it_ignores_those_that_go_back():
    wandb, other = Recorder("wandb"), Recorder("mlflow")
    logger = MetricsLogger(SimpleNamespace(log=lambda lines: None), [wandb, other], adapters=2)
    for adapter in (0, 1):  # two packs, one after the other
        logger.write([adapter], [{"step": 7, "adapter": adapter, "loss": 1.5, "members": [adapter]}])
    assert wandb.calls == [({"loss/0": 1.5, "step": 7}, None), ({"loss/1": 1.5, "step": 7}, None)]
    assert other.calls == [({"loss/0": 1.5}, 7), ({"loss/1": 1.5}, 7)]


def test_a_tracker_that_is_not_installed_is_refused_before_there_is_a_run(settings, monkeypatch):
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(ConfigError, match="tracker 'comet_ml' is not installed") as refusal:
        train(config(settings, track=["tensorboard", "comet_ml"]))
    assert refusal.value.fix == "pip install comet_ml, or choose among: tensorboard"
    assert not Path(settings["output"]).exists()


def test_without_trackers_accelerate_is_not_used(settings, monkeypatch):
    def used(*_, **__):
        raise AssertionError("accelerate was used")

    # transformers imports accelerate where it is installed, so that sys.modules cannot tell.
    monkeypatch.setattr(accelerate, "Accelerator", used)
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", used)
    done = train(config(settings))
    assert not (done.folder / "trackers").exists()
    with pytest.raises(AssertionError, match="was used"):
        train(config(settings, track=["tensorboard"], output=settings["output"] + "-tracked"))


def test_what_trackers_leave_lies_in_the_run_folder(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = set(os.listdir())
    done = train(config(settings, track=["tensorboard"]))
    assert set(os.listdir()) - before == {"run"}
    assert {path.name for path in (done.folder / "trackers").iterdir()} == {"poc_lora"}
