"""The sections of the report made from results.json: accuracies, paired tests, and accuracy against m."""

import math
import statistics
from dataclasses import replace
from pathlib import Path

from poc_lora.artifacts.results import Estimate, Results, Scored
from poc_lora.reporting import figures
from poc_lora.reporting.blocks import Chart, Section, chart
from poc_lora.reporting.escape import short
from poc_lora.reporting.held_out import merge_of, rows_notes, rows_table
from poc_lora.reporting.rank_tables import advised, ranks_table
from poc_lora.reporting.results_tables import (
    accuracy_table,
    adapters_table,
    calibration_table,
    columns,
    notes,
    paired_table,
    table_rows,
)
from poc_lora.reporting.row_texts import match_notes, match_table, texts_table
from poc_lora.reporting.run_files import RunFiles
from poc_lora.reporting.tables import Table
from poc_lora.reporting.task_tables import task_notes, task_tables


def headline(results: Results | None) -> tuple[str, list[tuple[str, Estimate]]]:
    """Returns the outcome of an evaluation in a sentence, and the average accuracies to show first."""
    if results is None:
        return "Nothing has been evaluated yet.", []
    if not results.adapters:
        return "The model was evaluated alone, without an adapter.", [("the model", results.base.average)]
    best, merged, M = results.adapters[results.best].average, results.merged, len(results.adapters)
    tiles = [("base", results.base.average)]
    tiles += [("average adapter", results.average.average)] if M > 1 else []
    tiles += [("best adapter" if M > 1 else "the adapter", best)]
    tiles += [("merge", merged.average)] if merged else []
    tiles += [(f"merge, rank {smaller.rank}", smaller.average)] if (smaller := advised(results)) else []
    tiles += [(f"ensemble of {M}", results.ensemble.average)] if results.ensemble else []
    if merged is None:
        return f"{M} adapters were evaluated, and no merge of them.", tiles
    over_average = _above(merged.average.value - results.average.average.value)
    if M == 1:
        return f"The merge is {over_average} the one adapter it is made of.", tiles
    where = "the test questions themselves" if results.best_chosen_on == "test" else "validation questions"
    d = results.comparisons.get("best")
    merge = merge_of(results.merged_adapters, M).capitalize()
    if d is None:
        return f"{merge} is {over_average} the average adapter.", tiles
    them = "them" if results.merged_adapters == M else f"all {M}"
    interval = f"95 % interval {100 * d.low:+.2f} to {100 * d.high:+.2f}"
    if d.low <= 0 <= d.high:
        sentence = f"{merge} and the best of {them} cannot be told apart here: it is {_above(d.value)}"
    else:
        sentence = f"{merge} {'beats' if d.value > 0 else 'loses to'} the best of {them}: {_above(d.value)}"
    return (
        f"{sentence} that one ({interval}), which had to be picked on {where}, and {over_average} the average adapter.",
        tiles,
    )


def _above(difference: float) -> str:
    """A difference of accuracies in words, such as `4.27 points above`."""
    return f"{abs(100 * difference):.2f} points {'above' if difference >= 0 else 'below'}"


def evaluation(files: RunFiles) -> Section:
    section = Section("evaluation", "Evaluation")
    out_of_date = [*files.rows_out_of_date, *files.tasks_out_of_date]
    out_of_date += [note for i in range(len(files.evaluations)) for note in files.out_of_date(i)]
    section.paragraphs += [" ".join(out_of_date)] if out_of_date else []  # the first paragraph is above the tables
    if files.rows is not None:
        section.tables.append(rows_table(files.rows))
        section.paragraphs += rows_notes(files.rows)
        if texts := files.rows.texts:
            section.tables += [match_table(texts), texts_table(texts)]
            section.paragraphs += match_notes(texts)
    if files.tasks is not None:
        section.tables += task_tables(files.tasks)
        section.paragraphs += task_notes(files.tasks)
    if not files.evaluations:
        what = "Nothing has been evaluated" if not section.tables else "No questions were asked"
        section.omitted.append(f"{what}: poc-lora eval RUN --data DIR.")
        return section
    for results in files.evaluations:
        protocol = f", protocol {short(results.protocol, 20)}" if len(files.evaluations) > 1 else ""
        _evaluation(section, results, protocol)
    return section


