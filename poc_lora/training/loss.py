"""The loss of a pack: each adapter's mean over its own supervised tokens, summed over adapters."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from poc_lora.data.batches import MicroBatch
from poc_lora.lora.base import logits_at


def packed_loss(model: PreTrainedModel, batch: MicroBatch, tokens_per_slot: Tensor) -> tuple[Tensor, Tensor]:
    """The share of one micro-batch in a step's loss.

    tokens_per_slot [M]: supervised tokens of each adapter in the whole accumulation window, so that the
    shares of a window's micro-batches add up to `Σ_j (1/n_j) Σ_t CE_jt`: one mean per adapter, summed.
    Returns that share (a scalar to differentiate) and its part per adapter [M], detached.
    """
    logits = logits_at(model, batch.input_ids, batch.row, batch.column).float()
    per_token = torch.nn.functional.cross_entropy(logits, batch.target, reduction="none")
    weighted = per_token / tokens_per_slot[batch.slot]
    per_slot = torch.zeros_like(tokens_per_slot).index_add_(0, batch.slot, weighted.detach())
    return weighted.sum(), per_slot
