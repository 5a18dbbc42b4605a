"""Sentences about a training and a merge, for the command line and the report."""

import statistics
from collections.abc import Mapping

import rich.table

from poc_lora.adapters.serving import serving_advice
from poc_lora.artifacts.merge_report import MergeReport
from poc_lora.files import size
from poc_lora.reporting.escape import short
from poc_lora.reporting.screening import outcome
from poc_lora.reporting.sweep import sweep_outcome
from poc_lora.reporting.tables import Table, percent, terminal_table
from poc_lora.training.loop import TrainingResult

IDENTICAL = 0.9999  # a larger cosine suggests the same seed
MAX_LISTED = 4  # names in a line
MAX_BEST_LISTED = 16
UNRELATED = 0.01  # a smaller cosine suggests different base models or tasks
# Cosines below these are that much: of M updates of equal norm with mean cosine c, the average has the share
# c + (1 - c)/M of one update's squared norm.
SHARED = {0.1: "almost nothing", 0.3: "little", 0.6: "a part", 0.9: "most"}
DOMINANT = 2.0  # times the median norm


def training_summary(done: TrainingResult) -> list[str]:
    """Summarises a training run: rows, diverged adapters, and what the merge is worth on the held-out rows."""
    finished = [adapter for adapter, state in done.progress.items() if state.status == "finished"]
    lines = [f"{len(finished)} adapter{'' if len(finished) == 1 else 's'} trained for {done.steps} steps"]
    if done.seconds:
        rate = done.tokens / done.seconds
        share = done.tokens / done.padded_tokens
        lines[0] += f": {done.tokens:,} tokens in {done.seconds:.0f} s, {rate:,.0f} tokens/s, {share:.1%} not padding"
        lines.append(f"peak memory {size(done.peak_bytes)}")
    if done.truncated:
        lines.append(f"{done.truncated} rows were truncated to data.max_length")
    if done.dropped:
        lines.append(f"{done.dropped} rows were dropped: data.max_length leaves nothing of their answers")
    if done.skipped:
        lines.append(f"{done.skipped} rows that cannot be used were left out (data.skip_bad_rows)")
    for adapter, state in done.progress.items():
        if state.status == "diverged":
            lines.append(f"adapter {adapter} diverged after step {state.step} and is left out of the merge")
    best_steps = {a: state.best_step for a, state in done.progress.items() if state.best_step and a in finished}
    lines += [best_weights(best_steps, done.steps)] if best_steps else []
    return [*lines, *sweep_outcome(done.folder), *outcome(done.folder)]


def best_weights(best_steps: Mapping[int, int], steps: int) -> str:
    """Says which step's weights each adapter ended with under `train.keep: best`."""
    listed = [f"adapter {adapter}: best at step {step:,}" for adapter, step in sorted(best_steps.items())]
    more = len(listed) - MAX_BEST_LISTED
    shown = ", ".join(listed[:MAX_BEST_LISTED]) + (f", and {more} more (best_steps in run.json)" if more > 0 else "")
    return f"each adapter has its weights of lowest validation loss: {shown}, of {steps:,}"


def merge_outcome(report: MergeReport) -> str:
    """Says in a sentence what was merged, and with what error."""
    errors = [
        f"a relative error of {error:.1e}" if error else "no error" for error in (report.error, report.cast_error)
    ]
    merged = "1 adapter was" if len(report.sources) == 1 else f"{len(report.sources)} adapters were"
    outcome = (
        f"{merged} merged by the method “{short(report.method)}” into one of rank "
        f"{report.rank:,}, with {errors[0]} from its rank and {errors[1]} from rounding to {short(report.dtype)}."
    )
    if report.left_out:
        names = _listed([short(source.name) for source in report.left_out])
        outcome += f" Left out, by their losses on the rows held out: {names}."
    return outcome


