"""Does the merge pay? Base, adapters and merge by their losses on rows that were held out, of a run or from a file."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from poc_lora import rng
from poc_lora.artifacts.metrics_line import MetricsLine, read_metrics
from poc_lora.artifacts.row_losses import RowLosses
from poc_lora.artifacts.run_folder import RunFolder
from poc_lora.evaluation.scores import RESAMPLES, smallest_p
from poc_lora.reporting.escape import short
from poc_lora.reporting.tables import Table, Value

MAX_RESAMPLED = 1000  # rows: their draws are held at once
MAX_LISTED = 32  # adapters in the table of losses
MAX_SHOWN = 100  # nats per token, of which the perplexity is shown
MAX_METRICS_BYTES = 2**28


@dataclass(frozen=True)
class PackLosses:
    """Losses on n rows that were held out, each summed over the row's answer [n]: a pack's last validation."""

    base: np.ndarray
    adapters: dict[int, np.ndarray]  # by number
    merge: np.ndarray
    tokens: np.ndarray  # of each row's answer
    of_best: "PackLosses | None" = None  # the same of `training.validation.best_adapters`, whose merge was measured too

    def compared(self) -> "HeldOut":
        """The merge against the base and the best adapter."""
        return _held_out(self.base, self.adapters, self.merge, self.tokens, merged_adapters=len(self.adapters))


@dataclass(frozen=True)
class HeldOut:
    """Losses per token of the answers of rows held out: a pack's last validation, or those of `poc-lora eval --rows`.

    Attributes:
        rows: The number of rows.
        base: The base model's loss.
        adapters: Each adapter's loss, by its number or name.
        merge: The loss of their merge; that of the adapter where there is one alone.
        merged_adapters: How many of the adapters that merge is made of; None if that is not known.
        best: The adapter with the lowest loss.
        over_best: The merge's loss minus that adapter's, and the bounds of its 95 % bootstrap interval over rows.
        over_base: That adapter's loss minus the base model's, likewise.
    """

    rows: int
    base: float
    adapters: dict[int | str, float]
    merge: float
    merged_adapters: int | None
    best: int | str
    over_best: tuple[float, float, float]
    over_base: tuple[float, float, float]

    @property
    def average(self) -> float:
        """The mean of the adapters' losses."""
        return sum(self.adapters.values()) / len(self.adapters)


def read_held_out(folder: Path) -> list[HeldOut]:
    """Compare the models in the last validation of each pack of a run; none where no rows were held out.

    Adapters trained in several packs have a merge per pack: that of all of them was in no device's memory.
    """
    return [pack.compared() for pack in read_last_validations(folder)]


def read_last_validations(folder: Path) -> list[PackLosses]:
    """Read the last validation of each pack of a run, from metrics.jsonl, in the order of the adapters."""
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
    found = (_losses(members, lines, {latest[member] for member in members}) for members, lines in packs.items())
    return sorted(filter(None, found), key=lambda pack: list(pack.adapters))


def _losses(members: tuple[int, ...], lines: dict[int | str, MetricsLine], latest: set[int]) -> PackLosses | None:
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
    adapters = {adapter: losses[adapter] for adapter in members}
    found = PackLosses(losses["base"], adapters, losses["merge"], np.array(tokens, dtype=float))
    best = (lines["merge_of_best"].merges or []) if "merge_of_best" in lines else []
    if not best or not {*best} < {*members}:
        return found
    of_best = replace(found, adapters={number: adapters[number] for number in best}, merge=losses["merge_of_best"])
    return replace(found, of_best=of_best)


def rows_held_out(found: RowLosses) -> HeldOut | None:
    """Compare the variants that were scored on the rows of a file; None for a model without adapters."""
    adapters: dict[int | str, np.ndarray] = {name: np.array(losses) for name, losses in found.adapters.items()}
    if not adapters:
        return None
    merged = np.array(found.merged) if found.merged is not None else next(iter(adapters.values()))
    base, tokens = np.array(found.base), np.array(found.tokens, dtype=float)
    return _held_out(base, adapters, merged, tokens, merged_adapters=found.merged_adapters)


def _held_out(
    base: np.ndarray,
    adapters: Mapping[Any, np.ndarray],
    merge: np.ndarray,
    tokens: np.ndarray,
    *,
    merged_adapters: int | None,
) -> HeldOut:
    """Compare losses of each row, summed over its tokens, all [n]."""
    means = {adapter: _mean(losses, tokens) for adapter, losses in adapters.items()}
    best = min(means, key=lambda adapter: means[adapter])
    return HeldOut(
        rows=len(tokens),
        base=_mean(base, tokens),
        adapters=means,
        merge=_mean(merge, tokens),
        merged_adapters=merged_adapters,
        best=best,
        over_best=paired_interval(merge - adapters[best], tokens),
        over_base=paired_interval(adapters[best] - base, tokens),
    )


def _mean(losses: np.ndarray, tokens: np.ndarray) -> float:
    return float(losses.sum() / tokens.sum())


