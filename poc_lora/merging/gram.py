"""How alike adapters are, from their factors alone: Gram matrices, cosines, spread, and the merge's error bar."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from poc_lora.adapters.adapter import Adapter
from poc_lora.merging.stacked import StackedFactors, stack


@dataclass(frozen=True)
class Gram:
    """Inner products ⟨ΔW_i, ΔW_j⟩ of M adapters, [M, M] in float64: one matrix per module."""

    modules: dict[str, Tensor]

    @property
    def total(self) -> Tensor:
        """Over all modules: the Gram matrix of the whole updates."""
        return torch.stack(list(self.modules.values())).sum(0)


def gram(adapters: Sequence[Adapter]) -> Gram:
    """The Gram matrices of M adapters; a module that an adapter lacks counts as zero.

    ⟨ΔW_i, ΔW_j⟩ = s_i s_j tr((B_jᵀ B_i)(A_i A_jᵀ)), so nothing of size d_out × d_in is formed.
    """
    names = dict.fromkeys(name for adapter in adapters for name in adapter.modules)
    modules = {}
    for name in names:
        modules[name] = gram_of_stack(stack([adapter.modules.get(name) for adapter in adapters]))
    return Gram(modules)


def gram_of_stack(stacked: StackedFactors) -> Tensor:
    """The Gram matrix [M, M] of the products of a stack; see `gram` for the formula."""
    owned = functional.one_hot(stacked.owner, len(stacked.ranks)).to(stacked.A)  # [R, M]
    inner = owned.T @ (stacked.inner_A * stacked.inner_B) @ owned
    return (inner + inner.T) / 2


def cosine(inner: Tensor) -> Tensor:
    """Pairwise cosines [M, M] from a Gram matrix; 0 where an update is zero."""
    lengths = inner.diagonal().clamp(min=0).sqrt()
    scale = torch.outer(lengths, lengths)
    return torch.where(scale > 0, inner / scale.clamp(min=torch.finfo(inner.dtype).tiny), 0.0).clamp(-1, 1)


def pair_cosines(inner: Tensor) -> list[float]:
    """The cosines of the pairs i < j, row by row."""
    i, j = torch.triu_indices(len(inner), len(inner), offset=1)
    return cosine(inner)[i, j].tolist()


def norms(inner: Tensor) -> list[float]:
    """‖ΔW_j‖ of every adapter."""
    return inner.diagonal().clamp(min=0).sqrt().tolist()


def mean_cosine(inner: Tensor) -> float | None:
    """The mean cosine over pairs of different adapters; None for a single one."""
    M = len(inner)
    if M < 2:
        return None
    cosines = cosine(inner)
    return float(cosines.sum() - cosines.diagonal().sum()) / (M * (M - 1))


def spread(inner: Tensor) -> float | None:
    """S² = 1/(M−1) Σ_j ‖ΔW_j − mean‖²: the unbiased variance of one adapter around the limit of many.

    None for a single adapter, which says nothing about it.
    """
    M = len(inner)
    if M < 2:
        return None
    return max(0.0, float(inner.diagonal().sum() - inner.sum() / M)) / (M - 1)


def error_bar(inner: Tensor, weights: Sequence[float] | None = None) -> float | None:
    """S² Σ_j w_j², which is S²/M for equal weights: the expected squared distance of the average from the limit."""
    variance = spread(inner)
    return None if variance is None else variance * float(_weights(inner, weights).square().sum())


def relative_error_bar(inner: Tensor, weights: Sequence[float] | None = None) -> float | None:
    """The square root of the error bar over the norm of the average; None for one adapter or an average of zero."""
    squared, w = error_bar(inner, weights), _weights(inner, weights)
    norm = math.sqrt(max(0.0, float(w @ inner @ w)))
    return None if squared is None or norm == 0 else math.sqrt(squared) / norm


def next_move(inner: Tensor) -> float | None:
    """How far one more adapter would move the average, over its norm: sqrt(S² / (M (M + 1))) / ‖mean‖.

    The average moves by (ΔW_{M+1} − mean) / (M + 1), whose expected square is S² (1 + 1/M) / (M + 1)².
    """
    M, variance = len(inner), spread(inner)
    norm = math.sqrt(max(0.0, float(inner.sum()))) / M
    return None if variance is None or norm == 0 else math.sqrt(variance / (M * (M + 1))) / norm


def _weights(inner: Tensor, weights: Sequence[float] | None) -> Tensor:
    M = len(inner)
    return torch.tensor(weights or [1 / M] * M, dtype=inner.dtype, device=inner.device)


def summary(inner: Tensor, weights: Sequence[float] | None = None) -> Mapping[str, float | None]:
    """The figures of a Gram matrix that a report shows."""
    return {
        "mean_cosine": mean_cosine(inner),
        "spread": spread(inner),
        "error_bar": error_bar(inner, weights),
        "relative_error_bar": relative_error_bar(inner, weights),
    }
