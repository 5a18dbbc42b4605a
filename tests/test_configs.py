"""Every configuration in the checkout can be loaded, and says what its header says."""

import re
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from poc_lora.config import OptimSection, dump_yaml, load_config
from poc_lora.config_files import read_config
from poc_lora.mfnn.experiments import settings as mfnn

FOLDER = Path(__file__).parents[1] / "configs"
ACCELERATE = sorted((FOLDER / "accelerate").glob("*.yaml"))
MFNN = sorted((FOLDER / "mfnn").glob("*.yaml"))
CONFIGS = sorted(set(FOLDER.rglob("*.yaml")) - set(ACCELERATE) - set(MFNN))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs_validate(path, tmp_path):
    config = load_config(path)
    again = tmp_path / "again.yaml"
    again.write_text(dump_yaml(config))
    assert load_config(again) == config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs_depend_on_no_default_of_what_is_adapted_and_learnt(path):
    raw = read_config(path)
    assert raw["lora"]["targets"]
    assert raw["data"]["learn"]


def test_there_are_configs():
    assert {"demo", "llama2_7b", "llama3_8b", "llama3_70b"} <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize(("name", "lr"), [("llama2_7b", 3e-4), ("llama3_8b", 1e-4)])
def test_the_papers_configurations_state_every_value_and_its_source(name, lr):
    path = FOLDER / "paper" / f"{name}.yaml"
    config = load_config(path)
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout, config.adapters.count) == (32, 64, 0.05, 8)
    assert set(config.lora.targets) == {"q_proj", "k_proj", "v_proj", "up_proj", "down_proj"}
    assert config.optim == OptimSection(lr=lr, temperature=1e-5, warmup_steps=100)  # AdamW's defaults are the paper's
    data, train = config.data, config.train
    assert (data.max_length, data.learn, data.group_by_length, data.validation) == (256, "all", False, 120)
    assert (data.prompt, config.model.dtype) == ("llm-adapters", "bfloat16")
    assert (train.epochs, train.batch_size, train.validate_every, train.keep) == (3, 16, 80, "best")
    settings = [line for line in path.read_text().splitlines() if re.match(r"  \w+:", line)]
    assert settings
    assert all(re.search(r" # [PTO]\b", line) for line in settings)


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda p: p.stem)
def test_accelerate_reads_its_configurations(path):
    assert load_config_from_file(str(path)).num_processes >= 1


def test_there_is_one_configuration_for_each_mean_field_experiment():
    assert {path.stem for path in MFNN} == set(mfnn.SCHEMAS)


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("path", MFNN, ids=lambda p: p.stem)
def test_mean_field_configurations_validate(path, quick):
    loaded = mfnn.load(path.stem, quick=quick, path=path)
    assert type(loaded) is mfnn.SCHEMAS[path.stem]
    assert (loaded == mfnn.load(path.stem, path=path)) is not quick
