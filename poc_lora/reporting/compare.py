"""Compares runs: accuracy against λ."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import rich.table

from poc_lora.artifacts.results import Estimate, Results, Scored
from poc_lora.artifacts.run_folder import RunFolder
from poc_lora.config import RunConfig
from poc_lora.errors import RunError
from poc_lora.files import write_atomic
from poc_lora.reporting import figures
from poc_lora.reporting.blocks import Section, chart
from poc_lora.reporting.escape import short
from poc_lora.reporting.run_files import RunFiles, read_run
from poc_lora.reporting.study import (
    differing,
    figure,
    make_study,
    require_other_draws,
    require_same_questions,
    same_but_for_the_seed,
    settings_of,
)
from poc_lora.reporting.tables import Table, Value, markdown_table, terminal_table

SWEPT = ("optim.temperature", "adapters.seed", "output")
# By row of an evaluation's table: its role in `plotting.COLOURS`, and its accuracies.
ROLES: dict[str, tuple[str, Callable[[Results], Scored | None]]] = {
    "LoRA (average)": ("adapter", lambda results: results.average),
    "LoRA (best)": ("best", lambda results: results.adapters.get(results.best)),
    "PoC merge": ("merge", lambda results: results.merged),
    "prediction ensemble": ("ensemble", lambda results: results.ensemble),
}

Compared = tuple[RunFiles, RunConfig, Results]


def comparison(runs: Sequence[RunFiles]) -> Section:
    """Returns a table and a figure of average accuracy against λ over several runs.

    Raises:
        RunError: A run or a copy of it is given twice, has no config.yaml or was not evaluated, or the runs were
            evaluated on different questions.
    """
    known = [_checked(run) for run in runs]
    if len({run.folder.resolve() for run in runs}) < len(runs):
        raise RunError("a run is compared with itself", fix="give every run once")
    differences = _differences(known)
    require_same_questions([replace(run, rows=None) for run in runs])
    require_other_draws(runs)
    known.sort(key=lambda one: (_temperature(one[1]), one[1].adapters.seed, str(one[0].folder)))
    names = [run.folder.resolve().name for run, _, _ in known]
    if len(set(names)) < len(names):
        names = [str(run.folder) for run, _, _ in known]
    section = Section("compare", "Accuracy against λ")
    section.paragraphs.append(differences)
    for name, (run, _, _) in zip(names, known, strict=True):
        section.paragraphs += [f"{short(name)}: {note}" for note in run.out_of_date(0)]
    section.tables.append(
        Table(
            "Average accuracy (%) ± standard error of sampling questions",
            ["run", "λ", "seed", "adapters", *ROLES, "merge − best (95 %)"],
            [_row(name, config, results) for name, (_, config, results) in zip(names, known, strict=True)],
        )
    )
    section.tables += _over_runs(known)
    rows = {name: (role, _points(scored, known)) for name, (role, scored) in ROLES.items()}
    rows = {name: (role, points) for name, (role, points) in rows.items() if points}
    repeated = len({_temperature(config) for _, config, _ in known}) < len(known)
    section.charts.append(
        chart(
            figures.temperature_figure(rows),
            "Average accuracy against the temperature λ",
            "; ".join(
                f"{name}: " + ", ".join(f"{value:.2f} % at λ = {level:g}" for level, value, _ in points)
                for name, (_, points) in rows.items()
            ),
            "If several runs have the same λ: their mean and its standard error over runs. Otherwise the standard "
            "error of sampling questions, which does not cover other seeds."
            if repeated
            else "Bars are standard errors of sampling questions; they do not cover other seeds.",
        )
    )
    return section


def write_comparison(folders: Sequence[Path]) -> tuple[list[rich.table.Table], list[str]]:
    """Writes the comparison of the runs to comparison.md in the first; returns its tables and notes for a terminal."""
    section = comparison(list(map(read_run, folders)))
    lines = [f"# {section.title}", "", *section.paragraphs]
    for table in section.tables:
        lines += ["", f"{table.caption}.", "", *markdown_table(table)]
    write_atomic(RunFolder(folders[0]).comparison, "\n".join(lines) + "\n")
    # In 80 columns there is no room for names of runs, numbers of adapters and intervals.
    each, *over_runs = section.tables
    columns = ["λ", "seed", *ROLES, "merge − best"]
    rows = [[level, seed, *cells, str(gain).partition(" ")[0]] for _, level, seed, _, *cells, gain in each.rows]
    narrow = {title: title.replace(" ", "\n") for title in columns}
    tables = [terminal_table(table, narrow) for table in (replace(each, columns=columns, rows=rows), *over_runs)]
    return tables, [f"The runs from the top: {', '.join(str(name) for name, *_ in each.rows)}.", *section.paragraphs]


def _checked(run: RunFiles) -> Compared:
    if run.config is None:
        raise RunError("an evaluation without a run has no λ", where=run.folder, fix="compare run folders")
    if len(run.config.values("optim.temperature")) > 1:
        what = "the adapters of a run have different λ (adapters.vary), so it has no place among those of one"
        raise RunError(what, where=run.folder, fix="see its own report, which shows the sweep")
    if run.results is None:
        fix = f"first: poc-lora eval {run.folder} --data DIR"
        raise RunError("a run that was not evaluated cannot be compared", where=run.folder, fix=fix)
    return run, run.config, run.results


def _temperature(config: RunConfig) -> float:
    """The λ of all adapters of a run that was checked."""
    return config.values("optim.temperature")[0]


def _differences(known: Sequence[Compared]) -> str:
    """Describes how the runs differ besides the settings that are swept."""
    found = differing([settings_of(run) for run, _, _ in known], SWEPT)
    if not found:
        return "The runs differ only in λ and in the seed, as far as their files show."
    return f"Besides λ and the seed, the runs differ in {', '.join(found)}: λ may not explain their difference."


def _row(name: str, config: RunConfig, results: Results) -> list[Value]:
    scored = [found(results) for _, found in ROLES.values()]
    d = results.comparisons.get("best")
    gain = "" if d is None else f"{100 * d.value:+.2f} ({100 * d.low:+.2f} to {100 * d.high:+.2f})"
    settings: list[Value] = [f"{_temperature(config):g}", str(config.adapters.seed), len(results.adapters)]
    return [short(name), *settings, *(one.average if one else "" for one in scored), gain]


def _over_runs(known: Sequence[Compared]) -> list[Table]:
    """Returns a table of means and intervals over runs that differ in the seed alone, by λ; none if there are none."""
    groups: list[list[Compared]] = []
    for one in known:
        own = next((group for group in groups if same_but_for_the_seed(group[0][0], one[0])), None)
        if own is None:
            groups.append(own := [])
        own.append(one)
    rows: list[list[Value]] = []
    for group in groups:
        if len(group) > 1:
            study = make_study([replace(run, rows=None) for run, _, _ in group])
            scored, gains = study.measures["accuracy"], study.differences.get("accuracy", {})
            cells = [figure("accuracy", scored.get(variant)) for variant in ("average", "best", "merged", "ensemble")]
            gain = figure("accuracy", gains.get("merged - best"), signed=True)
            rows.append([f"{_temperature(group[0][1]):g}", len(group), *cells, gain])
    caption = "Mean accuracy (%) over runs ± half-width of its 95 % interval over runs (Student's t), questions fixed"
    return [Table(caption, ["λ", "runs", *ROLES, "merge − best"], rows)] if rows else []


def _points(scored: Callable[[Results], Scored | None], known: Sequence[Compared]) -> list[tuple[float, float, float]]:
    """Returns (λ, accuracy, error) in percent. The error is over runs if several have that λ, else over questions."""
    by_level: dict[float, list[Estimate]] = {}
    for _, config, results in known:
        if found := scored(results):
            by_level.setdefault(_temperature(config), []).append(found.average)
    points = []
    for level, estimates in sorted(by_level.items()):
        values = [100 * estimate.value for estimate in estimates]
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 100 * estimates[0].error
        points.append((level, statistics.fmean(values), error))
    return points
