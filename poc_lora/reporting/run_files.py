"""Everything in a run folder that a report shows, read as untrusted."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from poc_lora.adapters.adapter import CONFIG_NAME, WEIGHTS_NAME
from poc_lora.artifacts.merge_report import MergeReport
from poc_lora.artifacts.metrics_line import read_metrics
from poc_lora.artifacts.results import Results
from poc_lora.artifacts.row_losses import RowLosses
from poc_lora.artifacts.run_folder import RESULTS, ROW_LOSSES, TASK_RESULTS, RunFolder, variant_file
from poc_lora.artifacts.run_info import RunInfo
from poc_lora.artifacts.task_scores import TaskResults
from poc_lora.artifacts.variant_scores import VariantScores
from poc_lora.config import RunConfig, load_config
from poc_lora.errors import RunError
from poc_lora.evaluation.variants import adapter_digest, adapter_key
from poc_lora.reporting.escape import short
from poc_lora.reporting.held_out import MAX_METRICS_BYTES, HeldOut, read_held_out, rows_held_out
from poc_lora.reporting.screening import Screening, screen

MEASURES = ("loss", "grad_norm", "noise_norm", "validation_loss")


@dataclass
class Metrics:
    """metrics.jsonl as curves: measure to name to [(step, value)]; the names are adapters, `base` and merges."""

    curves: dict[str, dict[str, list[tuple[float, float]]]] = field(default_factory=lambda: {m: {} for m in MEASURES})
    diverged: dict[str, int] = field(default_factory=dict)  # adapter to the step at which it diverged
    last_step: int = 0


@dataclass(frozen=True)
class RunFiles:
    """The content of a run, or of a folder of results; what is missing is None."""

    folder: Path
    config: RunConfig | None
    info: RunInfo | None
    metrics: Metrics | None
    merge: MergeReport | None
    evaluations: tuple[Results, ...]  # one for each protocol, `label` first
    held_out: tuple[HeldOut, ...] = ()  # one for each pack that was validated
    screening: Screening | None = None  # of the run's adapters, if any are left out of a merge
    rows: RowLosses | None = None  # of `poc-lora eval --rows`
    tasks: TaskResults | None = None  # of `poc-lora eval --harness-tasks`
    # What has other weights now than were evaluated: for each of `evaluations`, and of `rows` and `tasks`.
    changed: tuple[tuple[str, ...], ...] = ()
    rows_changed: tuple[str, ...] = ()
    tasks_changed: tuple[str, ...] = ()

    @property
    def results(self) -> Results | None:
        """The evaluation that the report is about, if any."""
        return self.evaluations[0] if self.evaluations else None

    def out_of_date(self, i: int) -> list[str]:
        """Says in a sentence if weights have changed since evaluation i; otherwise there is none."""
        alone = len(self.evaluations) == 1 and self.rows is None and self.tasks is None
        protocol = "" if alone else f", protocol {short(self.evaluations[i].protocol, 20)}"
        return _have_changed(self.changed[i], f"this evaluation{protocol}")

    @property
    def rows_out_of_date(self) -> list[str]:
        """Says in a sentence if weights have changed since `rows`; otherwise there is none."""
        return _have_changed(self.rows_changed, "the evaluation on rows")

    @property
    def tasks_out_of_date(self) -> list[str]:
        """Says in a sentence if weights have changed since `tasks`; otherwise there is none."""
        return _have_changed(self.tasks_changed, "the evaluation on tasks of lm-eval")


def _have_changed(changed: Sequence[str], since: str) -> list[str]:
    return [f"The weights of {', '.join(changed)} have changed since {since}: evaluate again."] if changed else []


def read_run(folder: Path) -> RunFiles:
    """Read a run, or a folder of results. Raises RunError or ConfigError for damaged files and other folders."""
    run = RunFolder(folder)
    evaluated = [place for place in (*run.evaluations, folder) if (place / RESULTS).is_file()]
    if not run.is_run and not evaluated:
        what = "neither a run nor an evaluation" if folder.is_dir() else "no such folder"
        raise RunError(what, where=folder, fix="give a run (with config.yaml) or a folder with results.json")
    evaluations = tuple(Results.read(place / RESULTS) for place in evaluated)
    screening = screen(folder)
    rows = RowLosses.read_if_there(run.evaluation("rows") / ROW_LOSSES)
    tasks = TaskResults.read_if_there(run.evaluation("tasks") / TASK_RESULTS)
    return RunFiles(
        folder=folder,
        config=load_config(run.config) if run.is_run else None,
        info=RunInfo.read_if_there(run.info),
        metrics=_read_metrics(run.metrics),
        merge=MergeReport.read_if_there(run.merge_report),
        evaluations=evaluations,
        held_out=tuple(read_held_out(folder)),
        screening=screening if screening and screening.left_out else None,
        rows=rows,
        tasks=tasks,
        changed=tuple(_changed(run, _digests(*found)) for found in zip(evaluated, evaluations, strict=True)),
        rows_changed=_changed(run, rows.adapter_digests) if rows else (),
        tasks_changed=_changed(run, tasks.adapter_digests) if tasks else (),
    )


def best_adapter(files: RunFiles) -> str | None:
    """The name of the best adapter: on rows that were scored, else on benchmarks, else on the run's held-out rows."""
    if files.rows is not None and (compared := rows_held_out(files.rows)):
        return str(compared.best)
    if files.results is not None and files.results.best:
        return files.results.best
    if len(files.held_out) == 1:
        return f"{files.held_out[0].best:02d}"
    return None


