"""Versions and hardware: what a bug report, a benchmark and run.json record."""

import contextlib
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from poc_lora import __version__

LIBRARIES = ("torch", "transformers", "safetensors", "huggingface_hub", "tokenizers")


def describe_device(device: torch.device) -> str:
    """What the rounding of one rank, and on a GPU its noise, depends on beside the libraries."""
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        return f"{gpu.name}, {gpu.multi_processor_count} multiprocessors"
    return f"{device.type}, {_processor()}, {torch.get_num_threads()} threads"


def changed_devices(before: Sequence[str], now: Sequence[str]) -> str | None:
    """Which results stop being bitwise reproducible when a run resumes on other devices; None if none."""
    if not before or set(before) == set(now):
        return None
    on_cpus = all(name.startswith("cpu,") for name in (*before, *now))
    changed = "rounding differs" if on_cpus else "rounding and the noise, which depends on the kind of GPU, differ"
    return (
        f"the run began on {' and '.join(sorted(set(before)))} and continues on {' and '.join(sorted(set(now)))}:"
        f" from here on it is no longer bitwise an uninterrupted run, since {changed}"
    )


def environment() -> dict[str, Any]:
    """Versions and hardware: what a bug report or a benchmark needs."""
    versions = {"poc_lora": __version__, "python": platform.python_version()}
    for library in (*LIBRARIES, "peft", "accelerate", "datasets", "bitsandbytes", "lm_eval"):
        with contextlib.suppress(PackageNotFoundError):
            versions[library] = version(library)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    machine = {
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }
    return {"versions": versions, "machine": machine}


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
