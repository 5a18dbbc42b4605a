"""What is uploaded of an adapter or a run: files by an allow-list, each of them such as we would read ourselves.

Nothing else in a folder is opened, links are never followed, and nothing is written: what differs from the local
files, such as a base model's name in place of its path, differs in memory only.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from poc_lora.adapters.adapter import CONFIG_NAME, WEIGHTS_NAME, Adapter, open_adapter
from poc_lora.adapters.sources import find_adapters
from poc_lora.config import RunConfig, load_config
from poc_lora.errors import AdapterError, RequestError, RunError
from poc_lora.evaluation.control import folder_name
from poc_lora.evaluation.results import RESULTS_FILE, Results, Scored, read_results
from poc_lora.evaluation.variants import adapter_key
from poc_lora.files import read_json, sha256_file
from poc_lora.hub.public import public_config, public_json, public_merge, refuse_metadata
from poc_lora.hub_ids import is_base_model_id
from poc_lora.merging.folders import REPORT_NAME
from poc_lora.reporting.run_files import PROTOCOLS, Journey, Merge, checked, of_these_weights, read_facts
from poc_lora.reporting.tables import REPORT_FILE, results_markdown, table_rows

FIGURES = (".png", ".svg")


@dataclass(frozen=True)
class File:
    """A file of the upload: its path in the repository, and the local file or the bytes that it is."""

    path: str
    content: Path | bytes

    @property
    def size(self) -> int:
        """Its length in bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


@dataclass(frozen=True)
class Evaluation:
    """An evaluation that the adapter took part in: its own accuracy there, and what the tables call it."""

    results: Results
    scored: Scored
    row: str


@dataclass(frozen=True)
class Subject:
    """An adapter to upload, and what is known of it for certain; what is not known is None or empty.

    base_model: its Hub id. task: PEFT's task_type. ranks: those of its modules. whole: the shapes of parameters that
    were trained whole. members: the single adapters that are uploaded with it. merge: its merge.json. config, run:
    the configuration and run.json that all its adapters were trained under. left_out: what the allow-list has but
    is not uploaded, with the reason.
    """

    files: tuple[File, ...]
    base_model: str
    base_revision: str | None
    task: str | None
    ranks: tuple[int, ...]
    whole: dict[str, tuple[int, ...]]
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
    RunError for a run without a merge, or files of it that do not hold up; RequestError where the base model has no
    name for others.
    """
    source = Path(os.path.abspath(source))
    folder, run = _adapter_and_run(source, members)
    root = run or folder
    left_out: dict[str, str] = {}
    adapter, ranks = _read(folder, root)
    base = _hub_name(adapter, base_model, folder)
    names = {adapter.base_model: base} if adapter.base_model else {}
    config = _public_config(folder, adapter, base, left_out)
    files = [File(CONFIG_NAME, _json(config)), File(WEIGHTS_NAME, folder / WEIGHTS_NAME)]
    siblings = _singles(run, required=members)
    for member in siblings if members else []:
        own, _ = _read(member, root)
        place = f"adapters/{member.name}"
        files += [
            File(f"{place}/{CONFIG_NAME}", _json(_public_config(member, own, base, left_out))),
            File(f"{place}/{WEIGHTS_NAME}", member / WEIGHTS_NAME),
        ]
    merge = None
    if _is_plain(folder / REPORT_NAME, root, left_out):
        read_facts(Merge, folder / REPORT_NAME)
        merge = public_json(public_merge(_mapping(folder / REPORT_NAME)), names)
        files.append(File(REPORT_NAME, _json(merge)))
    trained_here = run is not None and (folder in siblings or _is_merge_of(merge, siblings))
    evaluation = _evaluation(folder, run, siblings if trained_here else [], names, files, left_out)
    files += _figures(dict.fromkeys([source, source / "eval", folder]), root, left_out)
    facts: dict[str, Any] = {}
    if run and trained_here and _is_plain(run / "run.json", root, {}):
        read_facts(Journey, run / "run.json")
        facts = _mapping(run / "run.json")
    return Subject(
        files=tuple(files),
        base_model=base,
        base_revision=config["revision"],
        task=config.get("task_type"),
        ranks=ranks,
        whole={name: tuple(tensor.shape) for name, tensor in adapter.modules_to_save.items()},
        members=tuple(member.name for member in siblings) if members else (),
        merge=merge,
        config=load_config(run / "config.yaml") if run and trained_here else None,
        run=facts,
        evaluation=evaluation,
        left_out=left_out,
    )


def _adapter_and_run(source: Path, members: bool) -> tuple[Path, Path | None]:
    """The folder of the adapter to upload, and the run that it lies in, if it does."""
    if (source / "config.yaml").is_file():
        _refuse_link(source / "config.yaml", source)
        merged = source / "merged"
        if not merged.is_dir():
            fix = f"first: poc-lora merge {source} --out {merged}; or give one of its adapters"
            raise RunError("the run has no merged adapter", where=source, fix=fix)
        return merged, source
    if members:
        raise RequestError("only a run has single adapters to upload", where=source, fix="leave --all out")
    for run in source.parents[:2]:
        if source in (run / "merged", run / "adapters" / source.name) and (run / "config.yaml").is_file():
            _refuse_link(run / "config.yaml", run)
            return source, run
    return source, None


def _singles(run: Path | None, *, required: bool) -> list[Path]:
    """The run's single adapters, which it need not have any more."""
    if run is None:
        return []
    try:
        _refuse_link(run / "adapters", run)
        found = find_adapters(run)
        for folder in found:
            _refuse_link(folder / WEIGHTS_NAME, run)
    except AdapterError:
        if required:
            raise
        return []
    return found


