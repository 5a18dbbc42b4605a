"""Several runs as one study: means and intervals over runs, of `eval --study` and `report --compare`."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from poc_lora.artifacts.results import Results
from poc_lora.artifacts.row_losses import RowLosses
from poc_lora.artifacts.run_folder import STUDY, STUDY_TABLE, RunFolder, variant_file
from poc_lora.artifacts.run_info import NO_FILES
from poc_lora.artifacts.study import OverRuns, RunDifference, Study
from poc_lora.artifacts.variant_scores import VariantScores
from poc_lora.config import flatten
from poc_lora.distributed import is_rank_0
from poc_lora.errors import RequestError, RunError
from poc_lora.evaluation.evaluate import evaluate
from poc_lora.evaluation.intervals import mean_interval, student_quantile
from poc_lora.evaluation.rows import evaluate_rows
from poc_lora.files import as_paths, write_atomic
from poc_lora.reporting.escape import code, markdown
from poc_lora.reporting.held_out import rows_held_out
from poc_lora.reporting.results_tables import write_report
from poc_lora.reporting.run_files import RunFiles, read_run
from poc_lora.reporting.tables import Table, Value, markdown_table

MEASURES = {
    "accuracy": "accuracy (%)",
    "nll": "log loss",
    "rows_loss": "loss on rows",
    "held_out_loss": "held-out loss",
}
VARIANTS = {
    "base": "base",
    "average": "LoRA (average)",
    "best": "LoRA (best)",
    "merged": "PoC merge",
    "ensemble": "prediction ensemble",
}
PAIRS = (("merged", "best"), ("merged", "average"), ("ensemble", "merged"))
# Settings that change neither an adapter's law nor what is measured.
NOT_THE_LAW = (
    "adapters.seed",
    "adapters.per_device",
    "checkpoint.",
    "output",
    "track",
    "train.compile",
    "train.gradient_checkpointing",
    "train.tokens_per_microbatch",
    "train.validate_every",
)


def evaluate_study(
    runs: Sequence[str | Path],
    *,
    data: str | Path | None = None,
    rows: str | Path | Sequence[str | Path] = (),
    out: str | Path | None = None,
    **options: Any,
) -> Study:
    """Evaluate runs one after another, each as `evaluate` or `evaluate_rows` would, and compare them as one study.

    Args:
        runs: Run folders that differ in the seed.
        data: As for `evaluate`.
        rows: As for `evaluate_rows`, in place of `data`.
        out: The folder for study.json and study.md; default: the first run's.
        **options: The other options of `evaluate`, or of `evaluate_rows`.

    Raises:
        RequestError: For fewer than two runs, or the same run twice.
        PocLoraError: As the evaluation of one run does.
    """
    folders = as_paths(runs)
    require_runs(folders)
    found = []
    for run in folders:
        if rows:
            losses = evaluate_rows([run], rows, **options)
            found.append(replace(read_run(run), evaluations=(), rows=losses))
        else:
            results = evaluate([run], data=data, **options)
            if is_rank_0():
                write_report(run, results)
            found.append(replace(read_run(run), evaluations=(results,), rows=None))
    study = make_study(found)
    if is_rank_0():
        write_study(study, folders[0] if out is None else Path(out))
    return study


def require_runs(runs: Sequence[Path]) -> None:
    """Raise RequestError unless these are two or more different runs."""
    for run in runs:
        if not RunFolder(run).is_run:
            what = "a study is over runs, and this is none" if run.is_dir() else "no such folder"
            raise RequestError(what, where=run, fix="give run folders, which have a config.yaml")
    if len({run.resolve() for run in runs}) < len(runs):
        raise RequestError("a run is named twice", where="--study", fix="give every run once")
    if len(runs) < 2:
        raise RequestError(
            "one run is no study",
            where="--study",
            fix="give two or more runs of the same YAML with other adapters.seed",
        )


def make_study(runs: Sequence[RunFiles]) -> Study:
    """Returns means and intervals over runs, of what all of them have.

    Raises:
        RunError: Two runs are copies of one, or were evaluated on different questions or rows.
    """

    require_other_draws(runs)
    require_same_questions(runs)
    values = [measured(run) for run in runs]
    measures: dict[str, dict[str, OverRuns]] = {}
    differences: dict[str, dict[str, OverRuns]] = {}
    for measure in MEASURES:
        for variant in VARIANTS:
            found = [one[measure][variant] for one in values if variant in one.get(measure, {})]
            if len(found) == len(runs):
                measures.setdefault(measure, {})[variant] = over_runs(found)
        for ours, theirs in PAIRS:
            there = measures.get(measure, {})
            if ours in there and theirs in there:
                pairs = zip(there[ours].values, there[theirs].values, strict=True)
                differences.setdefault(measure, {})[f"{ours} - {theirs}"] = over_runs([a - b for a, b in pairs])
    results, config = runs[0].results, runs[0].config
    return Study(
        runs=[str(run.folder) for run in runs],
        adapters=config.adapters.count if config else len(results.adapters) if results else 0,
        base_model=results.base_model if results else config.model.name if config else "",
        best_chosen_on=results.best_chosen_on if results else None,
        trained_on=any(run.rows is not None and run.rows.trained_on for run in runs),
        differ_in=differing([settings_of(run) for run in runs]),
        measures=measures,
        differences=differences,
    )


def over_runs(values: Sequence[float]) -> OverRuns:
    """A figure over runs, from each run's value."""
    mean, half_width = mean_interval(values)
    return OverRuns(mean=mean, half_width=half_width, values=list(values))


