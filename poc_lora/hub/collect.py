"""Selects the files to upload for an adapter or a run, by an allow-list.

Other files are never opened, links are never followed, and nothing is written: where an uploaded file differs from
the local one, such as in the base model's name, it differs in memory only.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from poc_lora.adapters.adapter import CONFIG_NAME, TOKENIZER_FILES, WEIGHTS_NAME, Adapter, open_adapter
from poc_lora.adapters.sources import find_adapters
from poc_lora.artifacts.merge_report import MergeReport
from poc_lora.artifacts.results import Results, Scored
from poc_lora.artifacts.run_folder import MERGE_REPORT, RESULTS, RESULTS_TABLE, TASK_RESULTS, RunFolder
from poc_lora.artifacts.run_info import RunInfo
from poc_lora.artifacts.task_scores import TaskResults
from poc_lora.config import RunConfig, load_config
from poc_lora.errors import AdapterError, RequestError, RunError
from poc_lora.evaluation.variants import adapter_key, is_merge_of
from poc_lora.files import links_root, read_json, sha256_file
from poc_lora.hub.public import public_config, refuse_metadata
from poc_lora.hub_ids import is_base_model_id, is_repo_id
from poc_lora.reporting.results_tables import results_markdown, table_rows
from poc_lora.reporting.run_files import has_weights, of_these_weights

FIGURES = (".png", ".svg")


@dataclass(frozen=True)
class File:
    """A file of the upload: its path in the repository, and its bytes or the local file that has them."""

    path: str
    content: Path | bytes

    @property
    def size(self) -> int:
        """Its length in bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


@dataclass(frozen=True)
class Evaluation:
    """The public results of an evaluation, the adapter's own accuracy in them, and its row in the tables."""

    results: Results
    scored: Scored
    row: str


@dataclass(frozen=True)
class Subject:
    """An adapter to upload, and what is known about it; the rest is None or empty."""

    files: tuple[File, ...]  # all of the upload but the card
    base_model: str  # its Hub id
    base_revision: str | None
    task: str | None  # PEFT's task_type
    ranks: tuple[int, ...]  # of its modules, each once, ascending
    modules_to_save: dict[str, tuple[int, ...]]  # the shapes of parameters that were trained in full
    members: tuple[str, ...] = ()  # the names of the single adapters uploaded with it
    merge: MergeReport | None = None  # its public part
    config: RunConfig | None = None  # that all its adapters were trained with
    run: RunInfo = field(default_factory=RunInfo)  # of that training
    evaluation: Evaluation | None = None
    tasks: TaskResults | None = None  # of lm-eval, their public part
    left_out: dict[str, str] = field(default_factory=dict)  # files and fields that are not uploaded, with the reason


@dataclass(frozen=True)
class _Tree:
    """The files below `root`, without those behind links. `left_out` lists the optional files that are left out."""

    root: Path
    left_out: dict[str, str] = field(default_factory=dict)

    def link(self, path: Path) -> Path | None:
        """The first part of a path that is a link, except for the Hub cache's links to its blobs."""
        parts = path.relative_to(self.root).parts
        below = (self.root.joinpath(*parts[: i + 1]) for i in range(len(parts)))
        return next((part for part in below if part.is_symlink() and not self._is_of_cache(part)), None)

    def _is_of_cache(self, path: Path) -> bool:
        allowed = links_root(self.root)
        return allowed != self.root.resolve() and path.resolve().is_relative_to(allowed)

    def refuse_link(self, path: Path) -> None:
        if (link := self.link(path)) is not None:
            what = f"{link.relative_to(self.root)} is a link, and links are not followed"
            raise AdapterError(what, where=self.root, fix="replace the link by a copy of its target")

    def has(self, path: Path) -> bool:
        """Whether the file exists; one behind a link is left out."""
        if self.link(path) is not None:
            self.left_out["/".join(path.parts[-2:])] = "a link"
            return False
        return path.is_file()


