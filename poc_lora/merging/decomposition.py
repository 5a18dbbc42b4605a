"""Singular value decompositions of products B A, computed from the factors."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from poc_lora.merging.stacked import StackedFactors


@dataclass(frozen=True)
class Orthogonal:
    """The Q [m, k] of a QR decomposition, kept as Householder reflections: applied, but never formed."""

    reflections: Tensor
    tau: Tensor

    def __matmul__(self, other: Tensor) -> Tensor:
        """Q X for X [k, n], as [m, n]."""
        padded = functional.pad(other, (0, 0, 0, len(self.reflections) - len(other)))
        return torch.ormqr(self.reflections, self.tau, padded)


def qr(matrix: Tensor) -> tuple[Orthogonal, Tensor]:
    """Returns Q [m, k] and R [k, n] of a matrix [m, n], with k = min(m, n)."""
    reflections, tau = torch.geqrf(matrix)
    k = len(tau)
    return Orthogonal(reflections[:, :k], tau), reflections[:k].triu()


@dataclass(frozen=True)
class Decomposition:
    """The singular triples of a product B A, largest first: B A = (Q_B U) diag(values) (Q_A V)ᵀ."""

    Q_A: Orthogonal
    Q_B: Orthogonal
    U: Tensor
    values: Tensor
    V: Tensor

    def truncated(self, rank: int) -> tuple[Tensor, Tensor]:
        """Returns the factors A, B of the nearest matrix of at most that rank (Eckart and Young, 1936)."""
        root = self.values[:rank].sqrt()
        return (self.Q_A @ (self.V[:, :rank] * root)).T, self.Q_B @ (self.U[:, :rank] * root)

    def error(self, rank: int) -> float:
        """The relative error of the truncation to `rank`, ‖ΔW − truncated‖ / ‖ΔW‖."""
        norm = float(torch.linalg.vector_norm(self.values))
        return float(torch.linalg.vector_norm(self.values[rank:])) / norm if norm else 0.0


def decompose(A: Tensor, B: Tensor, weights: Tensor | None = None) -> Decomposition:
    """Decompose B A, or B diag(weights) A with weights [R], from its factors.

    With Aᵀ = Q_A R_A and B = Q_B R_B, only the core R_B diag(weights) R_Aᵀ [R, R] is decomposed.
    """
    Q_A, R_A = qr(A.T)
    Q_B, R_B = qr(B)
    core = (R_B if weights is None else R_B * weights) @ R_A.T
    U, values, Vh = torch.linalg.svd(core, full_matrices=False)
    return Decomposition(Q_A, Q_B, U, values, Vh.T)


def canonical_factors(stacked: StackedFactors) -> StackedFactors:
    """Refactor each adapter's update into its singular triples, so that its components do not depend on training."""
    parts = [
        decompose(*stacked.adapter(j)).truncated(r) if r else stacked.adapter(j) for j, r in enumerate(stacked.ranks)
    ]
    A, B = torch.cat([A for A, _ in parts]), torch.cat([B for _, B in parts], dim=1)
    return StackedFactors(A, B, [len(A) for A, _ in parts])