def measured(run: RunFiles) -> dict[str, dict[str, float]]:
    """Returns what is known of one run, by measure and variant."""
    found = {"accuracy": _accuracies(run.results), "nll": _log_losses(run.results), "rows_loss": _row_losses(run.rows)}
    count = sum(len(pack.adapters) for pack in run.held_out)
    if len(run.held_out) == 1:  # adapters that were trained in several packs have no merge that was validated
        (pack,) = run.held_out
        found["held_out_loss"] = {"base": pack.base, "average": pack.average, "best": pack.adapters[pack.best]}
        found["held_out_loss"] |= {"merged": pack.merge} if count > 1 else {}
    return {measure: values for measure, values in found.items() if values}


def single_adapters(run: RunFiles) -> dict[str, list[float]]:
    """Returns what is known of every adapter of a run, by measure; only what all of them have."""
    found: dict[str, list[float]] = {}
    results, compared = run.results, None if run.rows is None else rows_held_out(run.rows)
    if results is not None:
        found["accuracy"] = [scored.average.value for scored in results.adapters.values()]
        if len(results.calibration_of_adapters) == len(results.adapters):
            found["nll"] = [calibration.nll.value for calibration in results.calibration_of_adapters.values()]
    if compared is not None:
        found["rows_loss"] = list(compared.adapters.values())
    if held_out := [loss for pack in run.held_out for loss in pack.adapters.values()]:
        found["held_out_loss"] = held_out
    return found


def _accuracies(results: Results | None) -> dict[str, float]:
    if results is None or not results.adapters:
        return {}
    scored = {
        "base": results.base,
        "average": results.average,
        "best": results.adapters[results.best],
        "merged": results.merged,
        "ensemble": results.ensemble,
    }
    return {variant: one.average.value for variant, one in scored.items() if one is not None}


def _log_losses(results: Results | None) -> dict[str, float]:
    if results is None:
        return {}
    found = {variant: calibration.nll.value for variant, calibration in results.calibration.items()}
    if results.adapters and len(results.calibration_of_adapters) == len(results.adapters):
        found["average"] = fmean(calibration.nll.value for calibration in results.calibration_of_adapters.values())
    return found


def _row_losses(rows: RowLosses | None) -> dict[str, float]:
    compared = None if rows is None else rows_held_out(rows)
    if rows is None or compared is None:
        return {}
    found = {"base": compared.base, "average": compared.average, "best": compared.adapters[compared.best]}
    sums = {"merged": rows.merged, "ensemble": rows.ensemble}
    return found | {variant: sum(losses) / sum(rows.tokens) for variant, losses in sums.items() if losses}


