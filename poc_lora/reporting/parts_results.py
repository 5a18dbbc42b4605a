"""The parts of the report that results.json tells: the table, its tests, and accuracy against m."""

import math
from pathlib import Path

from poc_lora.artifacts.results import Results, Scored
from poc_lora.reporting import figures
from poc_lora.reporting.blocks import Cell, Chart, Part, Table, accuracy, chart, percent, short
from poc_lora.reporting.run_files import RunFiles
from poc_lora.reporting.tables import columns, notes, table_rows


def headline(files: RunFiles) -> tuple[str, list[tuple[str, Cell]]]:
    """What came out, in a sentence, and the figures to see first."""
    results = files.results
    if results is None:
        return "Nothing has been evaluated yet.", []
    best, merged, M = results.adapters[results.best].average, results.merged, len(results.adapters)
    shown = [("base", results.base.average)]
    shown += [("average adapter", results.average.average)] if M > 1 else []
    shown += [("best adapter" if M > 1 else "the adapter", best)]
    shown += [("merge", merged.average)] if merged else []
    tiles = [(name, accuracy(estimate)) for name, estimate in shown]
    if merged is None:
        return f"{M} adapters were evaluated, and no merge of them.", tiles
    over_average = f"{100 * (merged.average.value - results.average.average.value):+.2f} points"
    if M == 1:
        return f"The merge is {over_average} from the one adapter it is made of.", tiles
    picked = f"which had to be picked on {'the test itself' if results.best_chosen_on == 'test' else 'validation'}"
    d = results.comparisons.get("best")
    if d is None:
        return f"The merge of {M} adapters is {over_average} from the average adapter.", tiles
    told = f"{100 * d.value:+.2f} points, 95 % interval {100 * d.low:+.2f} to {100 * d.high:+.2f}"
    if d.low <= 0 <= d.high:
        sentence = f"The merge of {M} adapters and the best one, {picked}, cannot be told apart here ({told})"
    else:
        verb = "beats" if d.value > 0 else "falls short of"
        sentence = f"The merge of {M} adapters {verb} the best one ({told}), {picked}"
    return f"{sentence}. The merge is {over_average} from the average adapter.", tiles


def benchmarks(files: RunFiles) -> Part:
    part = Part("benchmarks", "Benchmarks")
    if not files.evaluations:
        part.missing.append("Nothing has been evaluated: poc-lora eval RUN --data DIR.")
        return part
    for i, results in enumerate(files.evaluations):
        protocol = f", protocol {short(results.protocol, 20)}" if len(files.evaluations) > 1 else ""
        if changed := files.changed[i]:
            part.words.append(
                f"This evaluation{protocol} is of other weights than the run has now for {', '.join(changed)}: "
                "evaluate again."
            )
        _evaluation(part, results, protocol)
    return part


def _evaluation(part: Part, results: Results, protocol: str) -> None:
    """Add an evaluation; `protocol` tells its tables from those of others."""
    head = ["", *columns(results).values(), "average"]
    chance = [results.chance[b] for b in columns(results)]
    mean_chance = _mean(chance)
    asked = [results.questions[b] for b in columns(results)]
    part.words.append(
        f"Accuracy in percent ± standard error, by the protocol “{short(results.protocol)}” with the prompt "
        f"“{short(results.prompt)}”, of {short(results.base_model)}."
    )
    if Path(results.base_model).parts[-2:] == ("microworld", "model"):
        part.words.append(
            "The base model is the embedded one, and these benchmarks are about its made-up world: the figures compare "
            "with no others of the same names."
        )
    part.tables.append(
        Table(
            f"Accuracy (%) ± standard error{protocol}",
            head,
            [
                ["questions", *(f"{n:,}" for n in [*asked, sum(asked)])],
                ["chance level", *(percent(x) for x in [*chance, mean_chance])],
                *(_row(name, results, scored) for name, scored in table_rows(results)),
            ],
            strong=["PoC merge"],
        )
    )
    if not part.charts:
        part.charts.append(_averages(results, mean_chance))
    if results.merged is not None and results.comparisons:
        part.tables.append(_paired(results, protocol))
    part.words += notes(results, paired=False)
    if len(results.adapters) > 1:
        adapters = [_row(name, results, scored) for name, scored in results.adapters.items()]
        caption = f"Every adapter: accuracy (%) ± standard error{protocol}"
        part.tables.append(Table(caption, head, adapters, [results.best], folded=True))


