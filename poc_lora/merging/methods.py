"""One module's adapters made one: the exact average and its best approximation, and three other ways.

Pure functions of float64 factors. A module of M adapters is A [R, d_in] and B [d_out, R], R = Σ_j r_j, with the scales
s_j in B, and the ranks r_j; an adapter without the module has rank 0. Each returns the factors of the merged update.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from poc_lora import rng
from poc_lora.merging.stacked import Stacked

SLICE = 2**17  # numbers compared at a time: they stay in the cache


def average(stacked: Stacked, weights: Tensor) -> tuple[Tensor, Tensor]:
    """ΔW = Σ_j w_j s_j B_j A_j, exactly: A stacked, and B with the weights in it."""
    return stacked.A, stacked.B * weights[stacked.owner]


@dataclass(frozen=True)
class Orthogonal:
    """The Q [m, k] of a QR decomposition, as the reflections that make it up: never formed, only applied."""

    reflections: Tensor
    tau: Tensor

    def __matmul__(self, other: Tensor) -> Tensor:
        """Q X for X [k, n], as [m, n]."""
        padded = functional.pad(other, (0, 0, 0, len(self.reflections) - len(other)))
        return torch.ormqr(self.reflections, self.tau, padded)


def qr(matrix: Tensor) -> tuple[Orthogonal, Tensor]:
    """Q [m, k] and R [k, n] of a matrix [m, n], k = min(m, n)."""
    reflections, tau = torch.geqrf(matrix)
    k = len(tau)
    return Orthogonal(reflections[:, :k], tau), reflections[:k].triu()


@dataclass(frozen=True)
class Decomposition:
    """The singular triples of a product B A, the largest first: B A = (Q_B U) diag(values) (Q_A V)ᵀ."""

    Q_A: Orthogonal
    Q_B: Orthogonal
    U: Tensor
    values: Tensor
    V: Tensor

    def truncated(self, rank: int) -> tuple[Tensor, Tensor]:
        """The nearest factors of at most that rank (Eckart and Young, 1936)."""
        root = self.values[:rank].sqrt()
        return (self.Q_A @ (self.V[:, :rank] * root)).T, self.Q_B @ (self.U[:, :rank] * root)

    def error(self, rank: int) -> float:
        """‖ΔW − its truncation‖ / ‖ΔW‖."""
        norm = float(torch.linalg.vector_norm(self.values))
        return float(torch.linalg.vector_norm(self.values[rank:])) / norm if norm else 0.0


def decompose(A: Tensor, B: Tensor, weights: Tensor | None = None) -> Decomposition:
    """The singular value decomposition of B A from its factors, or of B W A with W = diag(weights [R]).

    With Aᵀ = Q_A R_A and B = Q_B R_B, only the core R_B W R_Aᵀ [R, R] is left to decompose.
    """
    Q_A, R_A = qr(A.T)
    Q_B, R_B = qr(B)
    core = (R_B if weights is None else R_B * weights) @ R_A.T
    U, values, Vh = torch.linalg.svd(core, full_matrices=False)
    return Decomposition(Q_A, Q_B, U, values, Vh.T)


def canonical(stacked: Stacked) -> Stacked:
    """Every adapter's update factored anew into its singular triples: what its components are, whoever trained them."""
    parts = [decompose(*stacked.of(j)).truncated(r) if r else stacked.of(j) for j, r in enumerate(stacked.ranks)]
    A, B = torch.cat([A for A, _ in parts]), torch.cat([B for _, B in parts], dim=1)
    return Stacked(A, B, [len(A) for A, _ in parts])