def rows_table(found: RowLosses) -> Table:
    """Returns the loss per token and the perplexity of every variant, and how far it is from the best adapter."""
    tokens, compared = np.array(found.tokens, dtype=float), rows_held_out(found)
    best = None if compared is None else np.array(found.adapters[str(compared.best)])
    listed = list(found.adapters)
    if compared is not None and len(listed) > MAX_LISTED:
        listed = [str(compared.best)]
    variants = {"base": found.base} | {f"LoRA {name}": found.adapters[name] for name in listed}
    variants |= {"PoC merge": found.merged or []} | {"prediction ensemble": found.ensemble or []}
    rows: list[list[Value]] = []
    for name, losses in variants.items():
        if losses:
            loss = _mean(np.array(losses), tokens)
            row: list[Value] = [
                short(name, 60),
                f"{loss:.3f}",
                f"{math.exp(loss):.4g}" if loss < MAX_SHOWN else "> 1e43",
            ]
            if best is not None:
                is_best = compared is not None and name == f"LoRA {compared.best}"
                gap = "{:+.3f} ({:+.3f} to {:+.3f})".format(*paired_interval(np.array(losses) - best, tokens))
                row.append("" if is_best else gap)
            rows.append(row)
    titles = ["", "loss", "perplexity", *([] if best is None else ["minus the best adapter (95 % interval)"])]
    caption = f"Loss per token of the answers of {len(found.tokens):,} rows; lower is better"
    return Table(caption, titles, rows, strong=["PoC merge"])


def rows_notes(found: RowLosses) -> list[str]:
    """Returns the verdict on rows of a file, and what was left out of them."""
    compared = rows_held_out(found)
    notes = [] if compared is None else [verdict(compared)]
    if found.exact_average:
        notes.append("PoC merge is the exact average of the adapters, which is not saved: `poc-lora merge` saves it.")
    if found.trained_on:
        notes.append("A file of these rows was trained on: losses on it say little about new rows.")
    if found.truncated:
        notes.append(f"{_rows(found.truncated)} cut off at their end (data.max_length).")
    if found.dropped:
        notes.append(f"{_rows(found.dropped)} left out: all their answers were cut off (data.max_length).")
    return notes


def _rows(count: int) -> str:
    return "1 row was" if count == 1 else f"{count:,} rows were"


def paired_interval(differences: np.ndarray, tokens: np.ndarray) -> tuple[float, float, float]:
    """The difference per token of two models' losses, and the bounds of its 95 % percentile bootstrap interval.

    What is resampled is a ratio of two sums, since rows have different numbers of tokens; `scores.paired_difference`
    resamples means of a few distinct values, which is done by their counts. Of more than `MAX_RESAMPLED` rows the
    interval is the normal one of a ratio, which the bootstrap's tends to. Of so few rows that no test of their signs
    could reach 5 % (`smallest_p`) it holds zero.

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
    if smallest_p(int(np.count_nonzero(differences))) > 0.05:
        low, high = min(low, 0.0), max(high, 0.0)
    return value, float(low), float(high)


def verdicts(run: Path) -> list[str]:
    """Says for each pack of a run what its merge is worth on the held-out rows."""
    return [verdict(found) for found in read_held_out(run)]


def instead_of_merge(found: HeldOut) -> int | str | None:
    """Returns what `verdict` says to use in place of the merge: an adapter, or `base`; None is the merge."""
    if found.base <= min(found.merge, *found.adapters.values()):
        return "base"
    return found.best if found.over_best[1] > 0 else None


def merge_of(merged: int | None, adapters: int) -> str:
    """Names a merge by the number of adapters that it is made of, such as `the merge of 3 of the 4 adapters`."""
    if merged is None:
        return "the merge"
    if merged < adapters:
        return f"the merge of {merged} of the {adapters} adapters"
    return f"the merge of {merged} adapter{'' if merged == 1 else 's'}"


def verdict(found: HeldOut) -> str:
    """Says in plain words what the merge is worth on the held-out rows, and what to do."""
    M, interval = len(found.adapters), "difference {:+.3f}, 95 % interval {:+.3f} to {:+.3f}"
    losses = list(found.adapters.values())
    best = f"{found.best:02d}" if isinstance(found.best, int) else short(found.best, 60)  # its folder's name
    on = f"On {found.rows} held-out row{'' if found.rows == 1 else 's'}"
    if M == 1:
        _, low, high = found.over_base
        said = "lowers the loss" if high < 0 else "raises the loss" if low > 0 else "cannot be told apart from the base"
        difference = interval.format(*found.over_base)
        return f"{on} the adapter {said}: {losses[0]:.3f}, the base {found.base:.3f} ({difference})."
    difference = interval.format(*found.over_best)
    figures = (
        f"loss {found.merge:.3f}; adapters {min(losses):.3f} to {max(losses):.3f}, the best is {best}; "
        f"base {found.base:.3f}; merge and best: {difference}"
    )
    _, low, high = found.over_best
    if high < 0:
        said, advice = "is better than every adapter", "Use the merge."
    elif low <= 0:
        said = "cannot be told apart from the best adapter"
        advice = "Either will do, and the merge needs no choice; more held-out rows (data.validation) would tell more."
    else:
        said = "is worse than every adapter" if found.merge > max(losses) else "is worse than the best adapter"
        advice = (
            f"Use adapter {best}. If the losses still fell at the end, train longer; if not, a lower optim.lr "
            "keeps adapters closer together."
        )
    if found.base <= min(found.merge, *losses):
        said += ", and the base has a lower loss than all"
        advice = "Training did not help: lower optim.lr, and look at the curves."
    return f"{on} {merge_of(found.merged_adapters, M)} {said} ({figures}). {advice}"
