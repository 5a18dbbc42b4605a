"""Merge adapter folders, runs and Hub ids into one adapter folder."""

import contextlib
import ctypes
import itertools
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

import poc_lora
from poc_lora.adapters.adapter import WEIGHTS_NAME, Adapter, open_adapter, shared_tokenizer, write_adapter
from poc_lora.adapters.sources import Source, find_sources, refuse_duplicates, tell_apart
from poc_lora.artifacts.merge_report import MergeReport, MergeSource, Versions
from poc_lora.artifacts.run_folder import MERGE_REPORT
from poc_lora.files import require_new, sha256_file
from poc_lora.lora.peft_targets import attachable
from poc_lora.merging.merge import merge, sweep_by_type
from poc_lora.merging.methods import METHODS
from poc_lora.merging.unchanged import drop_unchanged_tables
from poc_lora.progress import progress_bar

MODULES_PER_TRIM = 8


def merge_folders(
    sources: str | Path | Sequence[str | Path],
    out: str | Path | None,
    *,
    leave_out: Collection[Path] = (),
    method: str = "average",
    rank: int | None = None,
    rank_sweep: Sequence[int] = (),
    weights: Sequence[float] | None = None,
    canonical: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    allow_base_mismatch: bool = False,
    modules_to_save: Literal["same", "mean"] = "same",
) -> MergeReport:
    """Merge adapters into the new folder `out`; the same inputs give the same bytes.

    A tokenizer is written too if all sources have the same one. After an error nothing has been written. All adapters
    are merged: which ones `poc-lora merge RUN` leaves out says `poc_lora.reporting.screening.screen`.

    Args:
        sources: Adapter folders, run folders (for their finished adapters in order), folders of adapter folders, and
            Hub ids.
        out: The folder to create; it may exist if it is empty. None writes nothing.
        leave_out: Adapter folders among the sources that are not merged; merge.json names them.
        method, rank, rank_sweep, weights, canonical, seed, dtype, allow_base_mismatch, modules_to_save: As
            in `poc_lora.merging.merge.merge`.

    Returns:
        The contents of merge.json.

    Raises:
        AdapterError: A source cannot be read or merged.
        RequestError: The options do not go together, or `out` exists and is not an empty folder.
        WriteError: The disk could not be written to.
    """
    if out is not None:
        require_new(Path(out))
    given_sources = [sources] if isinstance(sources, str | Path) else sources
    found = tell_apart([source for given in given_sources for source in find_sources(given)])
    unwanted = {folder.resolve() for folder in leave_out}
    left_out = [source for source in found if source.folder.resolve() in unwanted]
    found = [source for source in found if source not in left_out]
    # Opened before hashing: a damaged file is reported as such, and only regular files are hashed.
    adapters = [open_adapter(source.folder, root=source.root) for source in found]
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(sha256_file, [source.folder / WEIGHTS_NAME for source in found]))
    refuse_duplicates(found, digests)
    merged_sources = [
        _described(source, adapter, digest) for source, adapter, digest in zip(found, adapters, digests, strict=True)
    ]
    adapters = drop_unchanged_tables(adapters)
    modules = {name for adapter in adapters for name in adapter.modules}
    done = itertools.count(1)
    with progress_bar(len(modules), f"merging {len(adapters)} adapters") as bar:

        def on_module(name: str) -> None:
            bar.advance()
            if next(done) % MODULES_PER_TRIM == 0:
                _trim_heap()

        merged = merge(
            adapters,
            method=method,
            rank=rank,
            rank_sweep=rank_sweep,
            weights=weights,
            canonical=canonical,
            seed=seed,
            dtype=dtype,
            allow_base_mismatch=allow_base_mismatch,
            modules_to_save=modules_to_save,
            on_module=on_module,
        )
    statistics: dict[str, Any] = dict(merged.report)
    if rank_sweep:
        statistics["rank_sweep"] = sweep_by_type(merged.report)
    report = MergeReport(
        method=method,
        requested_rank=rank,
        canonical=canonical,
        seed=seed if METHODS[method].random else None,
        dtype=str(dtype).removeprefix("torch."),
        base_mismatch_allowed=allow_base_mismatch,
        sources=merged_sources,
        left_out=[
            _described(source, open_adapter(source.folder, root=source.root), sha256_file(source.folder / WEIGHTS_NAME))
            for source in left_out
        ],
        versions=Versions(poc_lora=poc_lora.__version__, torch=version("torch"), safetensors=version("safetensors")),
        modules_to_save=sorted(merged.adapter.modules_to_save),
        modules_to_save_averaged=merged.averaged,
        embeddings=sorted(merged.adapter.embeddings),
        **statistics,
    )
    if out is not None:
        files: dict[str, str | bytes] = {
            MERGE_REPORT: report.dumps(),
            **shared_tokenizer([(source.folder, source.root) for source in found]),
        }
        write_adapter(attachable(merged.adapter), Path(out), dtype=dtype, extra_files=files)
    return report


def _described(source: Source, opened: Adapter, digest: str) -> MergeSource:
    return MergeSource(
        name=source.name,
        hub_commit=source.revision,
        sha256=digest,
        base_model=opened.base_model,
        base_revision=opened.revision,
    )


def _trim_heap() -> None:
    """Return freed memory to the system if the C library can.

    Otherwise the heap keeps the space of temporaries between the modules' results.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)