def block(stacked: Stacked, weights: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """ΔW = Σ_j w_j (r_j / k_j) Σ_{i ≤ k_j} s_j b_i a_iᵀ: each adapter's first components, rescaled.

    The k_j are as equal as can be, with k_j ≤ r_j and Σ_j k_j = min(rank, Σ_j r_j). `rank` is at least M.
    """
    shares = [0] * len(stacked.ranks)
    for _ in range(min(rank, sum(stacked.ranks))):
        unfilled = [j for j, r in enumerate(stacked.ranks) if shares[j] < r]
        shares[min(unfilled, key=lambda j: shares[j])] += 1
    parts = []
    for j, (r, k) in enumerate(zip(stacked.ranks, shares, strict=True)):
        A, B = stacked.of(j)
        if k:
            parts.append((A[:k], B[:, :k] * (weights[j] * r / k)))
    return torch.cat([A for A, _ in parts]), torch.cat([B for _, B in parts], dim=1)


def random(stacked: Stacked, weights: Tensor, rank: int, key: int) -> tuple[Tensor, Tensor]:
    """ΔW = (1 / rank) Σ_t s_j r_j b_i a_iᵀ over `rank` draws (j, i), each with probability w_j / r_j.

    Drawn with replacement, so its mean is the average. An adapter without the module is drawn as zero.
    """
    M = len(stacked.ranks)
    ranks = torch.tensor(stacked.ranks, device=weights.device)
    draws = rng.uniform((2, rank), key).to(weights)
    j = torch.searchsorted(weights.cumsum(0), draws[0] * weights.sum(), right=True).clamp(max=M - 1)
    j = j[ranks[j] > 0]
    i = (draws[1, : len(j)] * ranks[j]).long()
    chosen = (ranks.cumsum(0) - ranks)[j] + i
    return stacked.A[chosen], stacked.B[:, chosen] * (ranks[j] / rank)


def soup(stacked: Stacked, weights: Tensor) -> tuple[Tensor, Tensor]:
    """ΔW = (Σ_j w_j s_j B_j) (Σ_i w_i A_i), smaller ranks padded with zeros: with the cross terms B_j A_i, i ≠ j."""
    r = max(stacked.ranks)
    A = stacked.A.new_zeros(r, stacked.A.shape[1])
    B = stacked.B.new_zeros(stacked.B.shape[0], r)
    for j, own in enumerate(stacked.ranks):
        A_j, B_j = stacked.of(j)
        A[:own] += weights[j] * A_j
        B[:, :own] += weights[j] * B_j
    return A, B


def product_norm(A: Tensor, B: Tensor) -> float:
    """‖B A‖, from the factors."""
    return max(0.0, float(((A @ A.T) * (B.T @ B)).sum())) ** 0.5


def distance(A: Tensor, B: Tensor, other_A: Tensor, other_B: Tensor) -> float:
    """‖B A − B' A'‖. Precise for products that differ much."""
    return product_norm(torch.cat([A, other_A]), torch.cat([B, -other_B], dim=1))


def cast_distance(A: Tensor, B: Tensor, cast_A: Tensor, cast_B: Tensor) -> float:
    """‖B A − B' A'‖ of factors that nearly agree: as (B − B') A + B' (A − A'), where nothing cancels."""
    if _holds(cast_A, A):  # a float32 average has the very A of its adapters
        return 0.0 if _holds(cast_B, B) else product_norm(A, B - cast_B)
    cast_A, cast_B = cast_A.to(A.dtype), cast_B.to(B.dtype)
    return product_norm(torch.cat([A, A - cast_A]), torch.cat([B - cast_B, cast_B], dim=1))


def _holds(cast: Tensor, original: Tensor) -> bool:
    """Whether a cast has lost nothing; slice by slice, so that nothing large is converted back."""
    pairs = zip(cast.reshape(-1).split(SLICE), original.reshape(-1).split(SLICE), strict=True)
    return all(torch.equal(part.to(whole.dtype), whole) for part, whole in pairs)


def effective_rank(stacked: Stacked, weights: Tensor) -> float:
    """(Σσ²)² / Σσ⁴ of the singular values of the average B A: the participation ratio, 0 for a product of zero.

    The σ² are the eigenvalues of G = (A Aᵀ)(Bᵀ B), so Σσ² = tr G and Σσ⁴ = tr G². The scale of G cancels, and is taken
    out first: the fourth power of large float32 products leaves the range of float64.
    """
    w = weights[stacked.owner]
    G = stacked.inner_A @ (w[:, None] * stacked.inner_B * w)
    G = G / G.abs().max().clamp(min=torch.finfo(G.dtype).tiny)
    fourth = float((G * G.T).sum())
    return float(G.trace()) ** 2 / fourth if fourth > 0 else 0.0
