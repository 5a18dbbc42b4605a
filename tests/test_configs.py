"""Every configuration in the checkout can be loaded, and says what its header says."""

from pathlib import Path

import pytest

from poc_lora.config import dump_yaml, load_config

CONFIGS = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs_validate(path, tmp_path):
    config = load_config(path)
    again = tmp_path / "again.yaml"
    again.write_text(dump_yaml(config))
    assert load_config(again) == config


def test_there_are_configs():
    assert {"demo", "llama2_7b", "llama3_8b"} <= {path.stem for path in CONFIGS}
