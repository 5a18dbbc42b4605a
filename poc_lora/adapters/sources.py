"""Find adapters in folders, runs and on the Hugging Face Hub."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import DryRunError, RemoteEntryNotFoundError

from poc_lora.adapters.adapter import CONFIG_NAME, MAX_TOKENIZER_BYTES, TOKENIZER_FILES, WEIGHTS_NAME
from poc_lora.adapters.weights_file import MAX_WEIGHTS_BYTES
from poc_lora.artifacts.run_folder import RunFolder
from poc_lora.errors import AdapterError, first_line
from poc_lora.files import links_root, system_errors_as
from poc_lora.hub_ids import is_adapter_id, split_revision


@dataclass(frozen=True)
class Source:
    """One adapter's folder."""

    folder: Path
    name: str  # for reports, which do not name local folders in full
    root: Path  # symbolic links in the folder may not lead out of this one
    revision: str | None = None  # the commit of a Hub repository


def find_sources(source: str | Path) -> list[Source]:
    """Find the adapters of a source.

    Args:
        source: An adapter folder; a run folder, for its finished adapters by number; a folder of adapter folders, by
            number or name; or a Hub id, org/name or org/name@revision, if there is no such folder. An adapter on the
            Hub is downloaded into the cache, with the tokenizer or chat template beside it.

    Raises:
        AdapterError: There is no adapter, or it cannot be downloaded.
    """
    path = Path(source)
    with system_errors_as(AdapterError, "cannot be read", source):
        if is_adapter_id(source):
            return [_fetch(*split_revision(source))]
        return [
            Source(folder, _name(folder), path if path.resolve() != folder.resolve() else links_root(folder))
            for folder in find_adapters(path)
        ]


def find_adapters(source: Path) -> list[Path]:
    """Returns an adapter folder itself, a run's finished adapters by number, or a folder's adapter folders in order.

    Raises AdapterError.
    """
    if _has_adapter(source):
        return [source]
    inside = RunFolder(source).adapters
    is_run = RunFolder(source).is_run  # whose merge is none of its adapters
    if not inside.is_dir() and not is_run:
        folders = source.iterdir() if source.is_dir() else ()
        found = [folder for folder in folders if _has_adapter(folder)]
        if found:
            return sorted(found, key=_by_number)
        raise AdapterError(
            "no adapter folder, no run, and no folder of adapters" if source.exists() else "no such folder",
            where=source,
            fix=f"give a folder with {CONFIG_NAME}, a run with adapters/00, adapters/01, ..., or a Hub id org/name",
        )
    folders = inside.iterdir() if inside.is_dir() else ()
    numbered = [folder for folder in folders if folder.name.isascii() and folder.name.isdigit()]
    finished = [folder for folder in numbered if (folder / CONFIG_NAME).exists() and (folder / WEIGHTS_NAME).exists()]
    if not finished:
        fix = "let it finish training first; if every adapter diverged, train it anew with a lower optim.lr"
        raise AdapterError("the run has no finished adapters", where=source, fix=fix)
    return sorted(finished, key=_by_number)


def _has_adapter(folder: Path) -> bool:
    return (folder / CONFIG_NAME).exists() or (folder / WEIGHTS_NAME).exists()


def _by_number(folder: Path) -> tuple[list[tuple[int, str]], str]:
    """Sorts by the numbers in a name: 2 before 10, adapter-2 before adapter-10."""
    parts = re.split(r"([0-9]+)", folder.name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts], folder.name


def tell_apart(sources: Sequence[Source]) -> list[Source]:
    """Returns the sources with names that differ: of folders of one name, with as many parents as it takes."""
    told = list(sources)
    for depth in range(2, max((len(source.folder.resolve().parts) for source in told), default=0) + 1):
        seen = Counter(source.name for source in told)
        told = [
            replace(source, name="/".join(source.folder.resolve().parts[-depth:]))
            if seen[source.name] > 1 and source.revision is None and source.name.count("/") < depth - 1
            else source
            for source in told
        ]
    return told


def refuse_duplicates(sources: Sequence[Source], hashes: Sequence[str]) -> None:
    """Raises AdapterError if two sources have the same weights."""
    seen: dict[str, Source] = {}
    for source, digest in zip(sources, hashes, strict=True):
        if digest in seen:
            raise AdapterError(
                f"the same weights as {seen[digest].folder}",
                where=source.folder,
                fix="give every adapter once; use weights to favour one",
            )
        seen[digest] = source


def _fetch(repo: str, revision: str | None) -> Source:
    try:
        config = Path(hf_hub_download(repo, CONFIG_NAME, revision=revision))
        folder = config.parent  # models--org--name/snapshots/COMMIT, whose files are links into blobs/
        # From the same commit, even if the branch has moved in the meantime.
        planned: Any = hf_hub_download(repo, WEIGHTS_NAME, revision=folder.name, dry_run=True)
        if planned.file_size > MAX_WEIGHTS_BYTES:
            raise AdapterError(f"{WEIGHTS_NAME} has {planned.file_size:,} bytes, more than any adapter", where=repo)
        hf_hub_download(repo, WEIGHTS_NAME, revision=folder.name)
        _fetch_tokenizer(repo, folder.name)
    except AdapterError:
        raise
    except RemoteEntryNotFoundError as problem:
        raise AdapterError(
            f"the repository lacks {CONFIG_NAME} or {WEIGHTS_NAME}",
            where=repo,
            fix="if its weights are a pickle (.bin) and you trust it, convert it with PEFT: "
            "PeftModel.from_pretrained(base, ID).save_pretrained(FOLDER)",
        ) from problem
    except Exception as problem:  # huggingface_hub raises many kinds
        raise AdapterError(
            f"no folder here, and it cannot be fetched from the Hub: {first_line(problem)}",
            where=repo,
            fix="check the name, the network, and, if it is private, that you are logged in (hf auth login)",
        ) from problem
    return Source(folder, f"{repo}@{folder.name}", folder.parents[1], folder.name)


def _fetch_tokenizer(repo: str, commit: str) -> None:
    """Download the tokenizer or chat template that lies beside an adapter; offline the cache is all there is."""
    wanted = list(TOKENIZER_FILES)
    try:
        planned = snapshot_download(repo, revision=commit, allow_patterns=wanted, dry_run=True)
    except DryRunError:
        return
    for file in planned:
        if (file.file_size or 0) > MAX_TOKENIZER_BYTES:
            what = f"{file.filename} has {file.file_size:,} bytes, more than any tokenizer"
            raise AdapterError(what, where=repo)
    if planned:
        snapshot_download(repo, revision=commit, allow_patterns=wanted)


def _name(folder: Path) -> str:
    parts = folder.resolve().parts
    return "/".join(parts[-3:] if len(parts) > 3 and parts[-2] == "adapters" else parts[-1:])
