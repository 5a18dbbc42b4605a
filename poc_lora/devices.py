"""What depends on the kind of device that a tensor is on."""

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def by_device(values: Mapping[str, T], kind: str) -> T:
    """The value for a kind of device (`device.type`), from those for `cpu` and `cuda`.

    Every accelerator (mps, xpu, hpu, ...) gets CUDA's: like a GPU it wants much work at once, and a launch costs.
    """
    return values["cpu" if kind == "cpu" else "cuda"]
