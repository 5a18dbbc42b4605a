"""The tables of an evaluation, the paper's first, and the notes below them."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import rich.table

from poc_lora.artifacts.results import Difference, Estimate, Measure, Results, Scored, Subsets
from poc_lora.artifacts.run_folder import RESULTS_TABLE, RunFolder
from poc_lora.data.commonsense import BENCHMARKS
from poc_lora.evaluation.scores import RESAMPLES, smallest_difference
from poc_lora.files import write_atomic
from poc_lora.reporting.escape import code, markdown, short
from poc_lora.reporting.rank_tables import rank_advice, ranks_table
from poc_lora.reporting.tables import Table, Value, markdown_table, percent, terminal_table

SIGNIFICANT = 1.96  # standard errors, at the 5 % level
PER_BYTE = " per byte"  # ends the title of a column
RANKS_NARROW = {
    "minus the merge (95 % interval)": "minus the merge\n(95 % interval)",
    "MB in float32": "MB in\nfloat32",
    "largest error of a module": "largest error\nof a module",
}
NARROW = {"WinoGrande": "Wino\nGrande", "HellaSwag": "Hella\nSwag", "average": "aver-\nage"}


def table_rows(results: Results) -> list[tuple[str, str, Scored]]:
    """Returns the rows of the table: name, role in `plotting.COLOURS`, accuracies. A single adapter has its own row."""
    if len(results.adapters) > 1:
        best = results.adapters[results.best]
        adapters = [("LoRA (best)", "best", best), ("LoRA (average)", "adapter", results.average)]
    else:
        adapters = [(f"LoRA {name}", "adapter", scored) for name, scored in results.adapters.items()]
    rows = [
        ("base", "base", results.base),
        *adapters,
        ("PoC merge", "merge", results.merged),
        *((f"PoC merge, rank {one.rank}", "merge", one) for one in results.truncated),
        (f"PoC merge, {results.control_name}", "violet", results.control),
        ("prediction ensemble", "ensemble", results.ensemble),
    ]
    return [(name, role, scored) for name, role, scored in rows if scored is not None]


def columns(results: Results) -> dict[str, str]:
    """Returns the benchmarks, folder to title: those of the paper in its order, then others."""
    paper = {b.folder: b.short for b in BENCHMARKS if b.folder in results.questions}
    return paper | {name: name for name in results.questions if name not in paper}


def accuracy_table(results: Results, of: str = "") -> Table:
    """Returns the paper's table: accuracies of the variants; `of` ends its caption if there are other evaluations."""
    asked = {b: results.questions[b] for b in columns(results)}
    chance = {b: results.chance[b] for b in columns(results)}
    levels = {b: Estimate(level, math.nan) for b, level in chance.items()}
    mean_level = Estimate(statistics.fmean(chance.values()), math.nan)
    rows = [_row(results, name, scored) for name, _, scored in table_rows(results)]
    return Table(
        f"Accuracy (%) ± standard error{of}",
        _titles(results),
        [
            ["questions", *_cells(results, asked, asked), sum(asked.values())],
            ["chance level", *_cells(results, levels, levels), mean_level],
            *rows,
        ],
        strong=["PoC merge"],
        bold=_best_of_columns(rows, _titles(results)),
    )


def adapters_table(results: Results, of: str = "") -> Table:
    """Returns the accuracies of every adapter."""
    rows = [_row(results, name, scored) for name, scored in results.adapters.items()]
    caption = f"Every adapter: accuracy (%) ± standard error{of}"
    return Table(caption, _titles(results), rows, strong=[results.best], folded=True)


def paired_table(results: Results, of: str = "") -> Table:
    """Returns the differences between PoC merge and its rivals."""
    return Table(
        f"PoC merge minus, in points of average accuracy (paired bootstrap over questions){of}",
        ["", "difference", "95 % interval", "p", "smallest that would show"],
        [
            [
                short(name),
                f"{100 * d.value:+.2f}",
                f"{100 * d.low:+.2f} to {100 * d.high:+.2f}",
                _p(d.p),
                "" if d.detectable is None else f"{100 * d.detectable:.2f}",
            ]
            for name, d in paired_differences(results).items()
        ],
        note="An interval that contains 0 leaves open which of the two is better. p: how often two equally good "
        "variants would differ as much on so many questions. Smallest that would show: a true difference of this size "
        "is found, at p < 0.05, in 80 % of evaluations like this one; smaller ones are often missed.",
    )


