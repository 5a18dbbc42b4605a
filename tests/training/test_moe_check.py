"""`check` and `train` on mixtures of experts and state-space models: told, refused by name, or estimated."""

import shutil

import pytest
import torch
from transformers import AutoTokenizer, MambaConfig, MambaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from poc_lora.errors import ModelError
from poc_lora.training import memory
from poc_lora.training.check import check
from poc_lora.training.train import train
from tests.training.conftest import config

CPU = torch.device("cpu")


@pytest.fixture
def bases(tiny_model_dir, tmp_path):
    """Folders of a mixture of experts and a Mamba, with the tiny model's tokenizer."""
    vocabulary = len(AutoTokenizer.from_pretrained(tiny_model_dir))
    torch.manual_seed(0)
    moe = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
        )
    )
    mamba = MambaForCausalLM(MambaConfig(vocab_size=vocabulary, hidden_size=32, num_hidden_layers=2, state_size=4))
    folders = {"moe": tmp_path / "moe", "mamba": tmp_path / "mamba"}
    for name, model in (("moe", moe), ("mamba", mamba)):
        shutil.copytree(tiny_model_dir, folders[name], ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
        model.save_pretrained(folders[name])
    return {name: str(folder) for name, folder in folders.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_is_told_for_routed_experts_in_any_dtype(settings, bases, dtype):
    run = config(
        settings, model={"name": bases["moe"], "dtype": dtype}, lora__targets=["q_proj", "v_proj"], data__max_length=64
    )
    facts = check(run, device=CPU)
    assert "activations" in " ".join(facts)
    train(run, device=CPU)


def test_what_cannot_be_simulated_is_estimated_and_told(settings, monkeypatch):
    simulated = memory.Footprint(config(settings), CPU, longest=64)
    before = simulated.memory(memory.Sizes(512, 3, False))

    def fails(*args):
        raise RuntimeError("the shape depends on data")

    monkeypatch.setattr(memory.Footprint, "_simulated", fails)
    facts = check(config(settings), device=CPU)
    assert "an upper bound: the shape depends on data" in facts["memory on cpu: activations"]
    after = memory.Footprint(config(settings), CPU, longest=64).memory(memory.Sizes(512, 3, False))
    assert after.activations >= before.activations


@pytest.mark.parametrize(
    ("base", "targets", "words"),
    [
        ("moe", ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"], "'up_proj'|PEFT cannot attach"),
        ("mamba", ["dt_proj"], "without calling"),
        ("mamba", ["out_proj"], "PEFT cannot attach"),
    ],
)
def test_targets_without_effect_are_refused_before_anything_is_written(settings, bases, tmp_path, base, targets, words):
    run = config(settings, model={"name": bases[base]}, lora__targets=targets)
    with pytest.raises(ModelError, match=words):
        check(run, device=CPU)
    with pytest.raises(ModelError, match=words):
        train(run, device=CPU)
    assert not (tmp_path / "run" / "config.yaml").exists()
