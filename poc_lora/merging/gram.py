"""Gram matrices of adapters' updates, and what is computed from them: norms, cosines and the merge variance.

A Gram matrix is [M, M] in float64, with entries ⟨ΔW_i, ΔW_j⟩. The matrices of all modules add up to that of the
whole updates.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from poc_lora.merging.stacked import StackedFactors


def gram(stacked: StackedFactors) -> Tensor:
    """Returns the Gram matrix [M, M] of one module's updates; an adapter without the module counts as zero.

    ⟨ΔW_i, ΔW_j⟩ = s_i s_j tr((B_jᵀ B_i)(A_i A_jᵀ)), so no [d_out, d_in] matrix is formed.
    """
    owned = functional.one_hot(stacked.owner, len(stacked.ranks)).to(stacked.A)  # [R, M]
    inner = owned.T @ (stacked.inner_A * stacked.inner_B) @ owned
    return (inner + inner.T) / 2


def cosine(inner: Tensor) -> Tensor:
    """Returns the pairwise cosines [M, M]; 0 if an update is zero."""
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
    """The mean cosine over pairs of different adapters; None for a single adapter."""
    M = len(inner)
    if M < 2:
        return None
    cosines = cosine(inner)
    return float(cosines.sum() - cosines.diagonal().sum()) / (M * (M - 1))


def variance(inner: Tensor) -> float | None:
    """S² = 1/(M−1) Σ_j ‖ΔW_j − mean‖², the unbiased variance of one adapter; None for a single adapter."""
    M = len(inner)
    if M < 2:
        return None
    return max(0.0, float(inner.diagonal().sum() - inner.sum() / M)) / (M - 1)


def merge_variance(inner: Tensor, weights: Sequence[float] | None = None) -> float | None:
    """S² Σ_j w_j², or S²/M for equal weights: the expected squared distance of the merge from the limit M → ∞."""
    squared = variance(inner)
    return None if squared is None else squared * float(_weights(inner, weights).square().sum())


def relative_standard_error(inner: Tensor, weights: Sequence[float] | None = None) -> float | None:
    """The square root of the merge variance over the merge's norm; None for one adapter or a merge of zero."""
    squared, w = merge_variance(inner, weights), _weights(inner, weights)
    norm = math.sqrt(max(0.0, float(w @ inner @ w)))
    return None if squared is None or norm == 0 else math.sqrt(squared) / norm


def next_move(inner: Tensor) -> float | None:
    """How far one more adapter is expected to move the average, over its norm: sqrt(S² / (M (M + 1))) / ‖mean‖.

    The average would move by (ΔW_{M+1} − mean) / (M + 1), whose expected square is S² (1 + 1/M) / (M + 1)².
    """
    M, squared = len(inner), variance(inner)
    norm = math.sqrt(max(0.0, float(inner.sum()))) / M
    return None if squared is None or norm == 0 else math.sqrt(squared / (M * (M + 1))) / norm


def _weights(inner: Tensor, weights: Sequence[float] | None) -> Tensor:
    M = len(inner)
    return torch.tensor(weights or [1 / M] * M, dtype=inner.dtype, device=inner.device)


def summary(inner: Tensor, weights: Sequence[float] | None = None) -> Mapping[str, float | None]:
    """Returns the statistics written to merge.json and metrics.jsonl."""
    return {
        "mean_cosine": mean_cosine(inner),
        "variance": variance(inner),
        "merge_variance": merge_variance(inner, weights),
        "relative_standard_error": relative_standard_error(inner, weights),
    }