def collect(source: Path, *, members: bool = False, base_model: str | None = None) -> Subject:
    """Select the files to upload for an adapter's folder, or for the merged adapter of a run's folder.

    Args:
        members: Whether to add the run's single adapters, as adapters/00 and so on.
        base_model: The base model's Hub id, for adapters that name a local folder.

    Raises:
        AdapterError: An adapter cannot be read, or is a link.
        RunError: The run has no merge, or a damaged file.
        RequestError: The base model has no name on the Hub.
    """
    source = Path(os.path.abspath(source))
    folder, run = _adapter_and_run(source, members)
    tree = _Tree(run.path if run else folder)
    adapter, ranks = _read(folder, tree)
    base = _hub_name(adapter, base_model, folder)
    names = {adapter.base_model: base} if adapter.base_model else {}
    config = _public_config(folder, adapter, base, tree)
    files = [File(CONFIG_NAME, _json(config)), File(WEIGHTS_NAME, folder / WEIGHTS_NAME)]
    for name in TOKENIZER_FILES:
        if tree.has(folder / name):
            tree.left_out[f"{folder.name}/{name}"] = "yours, and it may be private: upload it by hand if not"
    siblings = _singles(run, tree, required=members) if run else []
    for member in siblings if members else []:
        own = _public_config(member, _read(member, tree)[0], base, tree)
        files.append(File(f"adapters/{member.name}/{CONFIG_NAME}", _json(own)))
        files.append(File(f"adapters/{member.name}/{WEIGHTS_NAME}", member / WEIGHTS_NAME))
    merge = None
    if tree.has(folder / MERGE_REPORT):
        merge = MergeReport.read(folder / MERGE_REPORT).public(names)
        files.append(File(MERGE_REPORT, merge.dumps().encode()))
    trained_here = run is not None and (folder in siblings or (merge is not None and is_merge_of(merge, siblings)))
    evaluation = _evaluation(folder, run, siblings if trained_here else [], names, tree)
    if evaluation:
        files.append(File(RESULTS, evaluation.results.dumps().encode()))
        files.append(File(RESULTS_TABLE, results_markdown(evaluation.results).encode()))
    tasks = _tasks(folder, run, names, tree)
    if tasks:
        files.append(File(TASK_RESULTS, tasks.dumps().encode()))
    files += _figures(dict.fromkeys([source, RunFolder(source).evaluation(), folder]), tree)
    origin = run if trained_here else None
    return Subject(
        files=tuple(files),
        base_model=base,
        base_revision=config["revision"],
        task=config.get("task_type"),
        ranks=ranks,
        modules_to_save={name: tuple(tensor.shape) for name, tensor in adapter.modules_to_save.items()},
        members=tuple(member.name for member in siblings) if members else (),
        merge=merge,
        config=_training(origin, folder, siblings, merge) if origin else None,
        run=(origin and not tree.link(origin.info) and RunInfo.read_if_there(origin.info)) or RunInfo(),
        evaluation=evaluation,
        tasks=tasks,
        left_out=tree.left_out,
    )


def _training(run: RunFolder, folder: Path, siblings: Sequence[Path], merge: MergeReport | None) -> RunConfig:
    """The configuration that the adapter in `folder` was trained with, or the adapters of the merge there."""
    config = load_config(run.config)
    if folder != run.merged:
        return config.of_adapter(int(folder.name))
    if not config.adapters.vary or merge is None:
        return config
    digests = {source.sha256 for source in merge.sources}
    merged = [int(sibling.name) for sibling in siblings if sha256_file(sibling / WEIGHTS_NAME) in digests]
    vary = {key: tuple(config.value(key, number) for number in merged) for key in config.adapters.vary}
    adapters = config.adapters.model_copy(update={"count": len(merged), "vary": vary})
    return config.model_copy(update={"adapters": adapters})


def _adapter_and_run(source: Path, members: bool) -> tuple[Path, RunFolder | None]:
    """The folder of the adapter to upload, and the run that contains it, if any."""
    run = RunFolder(source)
    if run.is_run:
        _Tree(source).refuse_link(run.config)
        if not run.merged.is_dir():
            fix = f"first: poc-lora merge {source} --out {run.merged}; or give one of its adapters"
            raise RunError("the run has no merged adapter", where=source, fix=fix)
        return run.merged, run
    if members:
        raise RequestError("only a run has single adapters to upload", where=source, fix="leave --all out")
    for run in map(RunFolder, source.parents[:2]):
        if source in (run.merged, run.adapter(source.name)) and run.is_run:
            _Tree(run.path).refuse_link(run.config)
            return source, run
    return source, None


def _singles(run: RunFolder, tree: _Tree, *, required: bool) -> list[Path]:
    """The folders of the run's single adapters; without `required`, none if they are missing or links."""
    try:
        tree.refuse_link(run.adapters)
        found = find_adapters(run.path)
        for folder in found:
            tree.refuse_link(folder / WEIGHTS_NAME)
    except AdapterError:
        if required:
            raise
        return []
    return found


