"""The paper's table from the results of an evaluation: for the terminal, and as Markdown."""

import math
from collections.abc import Iterator
from pathlib import Path

from rich import box
from rich.table import Table

from poc_lora.artifacts.results import Difference, Estimate, Results, Scored, Subsets
from poc_lora.artifacts.run_folder import RESULTS_TABLE, RunFolder
from poc_lora.data.commonsense import BENCHMARKS
from poc_lora.evaluation.benchmarks import FACTS
from poc_lora.files import write_atomic
from poc_lora.reporting.escape import code, escaped

NARROW = {"WinoGrande": "Wino\nGrande", "HellaSwag": "Hella\nSwag", "average": "aver-\nage"}


def table_rows(results: Results) -> list[tuple[str, Scored]]:
    """The rows of the table, from top to bottom; a single adapter stands for itself."""
    if len(results.adapters) > 1:
        adapters = [("LoRA (best)", results.adapters[results.best]), ("LoRA (average)", results.average)]
    else:
        adapters = [(f"LoRA {name}", scored) for name, scored in results.adapters.items()]
    rows = [("base", results.base), *adapters, ("PoC merge", results.merged)]
    rows += [(f"PoC merge, {results.control_name}", results.control), ("prediction ensemble", results.ensemble)]
    return [(name, scored) for name, scored in rows if scored is not None]


def columns(results: Results) -> dict[str, str]:
    """The benchmarks of the table: folder to the paper's name, in the paper's order."""
    return {b.folder: b.short for b in BENCHMARKS if b.folder in results.questions}


