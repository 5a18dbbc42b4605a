"""Every configuration in the checkout can be loaded, and says what its header says."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from poc_lora.config import dump_yaml, load_config

FOLDER = Path(__file__).parents[1] / "configs"
ACCELERATE = sorted((FOLDER / "accelerate").glob("*.yaml"))
CONFIGS = sorted(set(FOLDER.rglob("*.yaml")) - set(ACCELERATE))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs_validate(path, tmp_path):
    config = load_config(path)
    again = tmp_path / "again.yaml"
    again.write_text(dump_yaml(config))
    assert load_config(again) == config


def test_there_are_configs():
    assert {"demo", "llama2_7b", "llama3_8b"} <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda p: p.stem)
def test_accelerate_reads_its_configurations(path):
    assert load_config_from_file(str(path)).num_processes >= 1
