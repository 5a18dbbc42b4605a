"""Ways to make one update of a module from those of M adapters: the mean, truncations of it, and its rivals."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from poc_lora import rng
from poc_lora.merging.decomposition import decompose

RIDGE = 1e-3  # added to the second moments, as a share of their mean diagonal
NONE = torch.empty(0)


class Update(NamedTuple):
    """A module's ΔW [d_out, d_in]: B A, or A where there is no B."""

    A: Tensor
    B: Tensor | None = None


@dataclass(frozen=True)
class Module:
    """One module of M adapters, in float64."""

    path: str
    seed: int
    A: Tensor  # [M, r, d_in]
    B: Tensor  # [M, d_out, r], with the scale
    moments: Tensor = NONE  # E[x xᵀ] of its inputs [d_in, d_in]

    @property
    def stacked(self) -> tuple[Tensor, Tensor]:
        """A [M·r, d_in] and B [d_out, M·r], whose product is the sum of all updates."""
        return self.A.flatten(0, 1), self.B.transpose(0, 1).flatten(1)

    @property
    def deltas(self) -> Tensor:
        """Every adapter's ΔW, float32 [M, d_out, d_in]."""
        return (self.B @ self.A).float()


def mean(module: Module) -> Update:
    """ΔW = 1/M Σ_j B_j A_j."""
    A, B = module.stacked
    return Update(A, B / len(module.A))


def truncated(module: Module, rank: int) -> Update:
    """The nearest ΔW' of that rank to the mean, by ‖ΔW − ΔW'‖."""
    A, B = mean(module)
    return Update(*decompose(A, B).truncated(rank))  # type: ignore[arg-type]


def weighted(module: Module, rank: int) -> Update:
    """The nearest ΔW' of that rank to the mean, by E‖(ΔW − ΔW') x‖² = ‖(ΔW − ΔW') L‖² with L Lᵀ = E[x xᵀ] + ridge."""
    A, B = mean(module)
    diagonal = module.moments.diagonal()
    L = torch.linalg.cholesky(module.moments + torch.diag(RIDGE * diagonal.mean().expand(len(diagonal))))
    A_L, B_L = decompose(A @ L, B).truncated(rank)  # type: ignore[arg-type]
    return Update(torch.linalg.solve_triangular(L, A_L, upper=False, left=False), B_L)


def soup(module: Module) -> Update:
    """The mean of B times the mean of A."""
    return Update(module.A.mean(0), module.B.mean(0))


def trim(tensors: Tensor, density: float) -> Tensor:
    """Keep that share of each of M tensors [M, ...], the entries of largest magnitude."""
    magnitude = tensors.abs().flatten(1)
    n = magnitude.shape[1]
    least = magnitude.kthvalue(n - max(1, int(density * n)) + 1, dim=1).values
    return tensors * (magnitude >= least[:, None]).view_as(tensors)


def elect(tensors: Tensor) -> Tensor:
    """The mean over those of M tensors [M, ...] that have the sign of their sum, entry by entry."""
    sign = torch.where(tensors.sum(0) >= 0, 1, -1)
    agrees = tensors.sign() == sign
    return (tensors * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def ties(module: Module, density: float) -> Update:
    """TIES (Yadav et al., 2023): trim every ΔW, elect a sign for every entry, and average those that have it."""
    return Update(elect(trim(module.deltas, density)))


def dropped(module: Module, p: float) -> Tensor:
    """DARE (Yu et al., 2024): every ΔW with each entry set to zero with probability p, and the others over 1 − p."""
    deltas = module.deltas
    for j, delta in enumerate(deltas):
        draws = rng.uniform(tuple(delta.shape), rng.key(module.seed, j, "dare", 0, module.path))
        delta *= (draws >= p) / (1 - p)
    return deltas


def dare(module: Module, p: float) -> Update:
    """The mean of what DARE keeps."""
    return Update(dropped(module, p).mean(0))


def dare_ties(module: Module, p: float) -> Update:
    """The signs of TIES elected among what DARE keeps."""
    return Update(elect(dropped(module, p)))


def knots_ties(module: Module, density: float) -> Update:
    """KnOTS (Stoica et al., 2025): with [ΔW_1 … ΔW_M] = U S [V_1ᵀ … V_Mᵀ], the TIES merge of the V_jᵀ after U S."""
    Q_B, R_B = torch.linalg.qr(module.stacked[1])
    Q_A, R_A = torch.linalg.qr(module.A.transpose(1, 2))  # of each A_jᵀ
    U, S, Vh = torch.linalg.svd(R_B @ torch.block_diag(*R_A.transpose(1, 2)), full_matrices=False)
    V = Vh.unflatten(1, (len(module.A), -1)).transpose(0, 1) @ Q_A.transpose(1, 2)  # [M, k, d_in]
    return Update(elect(trim(V, density)), Q_B @ (U * S))


def compressed(module: Module, rank: int) -> Update:
    """Compress, then merge: ΔW = U (1/M Σ_j Uᵀ ΔW_j V) Vᵀ with orthonormal U and V of that rank.

    U and V keep as much of Σ_j ‖Uᵀ ΔW_j V‖² as alternating maximisation finds (Ye, 2005), from the largest directions
    of [ΔW_1 … ΔW_M] on.
    """
    A, B = module.stacked
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.T)
    M = len(module.A)
    R_B, R_A = (R.unflatten(1, (M, -1)).transpose(0, 1) for R in (R_B, R_A))
    cores = R_B @ R_A.transpose(1, 2)  # ΔW_j = Q_B core_j Q_Aᵀ
    V = torch.eye(cores.shape[2], dtype=cores.dtype)
    for _ in range(20):
        U = _largest(cores @ V, rank)
        V = _largest(cores.transpose(1, 2) @ U, rank)
    return Update((Q_A @ V).T, Q_B @ (U @ (U.T @ cores.mean(0) @ V)))


def _largest(tensors: Tensor, rank: int) -> Tensor:
    """The eigenvectors of the largest eigenvalues of Σ_j X_j X_jᵀ, as columns."""
    vectors: Tensor = torch.linalg.eigh((tensors @ tensors.transpose(1, 2)).sum(0)).eigenvectors
    return vectors[:, -rank:]


METHODS: dict[str, Callable[[Module], Update]] = {
    "mean": mean,
    "mean, rank 16": lambda module: truncated(module, 16),
    "mean, rank 16, weighted by inputs": lambda module: weighted(module, 16),
    "mean, rank 32": lambda module: truncated(module, 32),
    "mean, rank 32, weighted by inputs": lambda module: weighted(module, 32),
    "compress, then merge, rank 16": lambda module: compressed(module, 16),
    "soup of A and B": soup,
    "TIES, density 0.2": lambda module: ties(module, 0.2),
    "TIES, density 0.5": lambda module: ties(module, 0.5),
    "KnOTS-TIES, density 0.2": lambda module: knots_ties(module, 0.2),
    "DARE, drop 0.5": lambda module: dare(module, 0.5),
    "DARE, drop 0.9": lambda module: dare(module, 0.9),
    "DARE-TIES, drop 0.5": lambda module: dare_ties(module, 0.5),
}
