"""The configurations for the paper's task: what `check` says of each, for the card that it names."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from poc_lora.config import load_config
from poc_lora.files import size
from poc_lora.training import check as plan
from poc_lora.training.check import check
from tests.conftest import build_tokenizer

CONFIGS = Path(__file__).parents[1] / "configs"
PATHS = {path.stem: path for folder in ("paper", "commonsense") for path in (CONFIGS / folder).glob("*.yaml")}
SHAPES = Path(__file__).with_name("model_configs")  # the sizes of the base models, as their config.json gives them
PAPER = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]

# Name: the base's sizes, GB free on a card, cards, and what is expected: weights in GB on each and adapters at once.
# Weights by hand: parameters in billions times 2 bytes; in nf4 0.516 bytes for all but embedding and head; sharded an
# eighth of them, and beside it embedding, head and two layers whole.
CARDS = {
    "llama2_7b": ("llama2_7b", 79, 1, 6.74 * 2, 8),
    "llama3_8b": ("llama3_8b", 79, 1, 8.03 * 2, 8),
    "llama3_8b_24gb": ("llama3_8b", 23.5, 1, 6.98 * 0.516 + 1.05 * 2, 8),
    "llama3_70b": ("llama3_70b", 79, 8, (70.55 / 8 + 2.1 + 2 * 0.856 * 7 / 8) * 2, 1),
    "qwen3_1.7b": ("qwen3_1.7b", 15.5, 1, 1.72 * 2, 8),
    "smollm3_3b": ("smollm3_3b", 23.5, 1, 3.08 * 2, 8),
}


def test_every_configuration_has_a_card():
    assert set(PATHS) == set(CARDS)


@pytest.mark.parametrize("name", CARDS)
def test_what_is_known_of_the_papers_settings_is_kept(name):
    config = load_config(PATHS[name])
    assert (config.lora.rank, config.lora.alpha, sorted(config.lora.targets)) == (32, 64, sorted(PAPER))
    assert (config.adapters.count, config.data.max_length, config.train.batch_size) == (8, 256, 16)
    assert (config.optim.schedule, config.optim.warmup_steps) == ("linear", 100)


@pytest.mark.slow
@pytest.mark.parametrize("name", CARDS)
def test_the_memory_that_check_predicts_is_believable_for_the_card(name, tmp_path, monkeypatch):
    shapes, free, cards, weights, at_once = CARDS[name]
    base = tmp_path / "base"
    build_tokenizer(["one word or another"]).save_pretrained(base)
    shutil.copy(SHAPES / f"{shapes}.json", base / "config.json")
    rows = [{"instruction": "word " * 300, "input": "", "output": "another"}] * 200
    rows += [{"instruction": "one word", "input": "", "output": "another"}] * 400
    (tmp_path / "train.json").write_text(json.dumps(rows))
    monkeypatch.setattr(plan, "free_bytes", lambda device: int(free * 1e9))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**12))
    place = [f"model.name={base}", f"data.train=[{tmp_path}/train.json]", f"output={tmp_path}/run"]
    config = load_config(PATHS[name], place)
    facts = check(config, device=torch.device("cuda"), processes=cards)
    assert facts["adapters trained at once"] == at_once
    predicted = float(facts["memory on cuda: base model"].removesuffix(" GB"))
    assert predicted == pytest.approx(weights, rel=0.02)
    peak, _, rest = facts["memory on cuda: peak"].partition(" of ")
    assert rest == f"{size(int(free * 1e9))} free"  # and not TOO MUCH
    # Weight, gradient and two moments of each adapter, and the noise of one, 4 bytes each.
    adapters = facts["parameters per adapter"] * (16 * at_once + 4) / 1e9
    assert weights + adapters < float(peak.removesuffix(" GB")) < 0.9 * free
