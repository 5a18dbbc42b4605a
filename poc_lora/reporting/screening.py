"""Screening: which adapters of a run learnt so much less than the others that a merge is better without them."""

import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from poc_lora.reporting.held_out import HeldOut, PackLosses, paired_interval, read_last_validations, verdict

# Of the median adapter's gain over the base. The average forgives much: on the demo two of eight adapters that kept
# 0.88 of the gain cost it 0.4 points of accuracy, two that kept 0.6 cost it 1.9 (scripts/benchmarks/screening.py).
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
        gain: Of adapters that spoil the merge, its loss without them minus that with them, and the bounds of its 95 %
            interval over rows; None of adapters that learnt too little.
        merge: The loss of the merge of all; None likewise.
        others: What the merge of the others is worth; None likewise.
    """

    rows: int
    base: float
    losses: dict[int, float]
    left_out: list[int]
    gain: tuple[float, float, float] | None = None
    merge: float | None = None
    others: HeldOut | None = None

    @property
    def median(self) -> float:
        """The median of the adapters' losses."""
        return statistics.median(self.losses.values())

    def __str__(self) -> str:
        listed = ", ".join(f"{number:02d} ({self.losses[number]:.3f})" for number in self.left_out[:MAX_LISTED])
        more = f" and {len(self.left_out) - MAX_LISTED} more" if len(self.left_out) > MAX_LISTED else ""
        one = len(self.left_out) == 1
        them, what = ("it", "Adapter") if one else ("them", "Adapters")
        leaves = f"`poc-lora merge` leaves {them} out, unless it is given --keep-all."
        if self.gain is None or self.others is None:
            return (
                f"{what} {listed}{more} learnt less than three quarters of what the median adapter did: "
                f"its loss on {self.rows} held-out rows is {self.median:.3f}, the base's {self.base:.3f}. {leaves}"
            )
        return (
            f"{what} {listed}{more} would spoil the merge: on {self.rows} held-out rows its loss is "
            f"{self.merge:.3f} with {them} and {self.others.merge:.3f} without (difference "
            "{:+.3f}, 95 % interval {:+.3f} to {:+.3f}). ".format(*self.gain)
            + f"{leaves} {verdict(self.others)}"
        )


def screen(run: Path) -> Screening | None:
    """Compare the last validations of a run's adapters.

    An adapter is left out if it lowers the base's loss by less than three quarters of what the median adapter does, and
    if its loss is above the mean of the others' on resampled rows too (95 % interval). If the median adapter is no
    better than the base, none is.

    Adapters that learnt may spoil a merge all the same: where one pack has trained all, and their merge is worse than
    the median adapter, those that are not among the best (`training.validation.best_adapters`) are left out if the
    merge of the best is better than the merge of all (95 % intervals).

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

    left_out = [j for j, x in loss.items() if median < before and x > limit and is_outlier(j)]
    found = Screening(len(tokens), before, loss, left_out)
    spoilt = _spoilt_merge(packs[0], found) if len(packs) == 1 else None
    return spoilt or found


def _spoilt_merge(pack: PackLosses, found: Screening) -> Screening | None:
    """The adapters that spoil the merge; None if there are none, or not all that learnt too little are among them."""
    spoilers = [number for number in found.losses if number not in pack.best]
    if pack.merge_of_best is None or not {*found.left_out} <= {*spoilers}:
        return None
    typical = sorted(found.losses, key=lambda number: found.losses[number])[len(found.losses) // 2]
    gain = paired_interval(pack.merge_of_best - pack.merge, pack.tokens)
    if paired_interval(pack.merge - pack.adapters[typical], pack.tokens)[1] <= 0 or gain[2] >= 0:
        return None
    return replace(found, left_out=spoilers, gain=gain, merge=pack.compared().merge, others=pack.compared_of_best())
