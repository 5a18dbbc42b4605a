"""What is uploaded of an adapter or a run: files by an allow-list, each of them such as we would read ourselves.

Nothing else in a folder is opened, links are never followed, and nothing is written: what differs from the local
files, such as a base model's name in place of its path, differs in memory only.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from poc_lora.config import RunConfig, load_config
from poc_lora.errors import AdapterError, RequestError, RunError
from poc_lora.evaluation.control import folder_name
from poc_lora.evaluation.results import RESULTS_FILE, Results, Scored, read_results
from poc_lora.files import read_json, sha256_file
from poc_lora.lora.adapter import CONFIG_NAME, WEIGHTS_NAME, Adapter, open_adapter
from poc_lora.lora.merge_folders import REPORT_NAME
from poc_lora.lora.sources import find_adapters
from poc_lora.reporting.tables import REPORT_FILE, markdown

FIGURES = (".png", ".svg")
PROTOCOLS = ("label", "generate", "harness")  # whose results are taken, in this order
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)


@dataclass(frozen=True)
class File:
    """A file of the upload: its path in the repository, and the local file or the bytes that it is."""

    path: str
    content: Path | bytes

    @property
    def size(self) -> int:
        """Its length in bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    def sha256(self) -> str:
        """What the Hub knows a large file by, in hex."""
        return (
            hashlib.sha256(self.content).hexdigest() if isinstance(self.content, bytes) else sha256_file(self.content)
        )

    def blob_id(self) -> str:
        """What git knows a small file by, in hex."""
        data = self.content if isinstance(self.content, bytes) else self.content.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class Evaluation:
    """An evaluation that the adapter took part in: its own accuracy there, and what the tables call it."""

    results: Results
    scored: Scored
    row: str


@dataclass(frozen=True)
class Subject:
    """An adapter to upload, and what is known of it for certain; what is not known is None or empty.

    base_model: its Hub id. task: PEFT's task_type. ranks: those of its modules. whole: whether it has modules that
    were trained whole. members: the single adapters that are uploaded with it. merge: its merge.json. config, run:
    the configuration and run.json that all its adapters were trained under. left_out: what the allow-list has but
    is not uploaded, with the reason.
    """

    files: tuple[File, ...]
    base_model: str
    base_revision: str | None
    task: str | None
    ranks: tuple[int, ...]
    whole: bool
    members: tuple[str, ...] = ()
    merge: dict[str, Any] | None = None
    config: RunConfig | None = None
    run: dict[str, Any] = field(default_factory=dict)
    evaluation: Evaluation | None = None
    left_out: dict[str, str] = field(default_factory=dict)


def collect(source: Path, *, members: bool = False, base_model: str | None = None) -> Subject:
    """The files to upload of `source`, an adapter's folder, or a run's, which stands for its merged adapter.

    members: with the run's single adapters, in adapters/00 and so on. base_model: the Hub id of the base model, for
    adapters that name a local folder. Raises AdapterError for adapters that we would not read, or that are links;
    RunError for a run without a merge; RequestError where the base model has no name for others.
    """
    source = Path(os.path.abspath(source))
    folder, run = _adapter_and_run(source, members)
    adapter, ranks = _read(folder)
    base = _hub_name(adapter, base_model, folder)
    names = {adapter.base_model: base} if adapter.base_model else {}
    config = _public_config(folder, base, keep_revision=adapter.base_model == base)
    files = [File(CONFIG_NAME, _json(config)), File(WEIGHTS_NAME, folder / WEIGHTS_NAME)]
    siblings = _singles(run, required=members)
    for member in siblings if members else []:
        if member.is_symlink() or member.parent.is_symlink():
            raise AdapterError("the folder is a link, and links are not followed", where=member, fix="copy it there")
        own, _ = _read(member)
        public = _public_config(member, base, keep_revision=own.base_model == base)
        place = f"adapters/{member.name}"
        files += [
            File(f"{place}/{CONFIG_NAME}", _json(public)),
            File(f"{place}/{WEIGHTS_NAME}", member / WEIGHTS_NAME),
        ]
    left_out: dict[str, str] = {}
    merge = None
    if _is_plain(folder / REPORT_NAME, left_out):
        merge = _public(_mapping(folder / REPORT_NAME), names)
        files.append(File(REPORT_NAME, _json(merge)))
    trained_here = run is not None and (folder in siblings or _is_merge_of(merge, siblings))
    evaluation = _evaluation(folder, run, siblings if trained_here else [], names, files, left_out)
    files += _figures([source, source / "eval"] if source != run else [run, run / "eval"], left_out)
    return Subject(
        files=tuple(files),
        base_model=base,
        base_revision=config.get("revision"),
        task=config.get("task_type"),
        ranks=ranks,
        whole=bool(adapter.whole),
        members=tuple(member.name for member in siblings) if members else (),
        merge=merge,
        config=load_config(run / "config.yaml") if run and trained_here else None,
        run=_mapping(run / "run.json") if run and trained_here and _is_plain(run / "run.json", {}) else {},
        evaluation=evaluation,
        left_out=left_out,
    )


def _adapter_and_run(source: Path, members: bool) -> tuple[Path, Path | None]:
    """The folder of the adapter to upload, and the run that it lies in, if it does."""
    if (source / "config.yaml").is_file():
        merged = source / "merged"
        if not merged.is_dir():
            fix = f"first: poc-lora merge {source} --out {merged}; or give one of its adapters"
            raise RunError("the run has no merged adapter", where=source, fix=fix)
        if merged.is_symlink():
            raise AdapterError("merged is a link", where=merged, fix="give the folder that it leads to")
        return merged, source
    if members:
        raise RequestError("only a run has single adapters to upload", where=source, fix="leave --all out")
    for run in source.parents[:2]:
        if source in (run / "merged", run / "adapters" / source.name) and (run / "config.yaml").is_file():
            return source, run
    return source, None


