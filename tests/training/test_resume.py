"""Runs that are resumed on another day, another machine or with other libraries: what still holds, and what is said."""

import json
from datetime import datetime
from pathlib import Path

import pytest
import torch

from poc_lora import environment
from poc_lora.environment import changed_devices
from poc_lora.errors import RunError
from poc_lora.training import train as train_module
from poc_lora.training.train import train
from tests.training.conftest import config, facts, stop_after, weights

TEMPLATE = (
    "Today is {{ strftime_now('%d %b %Y %H:%M:%S') }}.\n"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def chats(settings, tiny_model_dir, tmp_path):
    """Settings of a run on chats, whose template writes the time."""
    base = tmp_path / "base"
    base.mkdir()
    for file in tiny_model_dir.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    (base / "chat_template.jinja").write_text(TEMPLATE)
    rows = [
        {"messages": [{"role": "user", "content": f"what of {n}?"}, {"role": "assistant", "content": f"it is {n}"}]}
        for n in range(60)
    ]
    (tmp_path / "chats.json").write_text(json.dumps(rows))
    settings["model"]["name"] = str(base)
    settings["data"]["train"] = [str(tmp_path / "chats.json")]
    return settings


class Clock(datetime):
    """A clock that a test sets."""

    time = datetime(2026, 1, 31, 23, 59, 59)

    @classmethod
    def now(cls, tz=None):
        return cls.time


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(train_module, "datetime", Clock)
    return lambda *time: monkeypatch.setattr(Clock, "time", datetime(*time))


def test_a_run_on_chats_that_write_the_date_is_resumed_on_another_day(chats, tmp_path, clock, monkeypatch):
    straight = train(config(chats, output=str(tmp_path / "straight")))
    heal = stop_after(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        train(config(chats))
    heal()
    clock(2026, 2, 1, 8, 0, 0)
    done = train(config(chats), resume=True)
    assert facts(done.folder)["started_at"] == "2026-01-31T23:59:59"
    for adapter in range(3):
        a, b = weights(straight.folder, adapter), weights(done.folder, adapter)
        assert all(torch.equal(a[key], b[key]) for key in a)
    later = train(config(chats, output=str(tmp_path / "later")))
    assert facts(later.folder)["data_sha256"] != facts(done.folder)["data_sha256"]


def test_tokens_that_differ_are_told_apart_from_files_that_do(chats, monkeypatch):
    heal = stop_after(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        train(config(chats))
    heal()
    (Path(chats["model"]["name"]) / "chat_template.jinja").write_text(TEMPLATE.replace("Today", "Now"))
    path = Path(chats["output"]) / "run.json"
    path.write_text(path.read_text().replace(f'"transformers": "{_version()}"', '"transformers": "5.0.0"'))
    with pytest.raises(RunError, match="or which of them have a loss, are not those") as problem:
        train(config(chats), resume=True)
    assert f"transformers was 5.0.0, is {_version()}" in str(problem.value)
    rows = Path(chats["data"]["train"][0])
    rows.write_text(rows.read_text().replace("what of", "what about"))
    with pytest.raises(RunError, match=r"training files have changed since the run began: \S+chats\.json"):
        train(config(chats), resume=True)


def _version():
    return environment.environment()["versions"]["transformers"]


def test_a_run_that_goes_on_on_another_device_says_what_is_no_longer_bitwise(settings, monkeypatch, capsys):
    heal = stop_after(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        train(config(settings))
    heal()
    path = Path(settings["output"]) / "run.json"
    before = json.loads(path.read_text())
    assert before["devices"] == [environment.describe_device(torch.device("cpu"))]
    path.write_text(json.dumps(before | {"devices": ["NVIDIA H100, 132 multiprocessors"]}))
    capsys.readouterr()
    train(config(settings), resume=True)
    said = capsys.readouterr().err
    assert "began on NVIDIA H100, 132 multiprocessors" in said
    assert "the noise, which depends on the kind of GPU, differ" in said


def test_what_changes_with_the_devices():
    a, b = "cpu, X, 2 threads", "cpu, Y, 2 threads"
    assert changed_devices([], [a]) is None
    assert changed_devices([a, a], [a]) is None
    assert "since rounding differs" in changed_devices([a], [b])
    assert "noise" in changed_devices([a], ["NVIDIA H100, 132 multiprocessors"])