def of_these_weights(place: Path, variant: str, adapter: Path) -> bool | None:
    """Whether the evaluation of `variant` in the folder `place` is of the weights that the folder `adapter` has now.

    None if one of them is missing, or the evaluation does not name its weights.
    """
    return has_weights(adapter, _digest_in(place, variant))


def has_weights(adapter: Path, digest: str | None) -> bool | None:
    """Whether the folder `adapter` has the weights of a digest now; None if there is no digest, or no such folder."""
    if not (digest and all((adapter / name).is_file() for name in (WEIGHTS_NAME, CONFIG_NAME))):
        return None
    return digest == adapter_digest(adapter)


def _digest_in(place: Path, variant: str) -> str | None:
    if not re.fullmatch(r"[\w .@+-]{1,100}", variant):  # a name from results.json must not lead out of the folder
        return None
    scores = VariantScores.read_if_there(place / variant_file(variant))
    return scores.adapter_digest if scores else None


def _digests(place: Path, results: Results) -> dict[str, str]:
    """By variant, of what was evaluated in the folder `place`."""
    found = {variant: _digest_in(place, variant) for variant in ("merged", *map(adapter_key, results.adapters))}
    return {variant: digest for variant, digest in found.items() if digest}


def _changed(run: RunFolder, digests: Mapping[str, str]) -> tuple[str, ...]:
    """What has other weights now than an evaluation had: the run's own adapters, which have numbers, and its merge."""
    folders = {"merged": ("the merge", run.merged)}
    for variant in digests:
        if number := re.fullmatch(adapter_key("([0-9]{1,9})"), variant):
            folders[variant] = (f"adapter {number[1]}", run.adapter(number[1]))
    found = {variant: has_weights(folder, digests.get(variant)) for variant, (_, folder) in folders.items()}
    return tuple(folders[variant][0] for variant, same in found.items() if same is False)


def _read_metrics(path: Path) -> Metrics | None:
    if not path.is_file():
        return None
    metrics = Metrics()
    for _, line in read_metrics(path, max_bytes=MAX_METRICS_BYTES):
        if line.adapter == "merge_of_best":  # of other adapters at every validation: a point of no curve
            continue
        name = line.adapter if isinstance(line.adapter, str) else f"{line.adapter:02d}"
        if name == "merge" and line.members is not None:
            name = f"running merge of {len(line.members)}"
        metrics.last_step = max(metrics.last_step, line.step)
        if line.diverged:
            metrics.diverged.setdefault(name, line.step)
        for measure in MEASURES if not line.kept else ():  # a point of no curve
            if (value := getattr(line, measure)) is not None:
                metrics.curves[measure].setdefault(name, []).append((line.step, float(value)))
    return metrics