def terminal_table(results: Results) -> Table:
    """The table for a terminal of 80 columns or more: accuracy in percent above its standard error."""
    table = Table(title="Accuracy (%) ± standard error", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("")
    for name in [*columns(results).values(), "average"]:
        table.add_column(NARROW.get(name, name), justify="right", no_wrap=True, vertical="bottom")
    table.add_row("chance level", *_chance(results), style="dim")
    for name, scored in table_rows(results):
        table.add_row(name, *(_cell(e, "\n±") for e in _estimates(results, scored)), style=_style(name))
    return table


def markdown(results: Results) -> str:
    """The table, every adapter by itself, and what is to be known to read them."""
    names = [*columns(results).values(), "average"]
    lines = [
        "# Evaluation",
        "",
        f"Base model {code(results.base_model)}, protocol {code(results.protocol)}, prompt {code(results.prompt)}. "
        "Accuracy in percent ± standard error.",
        "",
        _line(["", *names]),
        _line(["---", *("---:" for _ in names)]),
        _line(
            ["questions", *(str(results.questions[b]) for b in columns(results)), str(sum(results.questions.values()))]
        ),
        _line(["chance level", *_chance(results)]),
    ]
    lines += [_scored_line(results, escaped(name), scored) for name, scored in table_rows(results)]
    lines += ["", *(f"- {escaped(note)}" for note in notes(results))]
    if len(results.adapters) > 1:
        lines += ["", "## Every adapter", "", _line(["", *names]), _line(["---", *("---:" for _ in names)])]
        lines += [_scored_line(results, code(name), scored) for name, scored in results.adapters.items()]
    return "\n".join(lines) + "\n"


def notes(results: Results, *, paired: bool = True) -> list[str]:
    """Sentences that belong under the table: what was chosen how, what was cut or left out, and, with `paired`, the
    paired differences."""
    said = []
    if len(results.adapters) > 1:
        where = "the test questions themselves, as in the paper"
        if results.best_chosen_on == "validation":
            where = "validation questions"
        said.append(
            f"LoRA (best) is adapter {results.best} of {len(results.adapters)}, chosen by its average on {where}."
        )
        for rival, difference in results.comparisons.items() if paired else ():
            name = f"PoC merge, {results.control_name}" if rival == "control" else f"LoRA ({rival})"
            said.append(f"PoC merge minus {name}: {_difference(difference)}.")
    else:
        for rival, difference in results.comparisons.items() if paired else ():
            if rival != "average":  # of one adapter
                name = "the adapter" if rival == "best" else "the control's"
                said.append(f"PoC merge minus {name}: {_difference(difference)}.")
    if results.exact_average:
        said.append(
            f"PoC merge is the exact average of the {len(results.adapters)} adapters, which is in no folder yet: "
            "poc-lora merge writes it."
        )
    if results.agreement is not None and not math.isnan(results.agreement):
        said.append(
            f"Merge and prediction ensemble choose the same label on {_percent(results.agreement)} % of questions."
        )
    if unread := {thing: share for thing, share in results.unread.items() if not math.isnan(share)}:
        shares = ", ".join(f"{thing} {_percent(share)}" for thing, share in unread.items())
        said.append(f"Answers in which no label was found, in percent: {shares}.")
    if results.subsets is not None:
        said += _subset_notes(results.subsets)
    for folder, short in columns(results).items():
        if results.too_long[folder]:
            then = "count as wrong" if results.protocol != "harness" else "were cut at their start, as lm-eval does"
            said.append(
                f"{short}: {results.too_long[folder]} of {results.questions[folder]} questions do not fit the model's "
                f"context and {then}."
            )
    if results.limit is not None:
        said.append(f"Only the first {results.limit} questions of each benchmark were asked.")
    said.append("Standard errors are those of sampling questions; they do not cover other training seeds.")
    return said


def benchmark_table() -> Table:
    """What is known of the eight benchmarks: sizes, sources, licences, chance levels. It fits 80 columns uncut."""
    table = Table(title="Benchmarks", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in ("name", "questions", "chance %", "source on the Hub", "split", "licence"):
        number = name in ("questions", "chance %")
        table.add_column(name, justify="right" if number else "left", no_wrap=name != "licence", overflow="fold")
    for folder, facts in FACTS.items():
        size, chance = f"{facts.questions:,}", _percent(facts.chance)
        table.add_row(folder, size, chance, facts.source, facts.split, facts.licence)
    return table


def write_report(folder: Path, results: Results) -> Path:
    """Write results.md to `folder`, or to its eval/ where `folder` is a run; returns the file."""
    run = RunFolder(folder)
    place = run.evaluation(results.protocol) if run.is_run else folder
    write_atomic(place / RESULTS_TABLE, markdown(results))
    return place / RESULTS_TABLE


def _subset_notes(subsets: Subsets) -> Iterator[str]:
    points = ", ".join(
        f"m = {p.m}: {_percent(p.accuracy)}" + ("" if math.isnan(p.error) else f" ± {_percent(p.error)}")
        for p in subsets.points
    )
    yield f"Accuracy of merges of m adapters (± over subsets): {points}."
    law = subsets.variance_law
    if law is None:
        yield "The law of their distance from the merge of all is not fitted: three sizes below M take five adapters."
    else:
        distances = ", ".join(f"m = {p.m}: {p.distance:.3g}" for p in subsets.points if p.distance is not None)
        yield (
            f"Squared distance of their label logits from the merge of all: {distances}; "
            f"fitted as c (1/m − 1/M) + floor with c = {law.c:.3g}, floor = {law.floor:.3g}."
        )


def _estimates(results: Results, scored: Scored) -> list[Estimate]:
    return [*(scored.benchmarks[b] for b in columns(results)), scored.average]


def _scored_line(results: Results, name: str, scored: Scored) -> str:
    return _line([name, *(_cell(e, " ± ") for e in _estimates(results, scored))])


def _chance(results: Results) -> list[str]:
    levels = [results.chance[b] for b in columns(results)]
    return [_percent(x) for x in [*levels, sum(levels) / len(levels)]]


def _cell(estimate: Estimate, between: str) -> str:
    # An error of ten points or more, of a handful of questions, gets one decimal: it fits where the others do.
    error = f"{100 * estimate.error:.1f}" if estimate.error >= 0.1 else _percent(estimate.error)
    return _percent(estimate.value) + ("" if math.isnan(estimate.error) else between + error)


def _difference(d: Difference) -> str:
    return (
        f"{100 * d.value:+.2f} points on average (95 % interval {100 * d.low:+.2f} to {100 * d.high:+.2f}, "
        f"p = {d.p:.2g}, paired bootstrap)"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _style(name: str) -> str:
    return "bold" if name == "PoC merge" else ""
