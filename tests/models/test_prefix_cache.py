"""Rows run behind their common start give the logits of whole rows, and nothing is kept of them."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig, MistralConfig, Qwen3Config

from poc_lora import AdapterBank
from poc_lora.models.forward import logits_at
from poc_lora.models.prefix_cache import run_prefix

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "llama": LlamaConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "gpt2": GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}
WINDOWS = {
    "mistral": MistralConfig(**SIZES, sliding_window=8),
    "gemma3": Gemma3TextConfig(**SIZES, sliding_window=8),
}


def make(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_logits_are_those_of_whole_rows(family, implementation):
    model = make(FAMILIES[family])
    model.set_attn_implementation(implementation)
    ids = torch.randint(60, (5, 21))
    ids[:, :9] = ids[0, :9]
    rows, columns = torch.tensor([0, 1, 1, 4]), torch.tensor([9, 12, 20, 15])
    past = run_prefix(model, ids[0, :9], copies=1)
    for _ in range(2):  # the same prefix again
        found = logits_at(model, ids[:, 9:], rows, columns - 9, past=past)
        torch.testing.assert_close(found, logits_at(model, ids, rows, columns), atol=2e-5, rtol=1e-5)


@torch.inference_mode()
def test_every_adapter_has_its_own_prefix():
    model = make(FAMILIES["llama"])
    bank = AdapterBank(model, targets=["q_proj", "v_proj", "up_proj"], rank=4, alpha=8, adapters=range(3), seed=0)
    for row in bank.rows:
        row.copy_(torch.randn(row.shape))
    ids = torch.randint(60, (2, 15))
    ids[:, :6] = ids[0, :6]
    rows, columns = torch.arange(6), torch.full((6,), 14)
    past = run_prefix(model, ids[0, :6], copies=3)
    found = logits_at(model, ids[:, 6:].repeat(3, 1), rows, columns - 6, past=past)
    expected = logits_at(model, ids.repeat(3, 1), rows, columns)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(expected[:2], expected[2:4], atol=1e-2)


@pytest.mark.parametrize("family", WINDOWS)
@torch.inference_mode()
def test_a_model_that_keeps_more_than_keys_and_values_gets_none(family):
    assert run_prefix(make(WINDOWS[family]), torch.arange(20), copies=2) is None