def subsets(files: RunFiles) -> Part:
    part = Part("subsets", "Accuracy against the number of adapters")
    found = next((results for results in files.evaluations if results.subsets is not None), None)
    if found is None or found.subsets is None:
        part.missing.append("No merges of fewer adapters were scored: poc-lora eval RUN --data DIR --subsets does it.")
        return part
    scored = found.subsets
    points = [(p.m, 100 * p.accuracy, 0.0 if math.isnan(p.error) else 100 * p.error) for p in scored.points]
    part.charts.append(
        chart(
            figures.subsets_figure(points, 100 * found.adapters[found.best].average.value),
            "subsets",
            "Accuracy of merges of m adapters",
            "; ".join(f"{m} merged: mean {value:.2f} %" for m, value, _ in points) + ".",
            "The mean over subsets of m adapters, with its standard error over them: rough, as subsets share adapters.",
        )
    )
    distances = [(p.m, p.distance) for p in scored.points if p.distance is not None and p.distance > 0]
    if distances:
        law = scored.variance_law
        fitted = None if law is None else (law.c, law.floor, max(p.m for p in scored.points))
        part.charts.append(
            chart(
                figures.distance_figure(distances, fitted),
                "distance",
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
    return part


def _averages(results: Results, chance: float) -> Chart:
    def points(*scored: Scored) -> list[tuple[float, float]]:
        return [(100 * s.average.value, 100 * s.average.error) for s in scored]

    M = len(results.adapters)
    adapters = (f"{M} adapters" if M > 1 else "LoRA", "adapter", points(*results.adapters.values()))
    rows = [("base", "base", points(results.base)), adapters]
    if M > 1:
        rows.append(("LoRA (average)", "adapter", points(results.average)))
        rows.append(("LoRA (best)", "best", points(results.adapters[results.best])))
    if results.merged is not None:
        rows.append(("PoC merge", "merge", points(results.merged)))
    if results.control is not None:
        rows.append((f"merge, {short(results.control_name or '', 12)}", "violet", points(results.control)))
    if results.ensemble is not None:
        rows.append(("prediction\nensemble", "ensemble", points(results.ensemble)))
    told = "; ".join(
        f"{name.replace(chr(10), ' ')} {values[0][0]:.2f} %"
        if len(values) == 1
        else f"{name} {min(values)[0]:.2f} to {max(values)[0]:.2f} %"
        for name, _, values in rows
    )
    return chart(
        figures.averages_figure(rows, 100 * chance),
        "averages",
        "Average accuracy of everything that was scored",
        told + ".",
        "Bars are standard errors of sampling questions. Adapters and merge answered the same questions: their "
        "differences are surer than the bars suggest.",
    )


def _paired(results: Results, protocol: str) -> Table:
    named = {"best": "LoRA (best)", "average": "LoRA (average)", "control": f"PoC merge, {results.control_name}"}
    if len(results.adapters) == 1:
        named |= {"best": "the adapter"}
    rows = []
    for rival, d in results.comparisons.items():
        if rival == "average" and len(results.adapters) == 1:
            continue
        name = short(named.get(rival, rival))
        rows.append([name, f"{100 * d.value:+.2f}", f"{100 * d.low:+.2f} to {100 * d.high:+.2f}", f"{d.p:.2g}"])
    return Table(
        f"PoC merge minus, in points of average accuracy (paired bootstrap over questions){protocol}",
        ["", "difference", "95 % interval", "p"],
        rows,
    )


def _row(name: str, results: Results, scored: Scored) -> list[Cell | str]:
    estimates = [*(scored.benchmarks[b] for b in columns(results)), scored.average]
    return [name, *map(accuracy, estimates)]


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)
