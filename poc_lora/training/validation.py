"""Validation of a pack: losses on held-out rows, and the similarity of its adapters."""

import functools
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

from poc_lora.adapters.factors import Factors
from poc_lora.data.batches import supervised_tokens
from poc_lora.merging.gram import cosine, gram, summary
from poc_lora.merging.stacked import exact_device, stack
from poc_lora.models.sharding import all_reduce_max
from poc_lora.training.step import Pack

LEAST_COMPARED = 3  # adapters: of two that differ, none is the outlier
TINY, HUGE = 1e-9, 1e9  # losses that ratios are taken of lie between these


def validate(
    pack: Pack,
    *,
    stop: Callable[[], bool] = lambda: False,
    report: Callable[[str], None] = lambda note: None,
) -> dict[int | str, dict[str, Any]] | None:
    """Measure the base model, each live adapter, their running merge, and the merge of the best of them.

    Args:
        pack: The adapters, at the same step.
        stop: Called before every micro-batch; validation ends if it returns True.
        report: Called with a note on progress before each model.

    Returns:
        Measures by name: `base`, each live adapter by its id, and `merge`; of three or more also `merge_of_best`, with
        the adapters that it `merges` (see `best_adapters`). If there are validation rows, each has its
        `validation_loss` per token of their answers and its `row_losses`, summed over each row's answer; `base` has
        the answers' `row_tokens`. `merge` also has the adapters' pairwise `cosines` and the figures of
        `merging.gram.summary`, among them S² and the merge variance S²/M. None if `stop` returned True.
    """
    bank, examples = pack.bank, pack.data.validation
    measures: dict[int | str, dict[str, Any]] = {"merge": _similarity(pack) if pack.live else {}}
    if not examples:
        return measures
    tokens = [supervised_tokens(example) for example in examples]
    Activation = Callable[[], AbstractContextManager[None]]
    compared = len(pack.live) >= LEAST_COMPARED
    models = len(pack.live) + compared
    # Ranks that share a base run it equally often: those with fewer adapters measure the base once more instead.
    more = all_reduce_max([models])[0] - models if pack.sharded else 0
    total, done = 2 + models + more, 0

    def measure(name: int | str, activate: Activation) -> bool:
        """Returns False if `stop` returned True."""
        nonlocal done
        done += 1
        report(f"validating, model {done} of {total}")
        with activate():
            losses = pack.row_losses(examples, stop)
        if losses is None:
            return False
        found = {"validation_loss": math.fsum(losses) / sum(tokens), "row_losses": [round(loss, 4) for loss in losses]}
        measures[name] = found | measures.get(name, {})
        return True

    every: list[tuple[int | str, Activation]] = [
        *[("base", bank.disabled)] * (1 + more),
        *[(bank.adapters[slot], functools.partial(bank.only, slot)) for slot in pack.live],
        ("merge", bank.merged),
    ]
    if not all(measure(name, activate) for name, activate in every):
        return None
    if compared:
        best = best_adapters({slot: measures[bank.adapters[slot]]["validation_loss"] for slot in pack.live})
        if not measure("merge_of_best", functools.partial(bank.merged, best)):
            return None
        measures["merge_of_best"]["merges"] = [bank.adapters[slot] for slot in best]
    measures["base"]["row_tokens"] = tokens
    return measures


def best_adapters(losses: Mapping[int, float]) -> list[int]:
    """Returns the adapters, two or more of three or more, whose losses lie before the widest gap, as a ratio."""
    known = {adapter: min(max(loss, TINY), HUGE) if loss == loss else HUGE for adapter, loss in losses.items()}
    ranked = sorted(known, key=lambda adapter: (known[adapter], adapter))
    kept = max(range(2, len(ranked)), key=lambda k: known[ranked[k]] / known[ranked[k - 1]])
    return sorted(ranked[:kept])


@torch.no_grad()
def _similarity(pack: Pack) -> dict[str, Any]:
    inner = torch.zeros(len(pack.live), len(pack.live), dtype=torch.float64, device=exact_device(pack.device))
    for module in pack.bank.modules.values():
        A, B, scales = module.factors.A, module.factors.B, pack.bank.scales.values
        inner += gram(stack([Factors(A[slot], B[slot].T, scales[slot]) for slot in pack.live]))
    return {**summary(inner), "cosines": cosine(inner).tolist()}
