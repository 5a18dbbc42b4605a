"""Screening: which adapters of a run learnt so much less than the others that a merge is better without them."""

import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from poc_lora.reporting.held_out import (
    HeldOut,
    PackLosses,
    instead_of_merge,
    paired_interval,
    read_held_out,
    read_last_validations,
    verdict,
    verdicts,
)
from poc_lora.training.validation import LEAST_COMPARED

# Of the median adapter's gain over the base. The average forgives much: on the demo two of eight adapters that kept
# 0.88 of the gain cost it 0.4 points of accuracy, two that kept 0.6 cost it 1.9 (scripts/benchmarks/screening.py).
LEAST_GAIN = 0.75
MAX_LISTED = 8


@dataclass(frozen=True)
class Screening:
    """Adapters to leave out of a merge, with what tells them apart: losses per token of the held-out rows' answers.

    Attributes:
        rows: The number of held-out rows.
        base: The base model's loss.
        losses: Every adapter's, by number.
        left_out: The adapters to leave out, by number; empty if there is none.
        learnt: Whether these learnt, and spoil the merge all the same.
        merge: The loss of the merge of all; None where several packs have trained the adapters.
        others: What the merge of the others is worth; None where that was not measured.
        gain: Its loss minus that of the merge of all, and the bounds of its 95 % interval over rows; None likewise.
    """

    rows: int
    base: float
    losses: dict[int, float]
    left_out: list[int]
    learnt: bool = False
    merge: float | None = None
    others: HeldOut | None = None
    gain: tuple[float, float, float] | None = None

    @property
    def median(self) -> float:
        """The median of the adapters' losses."""
        return statistics.median(self.losses.values())

    def __str__(self) -> str:
        listed = ", ".join(f"{number:02d} ({self.losses[number]:.3f})" for number in self.left_out[:MAX_LISTED])
        more = f" and {len(self.left_out) - MAX_LISTED} more" if len(self.left_out) > MAX_LISTED else ""
        one = len(self.left_out) == 1
        them, what = ("it", "Adapter") if one else ("them", "Adapters")
        why = "learnt less than three quarters of what the median adapter did"
        if self.learnt:
            why = "would spoil the merge"
        losses = [
            f"on {self.rows} held-out rows the loss of the median adapter is {self.median:.3f}",
            f"the base's {self.base:.3f}",
        ]
        if self.merge is not None:
            losses.append(f"that of the merge of all adapters {self.merge:.3f}")
        if self.others is not None and self.gain is not None:
            interval = "difference {:+.3f}, 95 % interval {:+.3f} to {:+.3f}".format(*self.gain)
            losses.append(f"without {them} {self.others.merge:.3f} ({interval})")
        said = (
            f"{what} {listed}{more} {why}: {', '.join(losses)}. `poc-lora merge` leaves {them} out, unless it is given "
            "--keep-all."
        )
        return said if self.others is None else f"{said} {verdict(self.others)}"


def outcome(run: Path) -> list[str]:
    """Says which adapters `poc-lora merge` leaves out of a run, and what the merge is worth on the held-out rows."""
    found = screen(run)
    return [str(found)] if found and found.left_out else verdicts(run)


def better_than_merge(run: Path) -> int | str | None:
    """Returns what `outcome` says to use in place of the merge, as `instead_of_merge` does; None if it cannot tell."""
    found, packs = screen(run), read_held_out(run)
    if found and found.left_out:
        return instead_of_merge(found.others) if found.others else None
    return instead_of_merge(packs[0]) if len(packs) == 1 and len(packs[0].adapters) > 1 else None


def screen(run: Path) -> Screening | None:
    """Compare the last validations of a run's adapters.

    An adapter is left out if it lowers the base's loss by less than three quarters of what the median adapter does, and
    if its loss is above the mean of the others' on resampled rows too (95 % interval). If the median adapter is no
    better than the base, none is, nor if the merge without them was measured and is worse (95 % interval).

    Adapters that learnt may spoil a merge all the same: where one pack has trained all, and their merge is worse than
    the median adapter, those that are not among the best (`training.validation.best_adapters`) are left out if the
    merge of the best is better than the merge of all (95 % intervals).

    Returns:
        None if no rows were held out, or if there are fewer than three adapters.
    """
    packs = read_last_validations(run)
    adapters = {number: losses for pack in packs for number, losses in pack.adapters.items()}
    if len(adapters) < LEAST_COMPARED or any(len(pack.tokens) != len(packs[0].tokens) for pack in packs):
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
    return _with_merges(found, packs[0]) if len(packs) == 1 else found


def _with_merges(found: Screening, pack: PackLosses) -> Screening:
    """Add what the merges are worth, and the adapters that spoil that of all."""
    found = replace(found, merge=pack.compared().merge)
    best = pack.of_best
    if best is None:
        return found
    spoilers = [number for number in found.losses if number not in best.adapters]
    gain = paired_interval(best.merge - pack.merge, pack.tokens)
    if {*found.left_out} < {*spoilers}:
        typical = sorted(found.losses, key=lambda number: found.losses[number])[len(found.losses) // 2]
        is_spoilt = paired_interval(pack.merge - pack.adapters[typical], pack.tokens)[1] > 0
        if is_spoilt and gain[2] < 0:
            found = replace(found, left_out=spoilers, learnt=True)
    if found.left_out == spoilers:
        if gain[1] > 0:  # the others are measurably worse without them, however little they learnt
            return replace(found, left_out=[])
        found = replace(found, others=best.compared(), gain=gain)
    return found
