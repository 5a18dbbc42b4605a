"""Numbered commits of a run's state: atomic, checksummed, one file per adapter.

    checkpoints/commit_00007/  manifest.json  adapter_00.safetensors  adapter_01.safetensors ...

The manifest gives every adapter's step and status, its place, and the checksum of every file. There is no random
state: draws are keyed, so weights, moments and step are all there is. Every rank writes the adapters it trains; rank 0
adds the manifest and makes all of it a commit by one rename.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from poc_lora.errors import CheckpointError, PocLoraError, RequestError
from poc_lora.files import publish_folder, read_json, sha256_file, sync, write_json
from poc_lora.lora.bank import AdapterBank
from poc_lora.optim.noisy_adamw import NoisyAdamW
from poc_lora.ranks import Ranks

MANIFEST = "manifest.json"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Progress:
    """How far one adapter has come. `status`: training, finished, or diverged (frozen at `step`)."""

    step: int
    status: str = "training"


@dataclass(frozen=True)
class Placement:
    """The work of all ranks: in each round every rank trains one pack, of adapters that have come equally far."""

    rounds: list[list[list[int]]]  # of each round, of each rank, the adapters that train together; may be none
    per_device: int  # the most adapters of a pack


@dataclass(frozen=True)
class Commit:
    """A verified commit on disk."""

    folder: Path
    number: int
    progress: dict[int, Progress]
    placement: Placement


class Commits:
    """The commits under `root`, made by all ranks at once; the newest `keep` stay."""

    def __init__(self, root: Path, ranks: Ranks, *, keep: int):
        self.root, self.keep, self._ranks = root, keep, ranks
        self._number = max(_numbers(root), default=0)

    def save(
        self,
        placement: Placement,
        progress: dict[int, Progress],
        bank: AdapterBank | None,
        optimizer: NoisyAdamW | None,
        message: Any = None,
        receive: Callable[[list[Any]], None] = lambda messages: None,
    ) -> list[Any]:
        """Write the next commit, and remove older ones once it has been verified.

        progress: of all adapters; each rank's word counts for those placed on it, and is brought up to date for the
        others. bank, optimizer: hold the adapters that this rank trains at present; finished ones need only their
        line in `progress`. message: for the other ranks; returns the messages of all, which rank 0 has been given by
        `receive` before the commit stands.
        Raises CheckpointError where it cannot be written; the commits before it stand.
        """
        self._number += 1
        folder = self.root / f"commit_{self._number:05d}"
        aside = self.root / f".{folder.name}"
        mine = {a for packs in placement.rounds for a in packs[self._ranks.rank]}
        with self._explaining(folder, aside, bank):
            files = _write_adapters(aside, progress, bank, optimizer)
            report = {"files": files, "adapters": _plain(progress, mine), "message": message}
            reports = self._ranks.gather(report)
            for report in reports:
                progress |= {int(a): Progress(**state) for a, state in report["adapters"].items()}
            messages = [report["message"] for report in reports]
            if self._ranks.rank == 0:
                receive(messages)
                manifest = {
                    "commit": self._number,
                    "adapters": _plain(progress, progress),
                    "placement": asdict(placement),
                    "files": {name: facts for report in reports for name, facts in report["files"].items()},
                }
                write_json(aside / MANIFEST, manifest)
                publish_folder(aside, folder)
                _verify(folder)
                for old in sorted(_numbers(self.root))[: -self.keep]:
                    shutil.rmtree(self.root / f"commit_{old:05d}", ignore_errors=True)
            self._ranks.gather("committed")
        return messages

    @contextlib.contextmanager
    def _explaining(self, folder: Path, aside: Path, bank: AdapterBank | None) -> Iterator[None]:
        """What goes wrong in the block leaves no half of a commit, and says what was wanted."""
        try:
            yield
        except (OSError, SafetensorError, RequestError) as problem:
            reason = problem.what if isinstance(problem, PocLoraError) else str(problem)
            shutil.rmtree(aside, ignore_errors=True)
            needed = 0 if bank is None else 4 * (1 + len(MOMENTS)) * bank.weights.numel()
            raise CheckpointError(
                f"commit {self._number} could not be written: {reason}"
                f" (it takes {needed:,} bytes, {shutil.disk_usage(self.root).free:,} are free)",
                where=folder,
                fix="make room or mend the folder; the run goes on from the commit before with --resume",
            ) from None


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
            return Commit(folder, number, progress, Placement(**manifest["placement"])), problems
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


def _write_adapters(
    aside: Path, progress: dict[int, Progress], bank: AdapterBank | None, optimizer: NoisyAdamW | None
) -> dict[str, Any]:
    """Write the adapters in training, each to a file of its own; returns what the manifest says of them."""
    aside.mkdir(parents=True, exist_ok=True)  # all ranks write to one folder
    files = {}
    for slot, adapter in enumerate(bank.adapters if bank else []):
        if progress[adapter].status == "training" and bank is not None and optimizer is not None:
            path = aside / _file_name(adapter)
            save_file(_state(bank, optimizer, slot), path, metadata={"format": "pt"})
            sync(path)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    return files


def _state(bank: AdapterBank, optimizer: NoisyAdamW, slot: int) -> dict[str, torch.Tensor]:
    row = bank.rows[slot]
    moments = {name: optimizer.state[row].get(name, torch.zeros_like(row)) for name in MOMENTS}
    return {name: t.detach().cpu().clone() for name, t in {"weights": row, **moments}.items()}


def _plain(progress: dict[int, Progress], adapters: Iterable[int]) -> dict[str, dict[str, Any]]:
    return {str(adapter): asdict(progress[adapter]) for adapter in sorted(adapters)}


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