def _read(folder: Path, tree: _Tree) -> tuple[Adapter, tuple[int, ...]]:
    """Read every tensor of an adapter, so that a damaged one is refused; returns it and the ranks of its modules."""
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        tree.refuse_link(folder / name)
    adapter = open_adapter(folder)
    refuse_metadata(folder / WEIGHTS_NAME)
    ranks = {factors.rank for factors in adapter.modules.values()}
    for name in adapter.modules_to_save:
        adapter.modules_to_save[name]
    return adapter, tuple(sorted(ranks))


def _hub_name(adapter: Adapter, given: str | None, where: Path) -> str:
    """The base model's Hub id. Raises RequestError."""
    if given is not None:
        if not is_repo_id(given) and not is_base_model_id(given):
            raise RequestError(f"{given!r} is not a Hub id", where="--base-model", fix="such as org/name")
        return given
    name = adapter.base_model
    if name is None or not is_base_model_id(name):
        what = "the adapter does not name its base model" if name is None else f"the base model is the folder {name}"
        raise RequestError(
            f"{what}, which others cannot load", where=where, fix="give its name on the Hub: --base-model ORG/NAME"
        )
    return name


def _public_config(folder: Path, adapter: Adapter, base: str, tree: _Tree) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    config, more = public_config(read_json(path), base, keep_revision=adapter.base_model == base, where=path)
    for name in sorted(more):
        tree.left_out[f"{name} of {folder.name}/{CONFIG_NAME}"] = "not needed to load the adapter"
    return config


def _evaluation(
    folder: Path, run: RunFolder | None, siblings: Sequence[Path], names: dict[str, str], tree: _Tree
) -> Evaluation | None:
    """The evaluation in the run or in the adapter's folder, if it is of this adapter."""
    places = run.evaluations if run else [folder, RunFolder(folder).evaluation()]
    place = next((p for p in places if tree.has(p / RESULTS)), None)
    if place is None:
        return None
    results = Results.read(place / RESULTS).public(names)
    name, scored = folder.name, results.adapters.get(folder.name)
    if run is None:
        if scored is None and len(results.adapters) == 1:
            ((name, scored),) = results.adapters.items()
    elif set(results.adapters) != {sibling.name for sibling in siblings}:
        scored = None
    elif name == "merged":
        scored = results.merged
    if scored is None:
        tree.left_out[f"{place.name}/{RESULTS}"] = "not an evaluation of this adapter: evaluate again"
        return None
    variant = "merged" if run and name == "merged" else adapter_key(name)
    same = of_these_weights(place, variant, folder)
    if same is None:
        # The evaluation does not name its weights. The times are all that is left, though a copy may have new ones.
        same = (place / RESULTS).stat().st_mtime_ns >= (folder / WEIGHTS_NAME).stat().st_mtime_ns
    if not same:
        tree.left_out[f"{place.name}/{RESULTS}"] = "the weights have changed since: evaluate again"
        return None
    # The table lists single adapters by their names; a single one has a row of another name.
    rows = [row for row, _, one in table_rows(results) if one is scored]
    row = rows[0] if variant == "merged" or len(results.adapters) == 1 else name
    return Evaluation(results, scored, row)


def _tasks(folder: Path, run: RunFolder | None, names: dict[str, str], tree: _Tree) -> TaskResults | None:
    """The metrics of lm-eval's tasks in the run or in the adapter's folder, if they are of this adapter's weights."""
    places = [(run or RunFolder(folder)).evaluation("tasks"), *([] if run else [folder])]
    place = next((p for p in places if tree.has(p / TASK_RESULTS)), None)
    if place is None:
        return None
    found = TaskResults.read(place / TASK_RESULTS)
    variant = "merged" if run and folder == run.merged else adapter_key(folder.name)
    same = has_weights(folder, found.adapter_digests.get(variant))
    if not same:
        why = "the weights have changed since" if same is False else "not an evaluation of this adapter"
        tree.left_out[f"{place.name}/{TASK_RESULTS}"] = f"{why}: evaluate again"
        return None
    return (found if variant == "merged" else found.of_adapter(folder.name)).public(names)


def _figures(places: Iterable[Path], tree: _Tree) -> list[File]:
    """The pictures in these folders and in their figures/, the first of each name."""
    found: dict[str, Path] = {}
    for folder in (inner for place in places for inner in (place, place / "figures")):
        if (link := tree.link(folder)) is not None:
            tree.left_out[str(link.relative_to(tree.root))] = "a link"
        elif folder.is_dir():
            for path in sorted(folder.iterdir()):
                if path.suffix in FIGURES and tree.has(path):
                    found.setdefault(path.name, path)
    return [File(f"figures/{name}", path) for name, path in sorted(found.items())]


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()