def calibration_table(results: Results, of: str = "") -> Table:
    """Returns log loss, Brier score and expected calibration error of the variants."""
    single = len(results.adapters) == 1
    names = {
        "best": "the adapter" if single else "LoRA (best)",
        "merged": "PoC merge",
        "ensemble": "prediction ensemble",
    }
    measures = {names.get(v, v): (found.nll, found.brier, found.ece) for v, found in results.calibration.items()}
    rows: list[list[Value]] = [[name, *map(_measure, found)] for name, found in measures.items()]
    titles = ["", "log loss", "Brier score", "expected calibration error"]
    return Table(
        f"Calibration ± standard error, mean over benchmarks; lower is better{of}",
        titles,
        rows,
        strong=["PoC merge"],
        bold=_best_of_columns([[name, *found] for name, found in measures.items()], titles, sign=-1),
        note="Can the probabilities be trusted? Log loss and Brier score are 0 where the right answer always has "
        "probability 1; unsure and wrong answers raise both. The expected calibration error is how far confidence is "
        "from accuracy on average: with 0.05, of answers given with 80 % confidence 75 or 85 % may be right.",
    )


def power_note(questions: Mapping[str, int]) -> str:
    """Says before an evaluation which differences its questions can show."""
    n, points = sum(questions.values()), 100 * smallest_difference(questions)
    asked = f"{n:,} question{'s' if n > 1 else ''}"
    if points > 100:
        return f"{asked}: too few to show any difference."
    return (
        f"{asked}: a difference of {points:.1f} points or more would show, in 80 % of "
        "evaluations at the 5 % level, between variants of which one is right and one wrong on a question in five."
    )


def results_summary(results: Results) -> list[rich.table.Table | str]:
    """Returns what the command line prints after an evaluation: the table, in 80 columns, and its notes."""
    table = accuracy_table(results)
    narrow = NARROW | {title: title.replace(PER_BYTE, "\nper byte") for title in table.columns if PER_BYTE in title}
    calibration = [terminal_table(calibration_table(results))] if results.calibration else []
    ranks = [terminal_table(ranks_table(results), RANKS_NARROW)] if results.truncated else []
    return [terminal_table(replace(table, rows=table.rows[1:]), narrow), *ranks, *calibration, *notes(results)]


def results_markdown(results: Results) -> str:
    """Returns results.md: the table, its notes, and a table of all adapters."""
    lines = [
        "# Evaluation",
        "",
        f"Base model {code(results.base_model)}, protocol {code(results.protocol)}, prompt {code(results.prompt)}. "
        "Accuracy in percent ± standard error.",
        "",
        *markdown_table(accuracy_table(results)),
        "",
        *(f"- {markdown(note)}" for note in notes(results)),
    ]
    if results.truncated:
        table = ranks_table(results)
        lines += ["", "## The merge at smaller ranks", "", *markdown_table(table), "", markdown(table.note)]
    if results.calibration:
        lines += ["", "## Calibration", "", *markdown_table(calibration_table(results))]
    if len(results.adapters) > 1:
        lines += ["", "## Every adapter", "", *markdown_table(adapters_table(results), code)]
    return "\n".join(lines) + "\n"


def notes(results: Results, *, paired: bool = True) -> list[str]:
    """Returns the notes below the table: the choice of the best adapter, differences if `paired`, what was left out."""
    lines = []
    if len(results.adapters) > 1:
        where = "the test questions themselves, as in the paper"
        if results.best_chosen_on == "validation":
            where = "validation questions"
        lines.append(
            f"LoRA (best) is adapter {results.best} of {len(results.adapters)}, chosen by its average on {where}."
        )
    if len(table_rows(results)) > 1:
        lines.append(
            "Bold: the best of a column, and what is within 1.96 standard errors of the difference from it: too close "
            "to tell apart without the paired test."
        )
    if paired:
        lines += [f"PoC merge minus {name}: {_difference(d)}." for name, d in paired_differences(results).items()]
    if results.exact_average:
        lines.append(
            f"PoC merge is the exact average of the {len(results.adapters)} adapters, which is not saved: "
            "`poc-lora merge` saves it."
        )
    if advice := rank_advice(results):
        lines.append(advice)
    if results.agreement is not None and not math.isnan(results.agreement):
        lines.append(
            f"Merge and prediction ensemble choose the same label on {percent(results.agreement)} % of questions."
        )
    if unread := {name: share for name, share in results.unread.items() if not math.isnan(share)}:
        shares = ", ".join(f"{name} {percent(share)}" for name, share in unread.items())
        lines.append(f"Answers in which no label was found, in percent: {shares}.")
    if results.subsets is not None:
        lines += _subset_notes(results.subsets)
    for folder, name in columns(results).items():
        if results.too_long[folder]:
            then = "count as wrong" if results.protocol != "harness" else "were cut at their start, as lm-eval does"
            lines.append(
                f"{name}: {results.too_long[folder]} of {results.questions[folder]} questions do not fit the model's "
                f"context and {then}."
            )
    for folder, number in results.groups.items():
        lines.append(
            f"{columns(results)[folder]}: errors and intervals take the {number:,} groups of its "
            f"{results.questions[folder]:,} questions as the samples."
        )
    if results.base.per_byte:
        lines.append(
            "“per byte” takes the choice of the largest log-probability per byte of its text; it is not averaged."
        )
    if results.limit is not None:
        lines.append(f"Only the first {results.limit} questions of each benchmark were asked.")
    lines.append("Standard errors are those of sampling questions; they do not cover other training seeds.")
    return lines


