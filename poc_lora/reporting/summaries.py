"""Summaries that the command line prints after training and merging."""

from poc_lora.adapters.serving import serving_advice
from poc_lora.artifacts.merge_report import MergeReport
from poc_lora.files import size
from poc_lora.training.loop import TrainingResult

IDENTICAL = 0.9999  # a larger cosine suggests the same seed
MAX_LISTED = 4  # names in a line
UNRELATED = 0.01  # a smaller cosine suggests different base models or tasks


def training_summary(done: TrainingResult) -> list[str]:
    """Summarises a training run, with truncated and dropped rows and diverged adapters."""
    finished = [adapter for adapter, state in done.progress.items() if state.status == "finished"]
    lines = [f"{len(finished)} adapters trained for {done.steps} steps"]
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
    return lines


def merge_summary(report: MergeReport) -> list[str]:
    """Summarises a merge: its errors, its distance from the merge of many adapters, and how to serve it."""
    M = len(report.sources)
    lines = [
        f"{M} adapters merged into one of rank {report.rank}, {report.method}: relative error "
        f"{report.error:.1e}, and {report.cast_error:.1e} from rounding to {report.dtype}"
    ]
    if report.relative_standard_error is not None:
        lines.append(
            f"mean cosine of the updates {report.mean_cosine:.3f}; "
            f"the merge is about {report.relative_standard_error:.0%} of its norm from the limit of many adapters"
        )
    if report.next_move is not None:
        lines.append(f"one more adapter would move the merge by about {report.next_move:.1%}")
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


def rank_table(report: MergeReport) -> list[str]:
    """Returns the rank sweep as lines: the relative error and the share of ‖ΔW‖² retained, by module type and rank."""
    sweep = report.rank_sweep
    width = max(map(len, sweep))
    lines = [
        "relative error (retained share of the squared norm) at rank",
        " " * width + "".join(f"{r:>17}" for r in sweep["all"]),
    ]
    for kind, errors in sweep.items():
        lines.append(f"{kind:<{width}}" + "".join(f"{e:>8.4f} ({1 - e**2:6.1%})" for e in errors.values()))
    return lines


def _warnings(report: MergeReport) -> list[str]:
    """Warns about adapters that are identical or unrelated."""
    cosines, names = report.cosines, [source.name for source in report.sources]
    M = len(names)
    pairs = [(cosines[i][j], i, j) for i in range(M) for j in range(i)]
    lines = [
        f"warning: {names[j]} and {names[i]} are the same update (cosine {cosine:.5f}). Do they have the same seed?"
        for cosine, i, j in pairs
        if cosine > IDENTICAL
    ]
    if M == 2 and cosines[0][1] < UNRELATED:
        return [*lines, f"warning: {names[0]} and {names[1]} look unrelated (their cosine is {cosines[0][1]:.3f})"]
    for i, name in enumerate(names):
        others = [cosines[i][j] for j in range(M) if j != i]
        if M > 2 and max(others) < UNRELATED:
            lines.append(f"warning: {name} looks unrelated to the others (its largest cosine is {max(others):.3f})")
    return lines
