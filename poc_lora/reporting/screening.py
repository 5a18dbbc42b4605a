"""Screening: which adapters of a run learnt so much less than the others that a merge is better without them."""

import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from poc_lora.reporting.held_out import paired_interval, read_last_validations

# Of the median adapter's gain over the base. The average forgives much: on the demo two of eight adapters that kept 0.9
# of the gain cost it nothing, two that kept 0.6 cost it 3 points of accuracy (scripts/benchmarks/screening.py).
LEAST_GAIN = 0.75
LEAST_ADAPTERS = 3  # of two that differ, none is the outlier
MAX_LISTED = 8


@dataclass(frozen=True)
class Screening:
    """Adapters to leave out of a merge, with what tells them apart: losses per token of the held-out rows' answers.

    Attributes:
        rows: The number of held-out rows.
        base: The base model's loss.
        losses: Every adapter's, by number.
        left_out: The adapters to leave out, by number; empty if there is none.
        merge: The loss of the merge of all adapters, where one pack has trained all of them.
    """

    rows: int
    base: float
    losses: dict[int, float]
    left_out: list[int]
    merge: float | None

    @property
    def median(self) -> float:
        """The median of the adapters' losses."""
        return statistics.median(self.losses.values())

    def __str__(self) -> str:
        listed = ", ".join(f"{number} ({self.losses[number]:.3f})" for number in self.left_out[:MAX_LISTED])
        more = f" and {len(self.left_out) - MAX_LISTED} more" if len(self.left_out) > MAX_LISTED else ""
        one = len(self.left_out) == 1
        them, what = ("it", "adapter") if one else ("them", "adapters")
        return (
            f"{what.capitalize()} {listed}{more} learnt less than three quarters of what the median adapter did: "
            f"its loss on {self.rows} held-out rows is {self.median:.3f}, the base's {self.base:.3f}"
            + ("" if self.merge is None else f", that of the merge of all adapters {self.merge:.3f}")
            + f". `poc-lora merge` leaves {them} out, unless it is given --keep-all."
        )


def screen(run: Path) -> Screening | None:
    """Compare the last validations of a run's adapters.

    An adapter is left out if it lowers the base's loss by less than three quarters of what the median adapter does, and
    if its loss is above the mean of the others' on resampled rows too (95 % interval). If the median adapter is no
    better than the base, none is.

    Returns:
        None if no rows were held out, or if there are fewer than three adapters.
    """
    packs = read_last_validations(run)
    adapters = {number: losses for pack in packs for number, losses in pack.adapters.items()}
    if len(adapters) < LEAST_ADAPTERS or any(len(pack.tokens) != len(packs[0].tokens) for pack in packs):
        return None
    tokens, base = packs[0].tokens, packs[0].base
    loss = {number: float(losses.sum() / tokens.sum()) for number, losses in sorted(adapters.items())}
    before, median = float(base.sum() / tokens.sum()), statistics.median(loss.values())
    limit = before - LEAST_GAIN * (before - median)
    total = np.sum(list(adapters.values()), axis=0)

    def is_outlier(number: int) -> bool:
        others = (total - adapters[number]) / (len(adapters) - 1)
        return paired_interval(adapters[number] - others, tokens)[1] > 0

    return Screening(
        rows=len(tokens),
        base=before,
        losses=loss,
        left_out=[j for j, x in loss.items() if median < before and x > limit and is_outlier(j)],
        merge=float(packs[0].merge.sum() / tokens.sum()) if len(packs) == 1 else None,
    )