def _read(folder: Path, root: Path) -> tuple[Adapter, tuple[int, ...]]:
    """An adapter all of whose tensors can be read and are finite, and the ranks of its modules. Raises AdapterError.

    root: the run that it lies in, or the folder itself; no link below it is followed.
    """
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        _refuse_link(folder / name, root)
    adapter = open_adapter(folder)
    refuse_metadata(folder / WEIGHTS_NAME)
    ranks = {factors.rank for factors in adapter.modules.values()}
    for name in adapter.modules_to_save:
        adapter.modules_to_save[name]
    return adapter, tuple(sorted(ranks))


def _refuse_link(path: Path, root: Path) -> None:
    """Raises AdapterError where a path is a link, or lies in one, below `root`."""
    link = _link(path, root)
    if link is not None:
        what = f"{link.relative_to(root)} is a link, and links are not followed"
        raise AdapterError(what, where=root, fix="copy there what it leads to")


def _link(path: Path, root: Path) -> Path | None:
    """The first part of a path below `root` that is a link."""
    parts = path.relative_to(root).parts
    below = (root.joinpath(*parts[: i + 1]) for i in range(len(parts)))
    return next((part for part in below if part.is_symlink()), None)


def _hub_name(adapter: Adapter, given: str | None, where: Path) -> str:
    """The base model's Hub id. Raises RequestError."""
    if given is not None:
        if not is_base_model_id(given):
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
    return not is_base_model_id(name) or Path(name).exists()


def _public_config(folder: Path, adapter: Adapter, base: str, left_out: dict[str, str]) -> dict[str, Any]:
    """The adapter's configuration for others; what it holds beside is noted as left out."""
    path = folder / CONFIG_NAME
    config, more = public_config(_mapping(path), base, keep_revision=adapter.base_model == base, where=path)
    for name in sorted(more):
        left_out[f"{name} of {folder.name}/{CONFIG_NAME}"] = "not needed to load the adapter"
    return config


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
    root = run or folder
    places = [run / folder_name(p) for p in PROTOCOLS] if run else [folder, folder / "eval"]
    place = next((p for p in places if _is_plain(p / RESULTS_FILE, root, left_out)), None)
    if place is None:
        return None
    told = f"{place.name}/{RESULTS_FILE}"
    results = checked(read_results(place), place)
    results = dataclasses.replace(results, base_model=public_json(results.base_model, names))
    if run is None:
        name = folder.name if folder.name in results.adapters else next(iter(results.adapters))
        scored = results.adapters[name] if len(results.adapters) == 1 or name == folder.name else None
    elif set(results.adapters) != {sibling.name for sibling in siblings}:
        name, scored = "", None
    else:
        name = folder.name
        scored = results.merged if name == "merged" else results.adapters.get(name)
    if scored is None:
        left_out[told] = "not an evaluation of this adapter: evaluate again"
        return None
    thing = "merged" if run and folder.name == "merged" else adapter_key(name)
    same = of_these_weights(place, thing, folder)
    if same is None:
        # The evaluation does not say of which weights it is. Times may be those of a copy, but are all that is left.
        same = (place / RESULTS_FILE).stat().st_mtime_ns >= (folder / WEIGHTS_NAME).stat().st_mtime_ns
    if not same:
        left_out[told] = "of other weights than the adapter has now: evaluate again"
        return None
    # The table lists single adapters by their names; one that is alone has a row of another name.
    rows = [row for row, one in table_rows(results) if one is scored]
    row = rows[0] if thing == "merged" or len(results.adapters) == 1 else name
    raw = public_json(results.to_json(), names)
    files += [File(RESULTS_FILE, _json(raw)), File(REPORT_FILE, results_markdown(results).encode())]
    return Evaluation(results, scored, row)


def _figures(places: Iterable[Path], root: Path, left_out: dict[str, str]) -> list[File]:
    """The pictures in these folders and in their figures/, the first of each name."""
    found: dict[str, Path] = {}
    for folder in (inner for place in places for inner in (place, place / "figures")):
        if (link := _link(folder, root)) is not None:
            left_out[str(link.relative_to(root))] = "a link"
        elif folder.is_dir():
            for path in sorted(folder.iterdir()):
                if path.suffix in FIGURES and _is_plain(path, root, left_out):
                    found.setdefault(path.name, path)
    return [File(f"figures/{name}", path) for name, path in sorted(found.items())]


def _is_plain(path: Path, root: Path, left_out: dict[str, str]) -> bool:
    """Whether there is such a file; one that is a link, or below `root` lies in one, is noted as left out."""
    if _link(path, root) is not None:
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
