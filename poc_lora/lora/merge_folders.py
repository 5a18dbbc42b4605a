"""Adapter folders and runs in, one merged adapter folder out."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import poc_lora
from poc_lora.errors import AdapterError
from poc_lora.files import sha256_file
from poc_lora.lora.adapter import CONFIG_NAME, WEIGHTS_NAME, read_adapter, write_adapter
from poc_lora.lora.merge import merge

REPORT_NAME = "merge.json"


def merge_folders(
    sources: Sequence[Path],
    out: Path,
    *,
    rank: int | None = None,
    weights: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float32,
    allow_base_mismatch: bool = False,
) -> dict[str, Any]:
    """Merge adapters into the new folder `out`, and return what its merge.json says.

    A source is an adapter folder, or a run folder, which stands for its finished adapters in order; `weights`
    has one for each adapter. See `poc_lora.lora.merge.merge` for the method. The same inputs give the same
    bytes. Raises AdapterError, before anything is written, for sources that cannot be read or merged.
    """
    out = Path(out)
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise AdapterError("the output exists already", where=out, fix="choose another folder or empty this one")
    folders = [folder for source in sources for folder in find_adapters(Path(source))]
    # Read first: a damaged file is reported as such, and only plain files are hashed.
    adapters = [read_adapter(folder) for folder in folders]
    hashes = [sha256_file(folder / WEIGHTS_NAME) for folder in folders]
    _refuse_duplicates(folders, hashes)
    merged = merge(adapters, rank=rank, weights=weights, dtype=dtype, allow_base_mismatch=allow_base_mismatch)
    report: dict[str, Any] = {
        "method": "average",
        "requested_rank": rank,
        "dtype": str(dtype).removeprefix("torch."),
        "base_mismatch_allowed": allow_base_mismatch,
        "sources": [
            {"name": _name(folder), "sha256": digest, "base_model": adapter.base_model, "revision": adapter.revision}
            for folder, digest, adapter in zip(folders, hashes, adapters, strict=True)
        ],
        "versions": {
            "poc_lora": poc_lora.__version__,
            "torch": version("torch"),
            "safetensors": version("safetensors"),
        },
        **asdict(merged.report),
    }
    report["weights"] = list(merged.report.weights)
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    if out.exists():
        out.rmdir()
    write_adapter(merged.adapter, out, dtype=dtype, extra_files={REPORT_NAME: text})
    return report


def find_adapters(source: Path) -> list[Path]:
    """The adapter folders that `source` stands for: itself, or the finished ones of a run, by number."""
    if (source / CONFIG_NAME).exists() or (source / WEIGHTS_NAME).exists():
        return [source]
    inside = source / "adapters"
    if not inside.is_dir():
        raise AdapterError(
            "neither an adapter folder nor a run folder" if source.exists() else "no such folder",
            where=source,
            fix=f"give a folder with {CONFIG_NAME}, or a run with adapters/00, adapters/01, ...",
        )
    numbered = [folder for folder in inside.iterdir() if folder.name.isascii() and folder.name.isdigit()]
    finished = [folder for folder in numbered if (folder / CONFIG_NAME).exists() and (folder / WEIGHTS_NAME).exists()]
    if not finished:
        raise AdapterError("the run has no finished adapters", where=inside, fix="let it train to the end first")
    return sorted(finished, key=lambda folder: (int(folder.name), folder.name))


def _refuse_duplicates(folders: Sequence[Path], hashes: Sequence[str]) -> None:
    seen: dict[str, Path] = {}
    for folder, digest in zip(folders, hashes, strict=True):
        if digest in seen:
            raise AdapterError(
                f"the same weights as {seen[digest]}",
                where=folder,
                fix="give every adapter once; use weights to favour one",
            )
        seen[digest] = folder


def _name(folder: Path) -> str:
    """A name for provenance that does not tell where on this machine the folder lies."""
    parts = folder.resolve().parts
    return "/".join(parts[-3:] if len(parts) > 3 and parts[-2] == "adapters" else parts[-1:])