def merge_distance(report: MergeReport) -> str | None:
    """Says how similar the adapters are, and how far the merge is from that of many; None for one adapter."""
    if report.mean_cosine is None or report.relative_standard_error is None:
        return None
    distance = percent(report.relative_standard_error, 0)
    next_move = None if report.next_move is None else percent(report.next_move, 1)
    return (
        f"The mean cosine between two adapters' updates is {report.mean_cosine:.3f}: they share {_shared(report)} of "
        f"what they learnt, and averaging shrinks the rest. By how far they are apart, the merge is about {distance} % "
        "of its own norm away from that of ever more such adapters"
        + (f"; one more would move the merge by about {next_move} %." if next_move else ".")
    )


def _shared(report: MergeReport) -> str:
    cosine = report.mean_cosine or 0.0
    return next((words for limit, words in SHARED.items() if cosine < limit), "nearly all")


def merge_summary(report: MergeReport) -> list[str]:
    """Summarises a merge: its errors, its distance from the merge of many adapters, and how to serve it."""
    distance = merge_distance(report)
    lines = [merge_outcome(report), *([distance] if distance else [])]
    for j, source in enumerate(report.sources):
        missing = [name for name, module in report.modules.items() if j in module.absent]
        if missing:
            number = f"{len(missing)} of {len(report.modules)} modules"
            lines.append(f"{source.name} lacks {number}, such as {min(missing)}: they count as zero")
    lines += whole_modules(report)
    whole, embeddings = bool(report.modules_to_save), bool(report.embeddings)
    return [*lines, *_warnings(report), *serving_advice(report.rank, modules_to_save=whole, embeddings=embeddings)]


def whole_modules(report: MergeReport) -> list[str]:
    """Says which modules that were trained whole were averaged, and which are the same in all adapters."""
    same = [name for name in report.modules_to_save if name not in report.modules_to_save_averaged]
    lines = []
    if report.modules_to_save_averaged:
        what = f"saved whole and averaged: {_listed(report.modules_to_save_averaged)}"
        lines.append(f"{what}; labels, if it has such, must stand in the same order in all adapters")
    if same:
        lines.append(f"saved whole, the same in all adapters: {_listed(same)}")
    return lines


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more


def rank_table(report: MergeReport) -> rich.table.Table:
    """Returns the rank sweep: the relative error by module type and rank, and the share of all ‖ΔW‖² that is kept."""
    sweep = report.rank_sweep
    ranks = list(sweep["all"])
    rows = [
        ["kept of ‖ΔW‖²", *(f"{1 - error**2:.1%}" for error in sweep["all"].values())],
        *([short(kind, 24), *(f"{errors[rank]:.4f}" for rank in ranks)] for kind, errors in sweep.items()),
    ]
    caption = "Relative error ‖ΔW − ΔW_r‖ / ‖ΔW‖ of the best approximation of each rank r"
    return terminal_table(Table(caption, ["", *map(str, ranks)], rows, strong=["all"]))


def _warnings(report: MergeReport) -> list[str]:
    """Warns about adapters that are identical or unrelated, or much larger than the others."""
    cosines, names = report.cosines, [source.name for source in report.sources]
    M = len(names)
    pairs = [(cosines[i][j], i, j) for i in range(M) for j in range(i)]
    lines = [
        f"warning: {names[j]} and {names[i]} are the same update (cosine {cosine:.5f}). Do they have the same seed?"
        for cosine, i, j in pairs
        if cosine > IDENTICAL
    ]
    typical = statistics.median(report.norms)
    lines += [
        f"warning: {name} is {norm / typical:.1f} times as large as the median adapter and weighs more in the merge"
        for name, norm in zip(names, report.norms, strict=True)
        if norm > DOMINANT * typical > 0
    ]
    if M == 2 and cosines[0][1] < UNRELATED:
        return [*lines, f"warning: {names[0]} and {names[1]} look unrelated (their cosine is {cosines[0][1]:.3f})"]
    for i, name in enumerate(names):
        others = [cosines[i][j] for j in range(M) if j != i]
        if M > 2 and max(others) < UNRELATED:
            lines.append(f"warning: {name} looks unrelated to the others (its largest cosine is {max(others):.3f})")
    return lines