def _evaluation(section: Section, results: Results, protocol: str) -> None:
    """Adds an evaluation; `protocol` distinguishes its tables from those of others."""
    section.paragraphs.append(
        f"Accuracy in percent ± standard error, by the protocol “{short(results.protocol)}” with the prompt "
        f"“{short(results.prompt)}”, of {short(results.base_model)}."
    )
    if Path(results.base_model).parts[-2:] == ("microworld", "model"):
        section.paragraphs.append(
            "The base model is the embedded one, and these benchmarks are about its invented world: the figures cannot "
            "be compared with those of the real benchmarks."
        )
    section.tables.append(_average_first(accuracy_table(results, protocol)))
    if not section.charts:
        section.charts.append(_averages(results))
        section.charts += [_ranks(results, results.merged)] if results.truncated and results.merged else []
    if results.merged is not None and results.comparisons:
        section.tables.append(paired_table(results, protocol))
    if results.truncated:
        section.tables.append(ranks_table(results, protocol))
    if results.calibration:
        section.tables.append(calibration_table(results, protocol))
    section.paragraphs += notes(results, paired=False)
    if len(results.adapters) > 1:
        section.tables.append(_average_first(adapters_table(results, protocol)))


def _average_first(table: Table) -> Table:
    """Moves the last column to the front: a phone shows the first ones."""
    rows = [[name, average, *cells] for name, *cells, average in table.rows]
    name, *titles, average = table.columns
    return replace(table, columns=[name, average, *titles], rows=rows)


def subsets(files: RunFiles) -> Section:
    section = Section("subsets", "Accuracy against the number of adapters")
    found = next((results for results in files.evaluations if results.subsets is not None), None)
    if found is None or found.subsets is None:
        section.omitted.append(
            "No merges of fewer adapters were scored: poc-lora eval RUN --data DIR --subsets does it."
        )
        return section
    scored = found.subsets
    points = [(p.m, 100 * p.accuracy, 0.0 if math.isnan(p.error) else 100 * p.error) for p in scored.points]
    section.charts.append(
        chart(
            # The best adapter's accuracy is known on all questions, the points' perhaps on some.
            figures.subsets_figure(points, None if scored.limit else 100 * found.adapters[found.best].average.value),
            "Accuracy of merges of m adapters",
            "; ".join(f"{m} merged: mean {value:.2f} %" for m, value, _ in points) + ".",
            "The mean over subsets of m adapters ± standard error over them, which is rough: subsets share adapters."
            + ("" if scored.limit is None else f" On the first {scored.limit} questions of each benchmark."),
        )
    )
    distances = [(p.m, p.distance) for p in scored.points if p.distance is not None and p.distance > 0]
    if distances:
        law = scored.variance_law
        fitted = None if law is None else (law.c, law.floor, max(p.m for p in scored.points))
        section.charts.append(
            chart(
                figures.distance_figure(distances, fitted),
                "Distance from the merge of all",
                "; ".join(f"{m} merged: {distance:.3g}" for m, distance in distances) + ".",
                "Mean squared distance of the label logits from those of the merge of all adapters"
                + (
                    "."
                    if law is None
                    else f"; the law c (1/m − 1/M) + floor, c = {law.c:.3g}, floor = {law.floor:.3g}."
                ),
            )
        )
    return section


def _ranks(results: Results, merged: Scored) -> Chart:
    whole = 100 * merged.average.value
    points = [
        (one.rank, 100 * one.average.value, whole + 100 * one.difference.low, whole + 100 * one.difference.high)
        for one in results.truncated
    ]
    return chart(
        figures.ranks_figure(points, whole),
        "Accuracy of the merge against its rank",
        "; ".join(f"rank {rank}: {value:.2f} %" for rank, value, *_ in points) + f"; the merge: {whole:.2f} %.",
        "Bars are 95 % intervals of the paired difference from the merge itself, the dashed line: where a bar contains "
        "the line, the two cannot be told apart.",
    )


def _averages(results: Results) -> Chart:
    def points(*scored: Scored) -> list[tuple[float, float]]:
        return [(100 * s.average.value, 100 * s.average.error) for s in scored]

    chance = statistics.fmean(results.chance[b] for b in columns(results))
    rows = [(short(name, 28), role, points(scored)) for name, role, scored in table_rows(results)]
    if (M := len(results.adapters)) > 1:
        rows.insert(1, (f"{M} adapters", "adapter", points(*results.adapters.values())))
    description = "; ".join(
        f"{name} {values[0][0]:.2f} %" if len(values) == 1 else f"{name} {min(values)[0]:.2f} to {max(values)[0]:.2f} %"
        for name, _, values in rows
    )
    return chart(
        figures.averages_figure(rows, 100 * chance),
        "Average accuracy of every variant",
        description + ".",
        "Bars are standard errors of sampling questions. Adapters and merge answered the same questions, so their "
        "differences are more certain than the bars suggest.",
    )
