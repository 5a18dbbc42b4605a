"""A packed training step of small models of several families, for tests that compare two ways to run it."""

import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from poc_lora import rng
from poc_lora.data.batches import micro_batches
from poc_lora.data.prompts import Example
from poc_lora.lora.bank import AdapterBank
from poc_lora.training.loss import packed_loss
from tests.conftest import SMALL, build_llama

VOCAB, M = SMALL["vocab_size"], 3
FAMILIES = {
    "llama": lambda: build_llama(VOCAB),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, query_pre_attn_scalar=8)),
}
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


def build(name):
    torch.manual_seed(0)
    return FAMILIES[name]().requires_grad_(False).eval()


def make_bank(model, dropout=0.0):
    bank = AdapterBank(model, targets=TARGETS, rank=3, alpha=6.0, adapters=range(M), seed=7, dropout=dropout)
    for path, module in bank.modules.items():
        for slot in range(M):
            shape = tuple(module.factors.B[slot].shape)
            module.factors.B.detach()[slot].copy_(0.1 * rng.normal(shape, rng.key(1, slot, "test-B", 0, path)))
    for module in bank.modules.values():
        module.train()
    return bank


def backward(model, bank, seed, *, row_lengths=(9, 14)):
    """Losses and gradients of a step of two micro-batches, with a dropout key for each row."""
    stream = torch.Generator().manual_seed(seed)
    rows = [
        Example(tuple(torch.randint(3, VOCAB, (n,), generator=stream).tolist()), ((1, n),))
        for _ in range(M)
        for n in row_lengths
    ]
    each = len(row_lengths)
    chosen = [list(range(slot * each, slot * each + each)) for slot in range(M)]
    tokens = torch.full((M,), float(sum(row_lengths) - each))
    losses, plain = torch.zeros(M), model.config.model_type != "gemma2"
    bank.zero_grad()
    for batch in micro_batches(rows, chosen, tokens=16 * M, device=torch.device("cpu")):
        bank.key_dropout(torch.tensor([rng.key(7, 0, "dropout", 0, f"row {i}") - 2**63 for i in batch.examples]))
        loss, per_slot = packed_loss(model, batch, tokens, plain_head=plain)
        loss.backward()
        losses += per_slot
    return losses, bank.gradients.clone()
