"""Functions of tensors that are compiled to one kernel while `fusing` is on, and run operation by operation else."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

# Of the process, not of a thread: autograd computes gradients in threads of its own.
_depth = 0


@contextlib.contextmanager
def fusing() -> Iterator[None]:
    """Within the block, functions marked `fusable` run compiled."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1


def is_fusing() -> bool:
    """Whether functions marked `fusable` run compiled now."""
    return _depth > 0


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """`function` by torch.compile, once for all shapes."""
    return torch.compile(function, dynamic=True)


def fusable(function: Callable[P, R]) -> Callable[P, R]:
    """Mark a function of tensors that is memory-bound, so that compiling it pays: see `fusing`."""
    made: list[Callable[P, R]] = []

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not _depth:
            return function(*args, **kwargs)
        if not made:
            # Rows are many enough; split, a row's sum would take more kernels and more reads, not one of two.
            made.append(torch.compile(function, dynamic=True, options={"split_reductions": False}))
        return made[0](*args, **kwargs)

    return run