def paired_differences(results: Results) -> dict[str, Difference]:
    """Returns the differences between PoC merge and its rivals, by the rivals' names."""
    single = len(results.adapters) == 1
    names = {
        "best": "the adapter" if single else "LoRA (best)",
        "average": "" if single else "LoRA (average)",  # the average of one adapter is the adapter
        "control": f"PoC merge, {results.control_name}",
    }
    return {name: d for rival, d in results.comparisons.items() if (name := names.get(rival, rival))}


def benchmark_table() -> rich.table.Table:
    """Returns sizes, sources, licences and chance levels of the eight benchmarks, in 80 columns."""
    texts = ["source on the Hub", "split", "licence"]
    rows: list[list[Value]] = [
        [b.folder, b.questions, Estimate(b.chance, math.nan), b.source, b.split, b.licence] for b in BENCHMARKS
    ]
    return terminal_table(Table("Benchmarks", ["name", "questions", "chance %", *texts], rows, texts=texts))


def write_report(folder: Path, results: Results) -> Path:
    """Writes results.md to `folder`, or to the evaluation's folder in it if it is a run; returns its path."""
    run = RunFolder(folder)
    place = run.evaluation(results.protocol) if run.is_run else folder
    write_atomic(place / RESULTS_TABLE, results_markdown(results))
    return place / RESULTS_TABLE


def _subset_notes(subsets: Subsets) -> Iterator[str]:
    points = ", ".join(
        f"m = {p.m}: {percent(p.accuracy)}" + ("" if math.isnan(p.error) else f" ± {percent(p.error)}")
        for p in subsets.points
    )
    which = "" if subsets.limit is None else f", on the first {subsets.limit} questions of each benchmark"
    yield f"Accuracy of merges of m adapters (± over subsets){which}: {points}."
    law = subsets.variance_law
    if law is None:
        yield "The law of their distance from the merge of all is not fitted: it needs at least five adapters."
    else:
        distances = ", ".join(f"m = {p.m}: {p.distance:.3g}" for p in subsets.points if p.distance is not None)
        yield (
            f"Squared distance of their label logits from the merge of all: {distances}; "
            f"fitted as c (1/m − 1/M) + floor with c = {law.c:.3g}, floor = {law.floor:.3g}."
        )


def _row(results: Results, name: str, scored: Scored) -> list[Value]:
    return [name, *_cells(results, scored.benchmarks, scored.per_byte), scored.average]


def _titles(results: Results) -> list[str]:
    names = columns(results)
    per_byte = {folder: title + PER_BYTE for folder, title in names.items()}
    return ["", *(title for title in _cells(results, names, per_byte) if isinstance(title, str)), "average"]


def _cells(results: Results, plain: Mapping[str, Value], per_byte: Mapping[str, Value]) -> list[Value]:
    """One value for each benchmark, and a second one where choices are also scored per byte."""
    cells: list[Value] = []
    for folder in columns(results):
        cells.append(plain[folder])
        if folder in results.base.per_byte:
            cells.append(per_byte.get(folder, ""))
    return cells


def _best_of_columns(
    rows: Sequence[Sequence[Value | Measure]], titles: Sequence[str], sign: int = 1
) -> set[tuple[Value, str]]:
    """Returns the cells with the best value of each column, and those that are not more than its error from it.

    The error of the difference is as if the two had answered different questions: of the same ones it is smaller.
    `sign` is 1 where large values are good, else -1.
    """
    found: set[tuple[Value, str]] = set()
    for column, title in enumerate(titles[1:], start=1):
        cells = {str(row[0]): row[column] for row in rows}
        values = {name: cell for name, cell in cells.items() if isinstance(cell, Estimate | Measure)}
        if len(values) > 1:
            best = max(values.values(), key=lambda cell: sign * cell.value)
            for name, cell in values.items():
                gap = abs(best.value - cell.value)
                if not gap > SIGNIFICANT * math.hypot(best.error, cell.error):  # an error may be NaN
                    found.add((name, title))
    return found


def _measure(measure: Measure) -> str:
    return f"{measure.value:.3f}" + ("" if math.isnan(measure.error) else f" ± {measure.error:.3f}")


def _difference(d: Difference) -> str:
    p = _p(d.p)
    shows = "" if d.detectable is None else f"; {100 * d.detectable:.2f} points would show, with 80 % power"
    return (
        f"{100 * d.value:+.2f} points on average (95 % interval {100 * d.low:+.2f} to {100 * d.high:+.2f}, "
        f"p {p if p.startswith('≤') else f'= {p}'}, paired bootstrap{shows})"
    )


def _p(p: float) -> str:
    """A p-value of the bootstrap, which cannot tell less than its number of resamples."""
    resolution = 2 / (RESAMPLES + 1)
    return f"≤ {resolution:.1g}" if p <= resolution * 1.01 else f"{p:.2g}"
