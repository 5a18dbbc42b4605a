"""Numbered commits of a run's state: atomic, checksummed, one file per adapter.

    checkpoints/commit_00007/  manifest.json  adapter_00.safetensors  adapter_01.safetensors ...

The manifest gives every adapter's step and status, and the checksum of every file. There is no random
state: draws are keyed, so weights, moments and step are all there is.
"""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from poc_lora.errors import CheckpointError, PocLoraError, RequestError
from poc_lora.files import commit_folder, read_json, sha256_file, write_json
from poc_lora.lora.bank import AdapterBank
from poc_lora.optim.noisy_adamw import NoisyAdamW

MANIFEST = "manifest.json"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Progress:
    """How far one adapter has come. `status`: training, finished, or diverged (frozen at `step`)."""

    step: int
    status: str = "training"


@dataclass(frozen=True)
class Commit:
    """A verified commit on disk."""

    folder: Path
    number: int
    progress: dict[int, Progress]
    pack: list[int]  # the adapters under way together, in their order; empty between packs


def save_commit(
    root: Path, progress: dict[int, Progress], bank: AdapterBank | None, optimizer: NoisyAdamW | None, *, keep: int
) -> Path:
    """Write the next commit under `root` and remove all but the newest `keep`, once it has been verified.

    `bank` and `optimizer` hold the adapters in training; finished ones need only their line in `progress`.
    """
    numbers = sorted(_numbers(root))
    number = numbers[-1] + 1 if numbers else 1
    folder = root / f"commit_{number:05d}"
    with commit_folder(folder) as aside:
        if bank is not None and optimizer is not None:
            for slot, adapter in enumerate(bank.adapters):
                if progress[adapter].status == "training":
                    save_file(_state(bank, optimizer, slot), aside / _file_name(adapter), metadata={"format": "pt"})
        files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256_file(p)} for p in sorted(aside.iterdir())}
        pack = [] if bank is None else bank.adapters
        adapters = {str(adapter): asdict(state) for adapter, state in sorted(progress.items())}
        write_json(aside / MANIFEST, {"commit": number, "adapters": adapters, "pack": pack, "files": files})
    _verify(folder)
    for old in numbers[: max(0, len(numbers) + 1 - keep)]:
        shutil.rmtree(root / f"commit_{old:05d}", ignore_errors=True)
    return folder


def newest_commit(root: Path) -> tuple[Commit | None, list[str]]:
    """The newest commit that verifies, or None where none was ever made, and what was wrong with newer ones.

    Raises CheckpointError when there are commits but none is intact.
    """
    problems: list[str] = []
    numbers = sorted(_numbers(root), reverse=True)
    for number in numbers:
        folder = root / f"commit_{number:05d}"
        try:
            manifest = _verify(folder)
            progress = {int(a): Progress(**state) for a, state in manifest["adapters"].items()}
            return Commit(folder, number, progress, [int(a) for a in manifest["pack"]]), problems
        except (PocLoraError, KeyError, TypeError, ValueError, AttributeError) as problem:
            problems.append(f"{folder}: {problem}")
    if numbers:
        raise CheckpointError("no commit of this run is intact:\n  " + "\n  ".join(problems), where=root)
    return None, problems


def restore(commit: Commit, bank: AdapterBank, optimizer: NoisyAdamW) -> None:
    """Put the commit's weights, moments and step counts back, bitwise; an adapter that had diverged stays dropped.

    Raises CheckpointError.
    """
    for slot, adapter in enumerate(bank.adapters):
        if commit.progress[adapter].status == "diverged":
            bank.drop(slot)
            continue
        path, step = commit.folder / _file_name(adapter), commit.progress[adapter].step
        try:
            state = load_file(path)
        except (SafetensorError, OSError) as problem:
            raise CheckpointError(f"cannot be read: {problem}", where=path) from None
        row, group = bank.rows[slot], optimizer.param_groups[slot]
        if any(name not in state or state[name].shape != row.shape for name in ("weights", *MOMENTS)):
            raise CheckpointError("the saved adapter has other shapes than this run", where=path)
        with torch.no_grad():
            row.copy_(state["weights"])
        moments = {name: state[name].to(row.device) for name in MOMENTS}
        optimizer.state[row] = {"step": torch.tensor(float(step), device=row.device), **moments}
        group["noise_step"] = step


def _state(bank: AdapterBank, optimizer: NoisyAdamW, slot: int) -> dict[str, torch.Tensor]:
    row = bank.rows[slot]
    moments = {name: optimizer.state[row].get(name, torch.zeros_like(row)) for name in MOMENTS}
    return {name: t.detach().cpu().clone() for name, t in {"weights": row, **moments}.items()}


def _file_name(adapter: int) -> str:
    return f"adapter_{adapter:02d}.safetensors"


def _numbers(root: Path) -> Sequence[int]:
    return [int(p.name.removeprefix("commit_")) for p in root.glob("commit_*") if p.name[7:].isdigit()]


def _verify(folder: Path) -> dict[str, Any]:
    manifest = read_json(folder / MANIFEST, error=RequestError)
    for name, expected in manifest["files"].items():
        path = folder / Path(name).name
        if not path.is_file() or path.stat().st_size != expected["bytes"] or sha256_file(path) != expected["sha256"]:
            raise CheckpointError("missing, truncated or changed since it was written", where=path)
    return manifest
