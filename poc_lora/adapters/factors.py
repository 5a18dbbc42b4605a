"""One module's LoRA factors, and the limits on factors from untrusted files."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from poc_lora.config import MAX_RANK
from poc_lora.errors import AdapterError, RequestError

MAX_NAME = 256
MAX_WIDTH = 2**20

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


@dataclass(frozen=True, repr=False)
class Factors:
    """One module's update ΔW = scale · B A, with A [r, d_in] and B [d_out, r]."""

    A: Tensor
    B: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1]:
            raise AdapterError(
                f"factors of shapes A {list(self.A.shape)} and B {list(self.B.shape)} have no product B A",
                fix="A is [r, d_in] and B is [d_out, r]",
            )

    def __repr__(self) -> str:
        return f"Factors(rank {self.rank}, ΔW {list(self.shape)}, scale {self.scale:g})"

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """The shape [d_out, d_in] of ΔW."""
        return self.B.shape[0], self.A.shape[1]

    def is_finite(self) -> bool:
        return math.isfinite(self.scale) and is_finite(self.A) and is_finite(self.B)


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor has neither NaN nor infinity, in one pass and without a copy."""
    # Minimum and maximum propagate NaN.
    return tensor.numel() == 0 or all(math.isfinite(bound.item()) for bound in torch.aminmax(tensor.detach()))


def check_dtype(dtype: torch.dtype) -> None:
    """Raises RequestError if an adapter's file cannot have the dtype."""
    if dtype not in DTYPES.values():
        raise RequestError(f"an adapter cannot be written in {dtype}", fix="use float32, bfloat16 or float16")


def check_name(module: str, where: str | Path) -> None:
    """Raises AdapterError if `module` is not a valid module path."""
    if len(module) > MAX_NAME or not _NAME.fullmatch(module):
        raise AdapterError(f"{module[:MAX_NAME]!r} is not a module path", where=where)


def check_shapes(module: str, A: tuple[int, ...], B: tuple[int, ...], where: str | Path) -> None:
    """Raises AdapterError unless A is [r, d_in] and B [d_out, r], within the limits on rank and width."""
    shapes = f"A {list(A)} and B {list(B)}"
    if len(A) != 2 or len(B) != 2 or A[0] != B[1]:
        raise AdapterError(f"{module} has factors {shapes}, not [r, d_in] and [d_out, r]", where=where)
    if not (1 <= A[0] <= MAX_RANK and 1 <= A[1] <= MAX_WIDTH and 1 <= B[0] <= MAX_WIDTH):
        raise AdapterError(f"{module} has factors {shapes}, outside rank {MAX_RANK} or width {MAX_WIDTH}", where=where)