def _singles(run: Path | None, *, required: bool) -> list[Path]:
    """The run's single adapters, which it need not have any more."""
    try:
        return find_adapters(run) if run else []
    except AdapterError:
        if required:
            raise
        return []


def _read(folder: Path) -> tuple[Adapter, tuple[int, ...]]:
    """An adapter all of whose tensors can be read and are finite, and the ranks of its modules. Raises AdapterError."""
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if (folder / name).is_symlink():
            raise AdapterError(f"{name} is a link, and links are not uploaded", where=folder, fix="copy the file there")
    adapter = open_adapter(folder)
    ranks = {factors.rank for factors in adapter.modules.values()}
    for name in adapter.whole:
        adapter.whole[name]
    return adapter, tuple(sorted(ranks))


def _hub_name(adapter: Adapter, given: str | None, where: Path) -> str:
    """The base model's Hub id. Raises RequestError."""
    if given is not None:
        if not _HUB_NAME.fullmatch(given):
            raise RequestError(f"{given!r} is not a Hub id", where="--base-model", fix="such as org/name")
        return given
    name = adapter.base_model
    if name is None or _is_local(name):
        what = "the adapter does not name its base model" if name is None else f"the base model is the folder {name}"
        raise RequestError(
            f"{what}, which is of no use to others",
            where=where,
            fix="say what it is called on the Hub: --base-model ORG/NAME",
        )
    return name


def _is_local(name: str) -> bool:
    return not _HUB_NAME.fullmatch(name) or Path(name).exists()


def _public_config(folder: Path, base: str, *, keep_revision: bool) -> dict[str, Any]:
    """The adapter's configuration with the name of the base model that others know it by."""
    config = _mapping(folder / CONFIG_NAME)
    config["base_model_name_or_path"] = base
    if not keep_revision:  # it was one of another repository, or of a folder
        config["revision"] = None
    return config


def _public(value: Any, names: dict[str, str]) -> Any:
    """JSON with those names replaced, and of absolute paths only the last part: they tell of this machine."""
    if isinstance(value, dict):
        return {key: _public(inner, names) for key, inner in value.items()}
    if isinstance(value, list):
        return [_public(inner, names) for inner in value]
    if isinstance(value, str):
        return names.get(value, Path(value).name if Path(value).is_absolute() else value)
    return value


def _is_merge_of(merge: dict[str, Any] | None, siblings: Sequence[Path]) -> bool:
    """Whether the run's adapters, as they are now, are what was merged."""
    try:
        made_of = {source["sha256"] for source in (merge or {})["sources"]}
    except (KeyError, TypeError):
        return False
    return made_of == {sha256_file(folder / WEIGHTS_NAME) for folder in siblings}


def _evaluation(
    folder: Path,
    run: Path | None,
    siblings: Sequence[Path],
    names: dict[str, str],
    files: list[File],
    left_out: dict[str, str],
) -> Evaluation | None:
    """The evaluation in the run or beside the adapter, if it is of this adapter; its files are added to `files`."""
    places = [run / folder_name(p) for p in PROTOCOLS] if run else [folder, folder / "eval"]
    place = next((p for p in places if _is_plain(p / RESULTS_FILE, left_out)), None)
    if place is None:
        return None
    if (place / RESULTS_FILE).stat().st_mtime_ns < (folder / WEIGHTS_NAME).stat().st_mtime_ns:
        # All that tells a merge made anew, with another rank say, from the one that was evaluated.
        left_out[f"{place.name}/{RESULTS_FILE}"] = "older than the adapter's weights: evaluate again"
        return None
    results = read_results(place)
    results = dataclasses.replace(results, base_model=_public(results.base_model, names))
    if run is None:
        name = folder.name if folder.name in results.adapters else next(iter(results.adapters))
        scored = results.adapters[name] if len(results.adapters) == 1 or name == folder.name else None
        row = f"LoRA {name}"
    elif set(results.adapters) != {sibling.name for sibling in siblings}:
        scored, row = None, ""
    elif folder.name == "merged":
        scored, row = results.merged, "PoC merge"
    else:
        scored, row = results.adapters.get(folder.name), folder.name
    if scored is None:
        left_out[f"{place.name}/{RESULTS_FILE}"] = "not an evaluation of this adapter: evaluate again"
        return None
    raw = _public(_mapping(place / RESULTS_FILE), names)
    files += [File(RESULTS_FILE, _json(raw)), File(REPORT_FILE, markdown(results).encode())]
    return Evaluation(results, scored, row)


def _figures(places: Sequence[Path], left_out: dict[str, str]) -> list[File]:
    """The pictures in these folders and in their figures/, the first of each name."""
    found: dict[str, Path] = {}
    for folder in (inner for place in places for inner in (place, place / "figures")):
        if folder.is_dir() and not folder.is_symlink():
            for path in sorted(folder.iterdir()):
                if path.suffix in FIGURES and _is_plain(path, left_out):
                    found.setdefault(path.name, path)
    return [File(f"figures/{name}", path) for name, path in sorted(found.items())]


def _is_plain(path: Path, left_out: dict[str, str]) -> bool:
    """Whether there is such a file; one that is a link, or in a folder that is one, is noted as left out."""
    if path.is_symlink() or path.parent.is_symlink():
        left_out["/".join(path.parts[-2:])] = "a link"
        return False
    return path.is_file()


def _mapping(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise RequestError("not a JSON object", where=path)
    return value


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()