def settings_of(run: RunFiles) -> dict[str, object]:
    """Returns how a run was trained, merged and evaluated, by dotted key or in words."""
    found: dict[str, object] = dict(flatten(run.config)) if run.config else {}
    if run.info is not None:
        found["the training rows"] = _digests(run.info.data_sha256)
        found["the validation rows"] = _digests(run.info.validation_sha256)
    if run.results is not None:
        found["the base model evaluated"] = run.results.base_model
        found["what LoRA (best) was chosen on"] = run.results.best_chosen_on
        merged: tuple[str, int | None, Sequence[float]] | None = None
        if run.results.exact_average:
            M = len(run.results.adapters)
            merged = "average", None, (1 / M,) * M
        elif run.merge is not None and run.results.merged is not None:
            merged = run.merge.method, run.merge.requested_rank, run.merge.weights
        if merged is not None:
            found |= zip(("the merge's method", "the merge's rank", "the merge's weights"), merged, strict=True)
    return found


def _digests(files: Mapping[str, str]) -> list[str]:
    """What identifies rows wherever their files lie; of rows from the Hub only their tokens are known."""
    return sorted(value for path, value in files.items() if path not in NO_FILES) or [*files.values()]


def differing(settings: Sequence[Mapping[str, object]], but: Sequence[str] = NOT_THE_LAW) -> list[str]:
    """Returns the settings in which runs differ, leaving out keys that begin with one of `but`."""
    first, *others = settings
    if any(one.get("train.keep") == "best" for one in settings):  # kept weights depend on when they are tried
        but = [key for key in but if key != "train.validate_every"]
    keys = dict.fromkeys(key for one in settings for key in one if not key.startswith(tuple(but)))
    return [key for key in keys if any(one.get(key) != first.get(key) for one in others)]


def same_but_for_the_seed(one: RunFiles, other: RunFiles) -> bool:
    """Whether two runs are draws from one law."""
    return not differing([settings_of(one), settings_of(other)])


def require_other_draws(runs: Sequence[RunFiles]) -> None:
    """Raise RunError for a run of the settings and seed of one before, which would count twice."""
    but = [key for key in NOT_THE_LAW if key != "adapters.seed"]
    for one, other in itertools.combinations(runs, 2):
        if other.config and not differing([settings_of(one), settings_of(other)], but):
            raise RunError(
                f"the same settings and the same seed ({other.config.adapters.seed}) as {one.folder}, "
                "so it is no other draw",
                where=other.folder,
                fix="leave it out, or train it with another adapters.seed",
            )


def require_same_questions(runs: Sequence[RunFiles]) -> None:
    """Raise RunError, saying in what, for a run that was not evaluated as the first one was."""
    expected = _asked(runs[0])
    for run in runs[1:]:
        found = _asked(run)
        if others := [name for name in expected | found if expected.get(name) != found.get(name)]:
            raise RunError(
                f"evaluated with other {', '.join(others)} than {runs[0].folder}",
                where=run.folder,
                fix="evaluate both on the same questions or rows, with the same options",
            )


def _asked(run: RunFiles) -> dict[str, object]:
    """What must be equal for the figures of two runs to be compared, by name."""
    found: dict[str, object] = {}
    if (results := run.results) is not None:
        scores = VariantScores.read_if_there(RunFolder(run.folder).evaluation(results.protocol) / variant_file("base"))
        if scores is not None:
            found |= {name: value for name, value in scores.settings.items() if name not in ("base", "adapters")}
        found |= {"protocol": results.protocol, "prompt": results.prompt, "limit": results.limit}
        found["questions"] = results.questions, results.questions_sha256
    if (rows := run.rows) is not None:
        found["rows, dtype or settings"] = rows.tokens, rows.prompt, rows.asked
    return found


