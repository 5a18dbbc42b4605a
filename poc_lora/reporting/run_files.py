"""What a run folder says of itself, read as untrusted: checked here, so that what comes after can rely on it."""

import json
import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from poc_lora.adapters.adapter import CONFIG_NAME, WEIGHTS_NAME
from poc_lora.config import RunConfig, load_config
from poc_lora.data.commonsense import BENCHMARKS
from poc_lora.errors import RunError
from poc_lora.evaluation.control import folder_name
from poc_lora.evaluation.results import RESULTS_FILE, Results, read_results
from poc_lora.evaluation.variants import adapter_digest, adapter_key
from poc_lora.files import read_json, read_text
from poc_lora.merging.folders import REPORT_NAME

PROTOCOLS = ("label", "generate", "harness")
MAX_METRICS_BYTES = 2**28
LARGEST = 1e30  # a figure cannot be drawn of more
MEASURES = ("loss", "grad_norm", "noise_norm", "validation_loss")

Number = Annotated[float, Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1.001, allow_inf_nan=False)]
Rank = Annotated[int, Field(gt=0, le=2**31)]
T = TypeVar("T", bound="Facts")


class Facts(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Source(Facts):
    name: str
    sha256: str
    hub_commit: str | None = None


class Module(Facts):
    rank: int
    norm: Number
    error: Number
    effective_rank: Number
    mean_cosine: Number | None = None


def _not_empty(sweep: dict[str, dict[Rank, Share]]) -> dict[str, dict[Rank, Share]]:
    if not all(sweep.values()):
        raise ValueError("a rank sweep without ranks")
    return sweep


class Merge(Facts):
    """The parts of merge.json that are shown."""

    method: str
    dtype: str
    rank: int
    error: Number
    cast_error: Number
    mean_cosine: Number | None = None
    relative_error_bar: Number | None = None
    next_move: Number | None = None
    sources: tuple[Source, ...] = Field(min_length=1)
    weights: tuple[Number, ...]
    cosines: tuple[tuple[Number, ...], ...]
    norms: tuple[Number, ...]
    modules: dict[str, Module]
    rank_sweep: Annotated[dict[str, dict[Rank, Share]], AfterValidator(_not_empty)] = {}

    @model_validator(mode="after")
    def _sizes(self) -> "Merge":
        M = len(self.sources)
        if not all(len(x) == M for x in (self.cosines, self.norms, self.weights, *self.cosines)):
            raise ValueError(f"figures of other than the {M} sources")
        return self


class Journey(Facts):
    """The parts of run.json that are shown."""

    versions: dict[str, str] = {}
    machine: dict[str, str | int | list[str]] = {}
    seed: int | None = None
    steps: int | None = None
    dtype: str | None = None
    data_sha256: dict[str, str] = {}
    processes: int | None = None
    per_device: int | None = None
    tokens_per_microbatch: int | None = None
    gradient_checkpointing: bool | None = None
    train_seconds: Number | None = None
    peak_bytes: int | None = None


class Point(Facts):
    """All merges of m adapters: see poc_lora.evaluation.subsets."""

    m: Rank
    subsets: int
    accuracy: Share
    error: Share | None
    distance: Number | None


class Law(Facts):
    c: Number
    floor: Number
    explained: Number | None = None


class Subsets(Facts):
    points: tuple[Point, ...] = Field(min_length=1)
    variance_law: Law | None


@dataclass
class Metrics:
    """metrics.jsonl as curves: measure to name to (step, value); the names are adapters, `base` and merges."""

    curves: dict[str, dict[str, list[tuple[float, float]]]] = field(default_factory=lambda: {m: {} for m in MEASURES})
    diverged: dict[str, int] = field(default_factory=dict)  # adapter to the step of it
    last_step: int = 0


@dataclass(frozen=True)
class RunFiles:
    """What was found in a folder; what is not there is None.

    evaluations: one per protocol, `label` first. changed: for each, what has other weights now than were evaluated.
    """

    folder: Path
    config: RunConfig | None
    journey: Journey | None
    metrics: Metrics | None
    merge: Merge | None
    evaluations: tuple[Results, ...]
    changed: tuple[tuple[str, ...], ...] = ()

    @property
    def results(self) -> Results | None:
        """The evaluation that the report is about, where there is one."""
        return self.evaluations[0] if self.evaluations else None


def read_run(folder: Path) -> RunFiles:
    """Read a run, or a folder of results. Raises RunError or ConfigError for what it is not, or does not hold up."""
    places = [folder / folder_name(protocol) for protocol in PROTOCOLS]
    evaluated = [place for place in (*places, folder) if (place / RESULTS_FILE).is_file()]
    has_config = (folder / "config.yaml").is_file()
    if not has_config and not evaluated:
        what = "neither a run nor an evaluation" if folder.is_dir() else "no such folder"
        raise RunError(what, where=folder, fix="give a run (with config.yaml) or a folder with results.json")
    evaluations = tuple(checked(read_results(place), place) for place in evaluated)
    return RunFiles(
        folder=folder,
        config=load_config(folder / "config.yaml") if has_config else None,
        journey=read_facts(Journey, folder / "run.json"),
        metrics=_read_metrics(folder / "metrics.jsonl"),
        merge=read_facts(Merge, folder / "merged" / REPORT_NAME),
        evaluations=evaluations,
        changed=tuple(_changed(folder, *found) for found in zip(evaluated, evaluations, strict=True)),
    )


def of_these_weights(place: Path, thing: str, adapter: Path) -> bool | None:
    """Whether an evaluation of `thing` in the folder `place` is of the weights that the adapter's folder has now.

    None where one of them is not there, or the evaluation does not say. Raises RunError.
    """
    if not re.fullmatch(r"[\w .@+-]{1,100}", thing):  # names from results.json are anyone's
        return None
    path = place / f"{thing}.json"
    if not (path.is_file() and (adapter / WEIGHTS_NAME).is_file() and (adapter / CONFIG_NAME).is_file()):
        return None
    told = read_json(path, error=RunError)
    digest = told.get("adapter_digest") if isinstance(told, dict) else None
    return digest == adapter_digest(adapter) if isinstance(digest, str) else None


def _changed(folder: Path, place: Path, results: Results) -> tuple[str, ...]:
    things = {"the merge": ("merged", folder / "merged")}
    for name in results.adapters:
        if re.fullmatch(r"[0-9]{1,9}", name):  # the run's own
            things[f"adapter {name}"] = (adapter_key(name), folder / "adapters" / name)
    return tuple(told for told, (thing, adapter) in things.items() if of_these_weights(place, thing, adapter) is False)


def checked(results: Results, folder: Path) -> Results:
    """Results whose values can be shown: of the declared types, shares of 1, every benchmark scored."""
    try:
        raw = asdict(results)
        raw["unread"] = {t: share for t, share in results.unread.items() if share is not None and not math.isnan(share)}
        if results.subsets is not None:
            raw["subsets"] = Subsets.model_validate(results.subsets).model_dump()
        sound = TypeAdapter(Results).validate_python(raw)
        rows = [sound.base, sound.average, *sound.adapters.values()]
        rows += [row for row in (sound.merged, sound.ensemble, sound.control) if row is not None]
        for row in rows:
            for value, error in (row.average, *(row.benchmarks[b] for b in sound.questions)):
                if not 0 <= value <= 1 or error < 0 or math.isinf(error):
                    raise ValueError(f"an accuracy of {value} ± {error}")
        if not sound.questions.keys() & {b.folder for b in BENCHMARKS} or sound.best not in sound.adapters:
            raise ValueError("no benchmark that is known, or no best adapter")
        for counts in (sound.too_long, sound.chance):
            if not sound.questions.keys() <= counts.keys():
                raise ValueError("benchmarks without a chance level or count")
        for d in sound.comparisons.values():
            if not all(math.isfinite(x) for x in (d.value, d.low, d.high, d.p)):
                raise ValueError("a comparison that is not finite")
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        what = f"not the results of an evaluation ({_short(problem)})"
        raise RunError(what, where=folder / RESULTS_FILE, fix="evaluate again") from problem
    return sound


def read_facts(kind: type[T], path: Path) -> T | None:
    """A file of the run, checked; None where there is none. Raises RunError."""
    if not path.is_file():
        return None
    raw = read_json(path, error=RunError)
    try:
        return kind.model_validate(raw)
    except ValidationError as problem:
        raise RunError(
            f"not as poc_lora writes it: {_short(problem)}", where=path, fix="restore the file, or remove it"
        ) from problem


def _read_metrics(path: Path) -> Metrics | None:
    """The curves of metrics.jsonl; a line that is not one of ours, as a kill may leave it, is passed over."""
    if not path.is_file():
        return None
    metrics = Metrics()
    for line in read_text(path, error=RunError, max_bytes=MAX_METRICS_BYTES).splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and _is_count(entry.get("step")) and _is_name(entry.get("adapter")):
            _take(metrics, entry)
    return metrics


def _take(metrics: Metrics, entry: dict[str, Any]) -> None:
    step, adapter = entry["step"], entry["adapter"]
    name = adapter if isinstance(adapter, str) else f"{adapter:02d}"
    if name == "merge" and isinstance(entry.get("members"), list):
        name = f"running merge of {len(entry['members'])}"
    metrics.last_step = max(metrics.last_step, step)
    if entry.get("diverged") is True:
        metrics.diverged.setdefault(name, step)
    for measure in MEASURES:
        value = entry.get(measure)
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST:
            metrics.curves[measure].setdefault(name, []).append((step, float(value)))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**40


def _is_name(value: Any) -> bool:
    return _is_count(value) or value in ("base", "merge")


def _short(problem: Exception) -> str:
    """The first thing that a validator found."""
    if not isinstance(problem, ValidationError):
        return repr(problem)
    error = problem.errors(include_url=False)[0]
    return f"{'.'.join(map(str, error['loc'])) or 'the whole'}: {error['msg']}"
