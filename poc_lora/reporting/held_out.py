"""Does the merge pay? Base, adapters and merge by their losses on a run's held-out rows."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from poc_lora import rng
from poc_lora.artifacts.metrics_line import MetricsLine, read_metrics
from poc_lora.artifacts.run_folder import RunFolder

RESAMPLES = 10_000
MAX_RESAMPLED = 1000  # rows: their draws are held at once
MAX_METRICS_BYTES = 2**28


@dataclass(frozen=True)
class HeldOut:
    """The last validation of a pack: losses per token of the answers of the rows held out.

    Attributes:
        rows: The number of rows.
        base: The base model's loss.
        adapters: Each adapter's loss, by its number.
        merge: The loss of the exact merge of these adapters.
        best: The number of the adapter with the lowest loss.
        over_best: The merge's loss minus that adapter's, and the bounds of its 95 % bootstrap interval over rows.
    """

    rows: int
    base: float
    adapters: dict[int, float]
    merge: float
    best: int
    over_best: tuple[float, float, float]

    @property
    def average(self) -> float:
        """The mean of the adapters' losses."""
        return sum(self.adapters.values()) / len(self.adapters)


def read_held_out(folder: Path) -> list[HeldOut]:
    """Read the last validation of each pack of a run, from metrics.jsonl; none where no rows were held out.

    Adapters trained in several packs have a merge per pack: that of all of them was in no device's memory.
    """
    path = RunFolder(folder).metrics
    packs: dict[tuple[int, ...], dict[int | str, MetricsLine]] = {}
    for _, line in read_metrics(path, max_bytes=MAX_METRICS_BYTES) if path.is_file() else ():
        if line.members and line.row_losses:
            pack = packs.setdefault(tuple(line.members), {})
            pack[line.adapter] = line
    latest: dict[int, int] = {}  # adapter -> the step of its last validation
    for members, lines in packs.items():
        for member in members:
            latest[member] = max(latest.get(member, 0), *(line.step for line in lines.values()))
    found = (_compare(members, lines, {latest[member] for member in members}) for members, lines in packs.items())
    return sorted(filter(None, found), key=lambda pack: list(pack.adapters))


def _compare(members: tuple[int, ...], lines: dict[int | str, MetricsLine], latest: set[int]) -> HeldOut | None:
    """None where an adapter has diverged since, and where lines are missing or do not fit together, as after a kill."""
    if not {"base", "merge", *members} <= lines.keys() or {line.step for line in lines.values()} != latest:
        return None
    tokens = lines["base"].row_tokens or []
    losses = {
        name: np.array([np.nan if loss is None else loss for loss in line.row_losses or []])
        for name, line in lines.items()
    }
    if (
        not tokens
        or min(tokens) < 1
        or any(len(found) != len(tokens) or np.isnan(found).any() for found in losses.values())
    ):
        return None
    weights = np.array(tokens, dtype=float)
    mean = {name: float(found.sum() / weights.sum()) for name, found in losses.items()}
    best = min(members, key=lambda adapter: mean[adapter])
    return HeldOut(
        rows=len(tokens),
        base=mean["base"],
        adapters={adapter: mean[adapter] for adapter in members},
        merge=mean["merge"],
        best=best,
        over_best=paired_interval(losses["merge"] - losses[best], weights),
    )


def paired_interval(differences: np.ndarray, tokens: np.ndarray) -> tuple[float, float, float]:
    """The difference per token of two models' losses, and the bounds of its 95 % percentile bootstrap interval.

    Of more than `MAX_RESAMPLED` rows it is the normal interval of a ratio, to which the bootstrap's tends.

    Args:
        differences: Of the losses of each row, summed over its tokens [n].
        tokens: Of each row [n].
    """
    n, value = len(tokens), float(differences.sum() / tokens.sum())
    if n > MAX_RESAMPLED:
        half = 1.96 * float(np.linalg.norm(differences - value * tokens) / tokens.sum())
        return value, value - half, value + half
    drawn = np.random.default_rng(rng.key(0, 0, "bootstrap")).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    low, high = np.quantile(drawn @ differences / (drawn @ tokens), (0.025, 0.975))
    return value, float(low), float(high)


def verdicts(run: Path) -> list[str]:
    """Says for each pack of a run what its merge is worth on the held-out rows."""
    return [verdict(found) for found in read_held_out(run)]


def verdict(found: HeldOut) -> str:
    """Says in plain words what the merge is worth on the held-out rows, and what to do."""
    M, difference = len(found.adapters), "difference {:+.3f}, 95 % interval {:+.3f} to {:+.3f}".format(*found.over_best)
    losses = list(found.adapters.values())
    on = f"On {found.rows} held-out rows"
    if M == 1:
        verb = "lowers" if losses[0] < found.base else "does not lower"
        return f"{on} the adapter {verb} the loss: {losses[0]:.3f}, the base {found.base:.3f}."
    figures = (
        f"loss {found.merge:.3f}; adapters {min(losses):.3f} to {max(losses):.3f}, the best is {found.best}; "
        f"base {found.base:.3f}; merge and best: {difference}"
    )
    _, low, high = found.over_best
    if high < 0:
        said, advice = "is better than every adapter", "Use the merge."
    elif low <= 0:
        said = "cannot be told apart from the best adapter"
        advice = "Use the merge, which needs no choice; more held-out rows (data.validation) would tell more."
    else:
        said = "is worse than every adapter" if found.merge > max(losses) else "is worse than the best adapter"
        advice = (
            f"Use adapter {found.best}. If the losses still fell at the end, train longer; if not, a lower optim.lr "
            "keeps adapters closer together."
        )
    if found.base <= min(found.merge, *losses):
        said += ", and the base is better than all"
        advice = "Training did not help: lower optim.lr, and look at the curves."
    return f"{on} the merge of {M} adapters {said} ({figures}). {advice}"
