"""Frobenius norms and distances of products B A, computed from the factors."""

import torch
from torch import Tensor

from poc_lora.merging.stacked import StackedFactors

SLICE = 2**17  # numbers compared at a time, so that they stay in the cache


def product_norm(A: Tensor, B: Tensor) -> float:
    """‖B A‖, from the factors."""
    return float(max(0.0, float(((A @ A.T) * (B.T @ B)).sum())) ** 0.5)


def distance(A: Tensor, B: Tensor, other_A: Tensor, other_B: Tensor) -> float:
    """‖B A − B' A'‖, for products that differ; see `cast_distance` for nearly equal ones."""
    return product_norm(torch.cat([A, other_A]), torch.cat([B, -other_B], dim=1))


def cast_distance(A: Tensor, B: Tensor, cast_A: Tensor, cast_B: Tensor) -> float:
    """‖B A − B' A'‖ of nearly equal factors, computed without cancellation as (B − B') A + B' (A − A')."""
    if _holds(cast_A, A):  # a float32 average has the very A of its adapters
        return 0.0 if _holds(cast_B, B) else product_norm(A, B - cast_B)
    cast_A, cast_B = cast_A.to(A.dtype), cast_B.to(B.dtype)
    return product_norm(torch.cat([A, A - cast_A]), torch.cat([B - cast_B, cast_B], dim=1))


def _holds(cast: Tensor, original: Tensor) -> bool:
    """Whether a cast lost nothing; compared slice by slice, so that no large copy is made."""
    pairs = zip(torch.split(cast.reshape(-1), SLICE), torch.split(original.reshape(-1), SLICE), strict=True)
    return all(torch.equal(part.to(whole.dtype), whole) for part, whole in pairs)


def effective_rank(stacked: StackedFactors, weights: Tensor) -> float:
    """The participation ratio (Σσ²)² / Σσ⁴ of the average's singular values; 0 for an average of zero.

    The σ² are the eigenvalues of G = (A Aᵀ)(Bᵀ B), so Σσ² = tr G and Σσ⁴ = tr G². G is divided by its largest entry
    first, since fourth powers of large float32 factors overflow float64; the scale cancels.
    """
    w = weights[stacked.owner]
    G = stacked.inner_A @ (w[:, None] * stacked.inner_B * w)
    G = G / G.abs().max().clamp(min=torch.finfo(G.dtype).tiny)
    fourth = float((G * G.T).sum())
    return float(G.trace()) ** 2 / fourth if fourth > 0 else 0.0
