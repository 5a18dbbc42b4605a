"""The command line run in this process, on a small run of its own."""

import json
import sys

import pytest
import yaml

from poc_lora.cli import app as cli
from tests.conftest import instruction_rows


@pytest.fixture
def poc_lora(monkeypatch, capsys):
    """Run the command line in this process; returns exit status, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["poc-lora", *map(str, arguments)])
        try:
            cli.main()
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.fixture
def refused(poc_lora):
    """Run the command line on a bad request and check that it is refused as one; returns the message."""

    def run(*arguments):
        status, _, err = poc_lora(*arguments)
        assert status == 2, err
        assert "Traceback" not in err
        assert err.startswith("poc-lora: ")
        return err

    return run


@pytest.fixture
def config(tmp_path, monkeypatch, tiny_model_dir):
    """A small run's configuration in an empty current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.json").write_text(json.dumps(instruction_rows(24)))
    settings = {
        "model": {"name": str(tiny_model_dir)},
        "lora": {"rank": 2, "targets": ["q_proj", "v_proj"]},
        "adapters": {"count": 2},
        "data": {"train": ["train.json"], "validation": 4},
        "optim": {"warmup_steps": 0},
        "train": {"max_steps": 2, "batch_size": 2, "tokens_per_microbatch": 512},
        "output": "run",
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture
def trained(config, poc_lora):
    """The same configuration after its run."""
    status, _, err = poc_lora("train", config)
    assert status == 0, err
    return config
