"""What an evaluation is asked to score: one run, or loose adapters of one base model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from poc_lora.adapters.adapter import CONFIG_NAME, WEIGHTS_NAME, Adapter, read_adapter
from poc_lora.adapters.sources import Source, find_adapters, find_sources
from poc_lora.artifacts.merge_report import MergeReport
from poc_lora.artifacts.run_folder import RunFolder
from poc_lora.config import load_config
from poc_lora.data.prompts import TEMPLATES
from poc_lora.errors import RequestError, RunError
from poc_lora.files import sha256_file
from poc_lora.hub_ids import is_adapter_id


@dataclass(frozen=True)
class Subjects:
    """The base model, the adapters and, in a run that has one, their merge; `out` is where results go.

    Where merged is None, the merge that is scored is the exact average of the adapters.
    """

    base: str
    revision: str | None
    dtype: str
    quantization: str | None
    prompt: str
    adapters: dict[str, Adapter]
    merged: Adapter | None
    out: Path


def find_subjects(
    targets: Sequence[Path],
    *,
    base: str | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    prompt: str | None = None,
    out: Path | None = None,
    protocol: str = "label",
) -> Subjects:
    """Read the adapters that `targets` stand for: one run folder, or one or more adapter folders.

    What is not given comes from the run's config.yaml; for loose adapters the base from their own configs, the
    prompt is `clean`, and `out` is required. Raises RequestError, RunError, AdapterError or ConfigError.
    """
    if prompt is not None and prompt not in TEMPLATES:
        raise RequestError(f"no prompt template is called {prompt!r}", fix=f"known: {', '.join(TEMPLATES)}")
    runs = [target for target in targets if RunFolder(target).is_run]
    for target in targets:
        if target not in runs and not (target / CONFIG_NAME).is_file() and not is_adapter_id(target):
            what = "no such folder" if not target.is_dir() else "neither a run nor an adapter"
            fix = "give a run folder (with config.yaml), or adapters: folders with adapter_config.json, or Hub ids"
            raise RequestError(what, where=target, fix=fix)
    if not targets or (runs and len(targets) > 1):
        raise RequestError(
            "an evaluation takes one run, or adapters of one base model",
            where=", ".join(map(str, targets)) or None,
            fix="evaluate runs one by one",
        )
    if runs:
        folder = out or RunFolder(runs[0]).evaluation(protocol)
        return _of_run(runs[0], base=base, revision=revision, dtype=dtype, prompt=prompt, out=folder)
    if out is None:
        raise RequestError("adapters outside a run need a folder for the results", fix="add --out DIR")
    sources = [source for target in targets for source in find_sources(target)]
    adapters = {name: read_adapter(source.folder, root=source.root) for name, source in _names(sources).items()}
    if base is None:
        base, own_revision = _common_base(adapters)
        revision = revision or own_revision
    return Subjects(base, revision, dtype or "auto", None, prompt or "clean", adapters, None, out)


def _of_run(
    run: Path, *, base: str | None, revision: str | None, dtype: str | None, prompt: str | None, out: Path
) -> Subjects:
    config = load_config(RunFolder(run).config)
    folders = find_adapters(run)
    merged = RunFolder(run).merged
    _check_merge_is_of(folders, RunFolder(run))
    return Subjects(
        base=base or config.model.name,
        revision=revision or (config.model.revision if base is None else None),
        dtype=dtype or config.model.dtype,
        quantization=config.model.quantization,
        prompt=prompt or config.data.prompt,
        adapters={folder.name: read_adapter(folder) for folder in folders},
        merged=read_adapter(merged) if merged.is_dir() else None,
        out=out,
    )


def _check_merge_is_of(folders: Sequence[Path], run: RunFolder) -> None:
    """Refuse a merge that was made before the run was extended; one without a merge.json is taken as it is."""
    report = MergeReport.read_if_there(run.merge_report)
    if report and {source.sha256 for source in report.sources} != {sha256_file(f / WEIGHTS_NAME) for f in folders}:
        raise RunError(
            "the merge is not of the adapters that the run has now",
            where=run.merged,
            fix=f"remove it, then: poc-lora merge {run.path} --out {run.merged}",
        )


def _names(sources: Sequence[Source]) -> dict[str, Source]:
    """Names for loose adapters: their folders' or repositories' names, numbered where two are alike."""
    resolved = [source.folder.resolve() for source in sources]
    if len(set(resolved)) < len(resolved):
        raise RequestError("the same adapter is named twice", where=", ".join(source.name for source in sources))
    names = [source.name.partition("@")[0].rpartition("/")[2] for source in sources]
    if len(set(names)) < len(names):
        names = [f"{i:02d}-{name}" for i, name in enumerate(names)]
    return dict(zip(names, sources, strict=True))


def _common_base(adapters: dict[str, Adapter]) -> tuple[str, str | None]:
    bases = {(adapter.base_model, adapter.revision) for adapter in adapters.values()}
    if len(bases) > 1:
        named = ", ".join(sorted(f"{name or 'none'}" + (f" at {rev}" if rev else "") for name, rev in bases))
        raise RequestError(f"the adapters name different base models: {named}", fix="choose one with --base")
    name, revision = bases.pop()
    if not name:
        raise RequestError("the adapters do not name their base model", fix="add --base DIR_OR_ID")
    return name, revision
