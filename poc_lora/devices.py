"""What depends on the kind of device: constants, and how tensors get there."""

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


def without_waiting(tensor: "torch.Tensor", device: "torch.device") -> "torch.Tensor":
    """Copy a CPU tensor to `device`. On CUDA the copy joins the queue; an ordinary one waits until the GPU is idle."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
