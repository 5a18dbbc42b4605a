"""The tables of `controls`: what is trained, and how the merge compares with rivals of equal cost."""

import math
from collections.abc import Sequence
from pathlib import Path

from poc_lora.artifacts.run_folder import CONTROLS_TABLE
from poc_lora.artifacts.study import Controls, OverRuns, RunDifference
from poc_lora.config import RunConfig
from poc_lora.files import write_atomic
from poc_lora.reporting.escape import code, markdown
from poc_lora.reporting.study import MEASURES, VARIANTS, difference_rows, figure, study_notes, variant_cells
from poc_lora.reporting.tables import Table, Value, markdown_table

PAIRED, UNPAIRED = "seed by seed", "Welch"


def plan_table(plans: Sequence[tuple[str, int, RunConfig, int, int]]) -> Table:
    """Returns what is going to be trained.

    Args:
        plans: Of each name: its number of runs, the configuration of the first, its steps, and the training tokens of
            one merge or adapter.
    """
    rows: list[list[Value]] = [
        [
            name,
            f"{runs} × {config.adapters.count}",
            steps,
            config.train.batch_size,
            config.lora.rank,
            tokens * (runs if runs > 1 else config.adapters.count),
        ]
        for name, runs, config, steps, tokens in plans
    ]
    titles = ["", "runs × adapters", "steps", "rows a step", "rank", "tokens in all"]
    return Table("What is trained; rows a step of each adapter", titles, rows)


def controls_tables(found: Controls) -> list[Table]:
    """Returns the table of all that was trained, and that of the differences of the merge from each."""
    pack, measures = found.pack, list(found.pack.measures)
    titles = [MEASURES[measure] for measure in measures]
    M = found.pack.adapters
    share = OverRuns(
        mean=found.seconds.mean / M,
        half_width=found.seconds.half_width / M,
        values=[seconds / M for seconds in found.seconds.values],
    )
    costs: dict[str, tuple[int, OverRuns | None]] = {"base": (0, None), "average": (found.tokens // M, share)}
    rows: list[list[Value]] = []
    for variant, cells in variant_cells(pack).items():
        tokens, seconds = costs.get(variant, (found.tokens, found.seconds))
        rows.append([VARIANTS[variant], *cells, _tokens(tokens), _seconds(seconds)])
    for name, rival in found.rivals.items():
        cells = [figure(measure, rival.measures.get(measure)) for measure in measures]
        if not any(cells):
            cells = ["diverged", *cells[1:]]
        rows.append([name, *cells, _tokens(rival.tokens), _seconds(rival.seconds)])
    differences: list[list[Value]] = [[*row, PAIRED] for row in difference_rows(pack)]
    for name, rival in found.rivals.items():
        if rival.differences:
            cells = [figure(measure, rival.differences.get(measure), signed=True) for measure in measures]
            paired = next(iter(rival.differences.values())).paired
            differences.append([f"PoC merge − {name}", *cells, PAIRED if paired else UNPAIRED])
    return [
        Table(
            f"Mean over {len(pack.runs)} runs ± half-width of its 95 % interval",
            ["", *titles, "tokens", "seconds"],
            rows,
            strong=["PoC merge"],
        ),
        Table(
            "Differences: mean over runs ± half-width of the 95 % interval",
            ["", *titles, "compared"],
            differences,
            texts=["compared"],
        ),
    ]


def controls_notes(found: Controls) -> list[str]:
    """Returns the outcome in a sentence, what each rival is, and what the figures mean."""
    notes = [outcome(found)]
    notes += [f"{name}: {rival.meaning}." for name, rival in found.rivals.items()]
    notes += [f"{name} is left out: {why}." for name, why in found.left_out.items()]
    notes += study_notes(found.pack)
    notes.append(
        "A rival with the same seeds is compared seed by seed, the others as independent runs (Welch's interval)."
    )
    if "held_out_loss" in found.pack.measures and not all(rival.merged for rival in found.rivals.values()):
        notes.append(
            "The held-out losses of packs and of rivals of one adapter are of different rows, so their difference is "
            "left out."
        )
    notes.append(
        "All keep the configuration's learning rate, which was tuned for none of them here, and no interval is widened "
        "for the number of comparisons."
    )
    notes.append(
        "Tokens and seconds are of training, of one merge or adapter. Adapters that were trained side by side have "
        "equal shares of that time, and it depends on the device how much of it packing saves."
    )
    return notes


def outcome(found: Controls) -> str:
    """Says which rivals the merge is better and worse than, by accuracy if it was measured, else by the first loss."""
    measure = next(iter(found.pack.measures))
    sign = 1 if measure == "accuracy" else -1
    compared: dict[str, OverRuns | RunDifference] = {
        VARIANTS[pair.removeprefix("merged - ")]: difference
        for pair, difference in found.pack.differences.get(measure, {}).items()
        if pair.startswith("merged - ")
    }
    compared |= {name: d for name, rival in found.rivals.items() if (d := rival.differences.get(measure))}
    groups: dict[str, list[str]] = {"better than": [], "worse than": [], "not told apart from": []}
    for name, difference in compared.items():
        if math.isnan(difference.half_width) or abs(difference.mean) <= difference.half_width:
            groups["not told apart from"].append(name)
        else:
            groups["better than" if sign * difference.mean > 0 else "worse than"].append(name)
    said = "; ".join(f"{verb} {', '.join(names)}" for verb, names in groups.items() if names)
    return f"By {MEASURES[measure].removesuffix(' (%)')}, the merge is {said}."


def write_controls(found: Controls, folder: Path) -> None:
    """Writes controls.md."""
    lines = ["# The merge beside rivals of equal cost", "", markdown(controls_notes(found)[0])]
    for table in controls_tables(found):
        lines += ["", f"{table.caption}:", "", *markdown_table(table)]
    lines += ["", *(f"- {markdown(note)}" for note in controls_notes(found)[1:]), "", "Runs:", ""]
    folders = [*found.pack.runs, *(run for rival in found.rivals.values() for run in rival.runs)]
    lines += [f"- {code(Path(run).name)}" for run in folders]
    write_atomic(folder / CONTROLS_TABLE, "\n".join(lines) + "\n")


def _tokens(count: int) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def _seconds(found: OverRuns | None) -> str:
    if found is None:
        return "0"
    digits = 1 if found.mean < 10 else 0
    half = "" if math.isnan(found.half_width) else f" ± {found.half_width:,.{digits}f}"
    return f"{found.mean:,.{digits}f}{half}"