def study_tables(study: Study) -> list[Table]:
    """Returns the table of the variants and that of their differences."""
    titles = [MEASURES[measure] for measure in study.measures]
    rows: list[list[Value]] = [[VARIANTS[variant], *cells] for variant, cells in variant_cells(study).items()]
    n = len(study.runs)
    tables = [Table(f"Mean over {n} runs ± half-width of its 95 % interval", ["", *titles], rows, strong=["PoC merge"])]
    if study.differences:
        caption = "Differences within each run: mean over runs ± half-width of the 95 % interval"
        tables.append(Table(caption, ["", *titles], difference_rows(study)))
    return tables


def variant_cells(study: Study) -> dict[str, list[str]]:
    """Returns by variant a cell for each measure of the study. The base needs no interval on the same questions."""
    cells = {}
    for variant in VARIANTS:
        found = [(measure, values.get(variant)) for measure, values in study.measures.items()]
        if variant == "base":
            found = [
                (m, one and one.model_copy(update={"half_width": math.nan} if len(set(one.values)) == 1 else {}))
                for m, one in found
            ]
        if any(one for _, one in found):
            cells[variant] = [figure(measure, one) for measure, one in found]
    return cells


def difference_rows(study: Study) -> list[list[Value]]:
    """Returns a row for each pair of variants, with a cell for each measure of the study."""
    return [
        [
            f"{VARIANTS[ours]} − {VARIANTS[theirs]}",
            *(
                figure(measure, study.differences.get(measure, {}).get(f"{ours} - {theirs}"), signed=True)
                for measure in study.measures
            ),
        ]
        for ours, theirs in PAIRS
        if any(f"{ours} - {theirs}" in found for found in study.differences.values())
    ]


def figure(measure: str, found: OverRuns | RunDifference | None, *, signed: bool = False) -> str:
    """Returns a mean and the half-width of its interval as text, accuracies in percent."""
    if found is None:
        return ""
    scale, digits = (100, 2) if measure == "accuracy" else (1, 3)
    half = "" if math.isnan(found.half_width) else f" ± {scale * found.half_width:.{digits}f}"
    return f"{scale * found.mean:{'+' if signed else ''}.{digits}f}{half}"


def study_notes(study: Study) -> list[str]:
    """Returns what the intervals mean, and what limits them."""
    n = len(study.runs)
    notes = [
        f"Intervals are over the {n} training runs (Student's t), with the questions fixed: they say what other seeds "
        "would give, not other questions."
    ]
    if n == 2:
        notes.append(
            f"Two runs say little: their interval is {student_quantile(1):.1f} standard errors to either side, that of "
            f"three {student_quantile(2):.1f}, of five {student_quantile(4):.1f}."
        )
    if study.differ_in:
        notes.append(
            f"Besides the seed the runs differ in {', '.join(study.differ_in)}: the intervals are over that too."
        )
    chosen = {"test": "the test questions themselves", "validation": "validation questions"}
    if study.best_chosen_on is not None:
        where = chosen.get(study.best_chosen_on, study.best_chosen_on)
        notes.append(f"LoRA (best) is chosen in each run by its accuracy on {where}.")
    if study.trained_on:
        notes.append("A file of these rows was trained on: losses on it say little about new rows.")
    if "rows_loss" in study.measures:
        notes.append("On rows LoRA (best) is chosen on these very rows, which flatters it.")
    if "held_out_loss" in study.measures:
        notes.append(
            "The held-out loss is per answer token of the rows that each run held out, which its seed chooses; LoRA "
            "(best) is chosen on these very rows, which flatters it."
        )
    return notes


def write_study(study: Study, folder: Path) -> None:
    """Writes study.json and study.md."""
    lines = [f"# {len(study.runs)} runs as one study", "", f"{study.adapters} adapters each:", ""]
    lines += [f"- {code(run)}" for run in study.runs]
    for table in study_tables(study):
        lines += ["", f"{table.caption}:", "", *markdown_table(table)]
    lines += ["", *(f"- {markdown(note)}" for note in study_notes(study))]
    study.write(folder / STUDY)
    write_atomic(folder / STUDY_TABLE, "\n".join(lines) + "\n")
