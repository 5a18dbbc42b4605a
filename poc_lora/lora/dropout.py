"""Dropout whose mask is a function of keys, and is recomputed in the backward pass instead of being saved."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from poc_lora import rng
from poc_lora.fusion import fusable


def dropout(x: Tensor, row_keys: Tensor, salt: Tensor, p: float) -> Tensor:
    """x / (1 − p) where `rng.elementwise_bits` / 2²⁴ ≥ p, and 0 elsewhere.

    Args:
        x: Of shape [rows, length, width].
        row_keys: int64 [rows]; a row's mask depends on its own key alone, and not on `length`.
        salt: `rng.salt_words` of the call site.
        p: The probability of dropping an element.
    """
    dropped: Tensor = _Dropout.apply(x, row_keys, salt, p)  # type: ignore[no-untyped-call]
    return dropped


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, row_keys: Tensor, salt: Tensor, p: float) -> Tensor:
        ctx.save_for_backward(row_keys, salt)
        ctx.p = p
        return drop(x, row_keys, salt, p)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        row_keys, salt = ctx.saved_tensors
        return drop(upstream, row_keys, salt, ctx.p), None, None, None


@fusable
def drop(x: Tensor, row_keys: Tensor, salt: Tensor, p: float) -> Tensor:
    """What `dropout` computes, without a gradient."""
    bits = rng.elementwise_bits(row_keys, salt, x.shape[1], x.shape[2])
    return torch.where(bits >= p * 2**24, x * (1 / (1 - p)), 0)
