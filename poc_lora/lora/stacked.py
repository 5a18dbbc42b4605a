"""M adapters' factors in one module, side by side: what every merge and comparison is computed from."""

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from poc_lora.lora.factors import Factors


@dataclass(frozen=True)
class Stacked:
    """The factors of M adapters in one module; an adapter without the module has rank 0."""

    A: Tensor  # [R, d_in]
    B: Tensor  # [d_out, R], scales included
    ranks: list[int]  # [M]

    @cached_property
    def inner_A(self) -> Tensor:
        """A Aᵀ, [R, R]."""
        return self.A @ self.A.T

    @cached_property
    def inner_B(self) -> Tensor:
        """Bᵀ B, [R, R]."""
        return self.B.T @ self.B

    @cached_property
    def owner(self) -> Tensor:
        """Which adapter each component belongs to, [R]."""
        return torch.repeat_interleave(torch.arange(len(self.ranks)), torch.tensor(self.ranks)).to(self.A.device)

    def of(self, adapter: int) -> tuple[Tensor, Tensor]:
        """One adapter's factors, A [r, d_in] and B [d_out, r]."""
        start = sum(self.ranks[:adapter])
        part = slice(start, start + self.ranks[adapter])
        return self.A[part], self.B[:, part]


def stack(members: Sequence[Factors | None]) -> Stacked:
    """The members' factors in float64, with the scales in B. None is a member without this module; one has it."""
    present = [member for member in members if member is not None]
    ranks = [0 if member is None else member.rank for member in members]
    d_out, d_in = present[0].shape
    A = own_memory((sum(ranks), d_in), torch.float64, present[0].A.device)
    B = own_memory((d_out, sum(ranks)), torch.float64, present[0].B.device)
    start = 0
    for member in present:
        part = slice(start, start + member.rank)
        A[part] = member.A.detach()
        B[:, part] = member.B.detach()
        if member.scale != 1:
            B[:, part] *= member.scale
        start = part.stop
    return Stacked(A, B, ranks)


def own_memory(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty tensor; on the CPU in memory of its own, which goes back to the system with it.

    On the heap the results of a large merge would come to lie between its float64 temporaries, whose space the larger
    ones of the next module could not use.
    """
    if device.type != "cpu" or not math.prod(shape):
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype).view(tuple(shape))
