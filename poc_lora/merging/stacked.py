"""The factors of M adapters in one module, stacked: the input of every merge and comparison."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from poc_lora.adapters.factors import Factors

PANEL = 64  # rows of a Gram matrix computed at a time


@dataclass(frozen=True)
class StackedFactors:
    """The factors of M adapters in one module, R = Σ_j r_j; an adapter without the module has rank 0."""

    A: Tensor  # [R, d_in]
    B: Tensor  # [d_out, R], scales included
    ranks: list[int]  # [M]

    @cached_property
    def inner_A(self) -> Tensor:
        """A Aᵀ, [R, R]."""
        return gram_of_rows(self.A)

    @cached_property
    def inner_B(self) -> Tensor:
        """Bᵀ B, [R, R]."""
        return gram_of_rows(self.B.T)

    @cached_property
    def rank_tensor(self) -> Tensor:
        """`ranks` as an int64 tensor [M] on the factors' device."""
        return torch.tensor(self.ranks, device=self.A.device)

    @cached_property
    def owner(self) -> Tensor:
        """The adapter that each component belongs to, [R]."""
        # On the CPU, which knows the ranks: on a GPU the size of the result would be read back from the device.
        return torch.arange(len(self.ranks)).repeat_interleave(torch.tensor(self.ranks)).to(self.A.device)

    def adapter(self, j: int) -> tuple[Tensor, Tensor]:
        """One adapter's factors, A [r_j, d_in] and B [d_out, r_j]."""
        start = sum(self.ranks[:j])
        part = slice(start, start + self.ranks[j])
        return self.A[part], self.B[:, part]


def exact_device(device: torch.device) -> torch.device:
    """The device for float64 work on tensors of `device`: itself, or the CPU for a Mac's GPU, which has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def stack(members: Sequence[Factors | None]) -> StackedFactors:
    """Stack the factors of one module, in float64 with the scales in B.

    Args:
        members: Each adapter's factors, or None if it lacks the module; at least one has it.
    """
    present = [member for member in members if member is not None]
    ranks = [0 if member is None else member.rank for member in members]
    d_out, d_in = present[0].shape
    A = torch.empty(sum(ranks), d_in, dtype=torch.float64, device=exact_device(present[0].A.device))
    B = torch.empty(d_out, sum(ranks), dtype=torch.float64, device=A.device)
    start = 0
    for member in present:
        part = slice(start, start + member.rank)
        A[part] = member.A.detach()
        B[:, part] = member.B.detach()
        if member.scale != 1:
            B[:, part] *= member.scale
        start = part.stop
    return StackedFactors(A, B, ranks)


def gram_of_rows(X: Tensor) -> Tensor:
    """X Xᵀ, [R, R]. It is symmetric, so panels below the diagonal are copied and not computed."""
    out = X.new_empty(len(X), len(X))
    for start in range(0, len(X), PANEL):
        rows, below = slice(start, start + PANEL), slice(start + PANEL, None)
        out[rows, start:] = X[rows] @ X[start:].T
        out[below, rows] = out[rows, below].T
    return out
