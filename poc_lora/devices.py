"""What depends on the kind of device: constants, sums by group, and how tensors get there."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


def by_device(values: Mapping[str, T], kind: str) -> T:
    """Returns the value for a `device.type`, from those for `cpu` and `cuda`.

    Every accelerator (mps, xpu, hpu, ...) gets CUDA's: like a GPU it is efficient on large batches and pays for each
    kernel launch.
    """
    return values["cpu" if kind == "cpu" else "cuda"]


def grouped_sums(values: "torch.Tensor", groups: "torch.Tensor", count: int) -> "torch.Tensor":
    """Sum the last dimension by groups, in an order that is the same each time, so that the bits are too.

    Args:
        values: [..., n].
        groups: The group of each, in [0, count), [n].

    Returns:
        [..., count].
    """
    sums = values.new_zeros(*values.shape[:-1], count)
    if values.device.type != "cuda":
        return sums.index_add_(-1, groups, values)
    # There index_add_ adds in whatever order its threads arrive; this sorts by group first.
    sums.movedim(-1, 0).index_put_((groups,), values.movedim(-1, 0), accumulate=True)
    return sums


def without_waiting(tensor: "torch.Tensor", device: "torch.device") -> "torch.Tensor":
    """Copy a CPU tensor to `device`. On CUDA the copy joins the queue; an ordinary one waits until the GPU is idle."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
