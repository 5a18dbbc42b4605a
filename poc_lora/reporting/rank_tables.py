"""What rank of the merge to serve: a table of the ranks that were scored, and one sentence of advice."""

import math
from itertools import takewhile

from poc_lora.adapters.serving import servers_of
from poc_lora.artifacts.results import Difference, Results, TruncatedMerge
from poc_lora.reporting.tables import Table, Value

MARGIN = 0.01  # a loss of average accuracy, as a share of 1, that an advised rank excludes at the 95 % level
# If one answer in a hundred were lost, fewer questions would show none of them in more than 2.5 % of evaluations.
FEWEST = math.ceil(math.log(0.025) / math.log(1 - MARGIN))  # questions, or groups of them


def ranks_table(results: Results, of: str = "") -> Table:
    """Returns accuracy, loss and size of the merge at each rank that was scored, and of the merge itself."""
    rows: list[list[Value]] = []
    for one in results.truncated:
        d = one.difference
        gap = f"{100 * d.value:+.2f} ({100 * d.low:+.2f} to {100 * d.high:+.2f})"
        rows.append([f"rank {one.rank:,}", one.average, gap, _megabytes(one.bytes), f"{one.error:.3f}"])
    if results.merged is not None and results.merged_rank is not None and results.merged_bytes is not None:
        size = _megabytes(results.merged_bytes)
        rows.append([f"PoC merge (rank {results.merged_rank:,})", results.merged.average, "", size, ""])
    return Table(
        f"The merge truncated to smaller ranks: accuracy (%) ± standard error{of}",
        ["", "average", "minus the merge (95 % interval)", "MB in float32", "largest error of a module"],
        rows,
        note="Differences are paired, in points of average accuracy. The error is ‖ΔW − ΔW_r‖ / ‖ΔW‖, of the module "
        "that loses most. Half as many MB in bfloat16.",
    )


def advised(results: Results) -> TruncatedMerge | None:
    """Returns the merge at the smallest rank that, like all larger ones scored, excludes a loss above `MARGIN`.

    A rank excludes it if the 95 % interval of its difference from the merge lies above −`MARGIN`. From the largest rank
    down, until one does not: tests in a fixed order, so that trying many ranks does not make an error more likely. Of
    fewer than `FEWEST` questions none excludes it: an interval of answers that are all the same has no width.
    """
    if _questions(results) < FEWEST:
        return None
    fine = takewhile(lambda one: one.difference.low > -MARGIN, reversed(_smaller(results)))
    return min(fine, key=lambda one: one.rank, default=None)


def rank_advice(results: Results) -> str | None:
    """Says in a sentence which rank to serve, and with what; None where no smaller rank was scored."""
    smaller, rank, size = _smaller(results), results.merged_rank, results.merged_bytes
    if not smaller or rank is None or size is None:
        return None
    one, points = advised(results), f"{100 * MARGIN:g} point"
    if one is not None:
        return (
            f"Serve the merge at rank {one.rank:,} (merge again with --rank {one.rank}), {_megabytes(one.bytes)} MB "
            f"instead of {_megabytes(size)}: it is the smallest scored that excludes a loss of {points} of average "
            f"accuracy against the merge of rank {rank:,} ({_said(one.difference)}); {_served(one.rank)}."
        )
    largest = smaller[-1]
    if largest.difference.high < 0:
        why = f"it is better than rank {largest.rank:,}, the largest scored below it ({_said(largest.difference)})"
    elif (n := _questions(results)) < FEWEST:
        why = f"to exclude that a smaller rank loses {points} of average accuracy takes {FEWEST} questions, not {n}"
    else:
        why = (
            f"so few questions cannot exclude that rank {largest.rank:,} loses {points} of average accuracy "
            f"({_said(largest.difference)}), more would tell"
        )
    return f"Serve the merge as it is, of rank {rank:,} ({_megabytes(size)} MB): {why}; {_served(rank)}."


def _smaller(results: Results) -> list[TruncatedMerge]:
    """The truncated merges that are smaller than the merge; that of its own rank is the merge."""
    return [one for one in results.truncated if results.merged_rank is not None and one.rank < results.merged_rank]


def _questions(results: Results) -> int:
    """The number of independent samples: of questions, or of groups where they name some."""
    return sum(results.groups.get(benchmark, n) for benchmark, n in results.questions.items())


def _served(rank: int) -> str:
    *names, last = servers_of(rank) or ["no server whose limit is known"]
    return f"this rank is served by {', '.join(names)}{' and ' if names else ''}{last}"


def _said(d: Difference) -> str:
    return f"{100 * d.value:+.2f} points, 95 % interval {100 * d.low:+.2f} to {100 * d.high:+.2f}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.{2 if size < 1e7 else 1 if size < 1e8 else 0}f}"
