"""Constants that depend on the kind of device."""

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def by_device(values: Mapping[str, T], kind: str) -> T:
    """Returns the value for a `device.type`, from those for `cpu` and `cuda`.

    Every accelerator (mps, xpu, hpu, ...) gets CUDA's: like a GPU it is efficient on large batches and pays for each
    kernel launch.
    """
    return values["cpu" if kind == "cpu" else "cuda"]
