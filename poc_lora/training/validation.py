"""Validation of a pack: losses on held-out rows, and the similarity of its adapters."""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from poc_lora.adapters.factors import Factors
from poc_lora.data.batches import supervised_tokens
from poc_lora.merging.gram import cosine, gram, summary
from poc_lora.merging.stacked import exact_device, stack
from poc_lora.models.sharding import all_reduce_max
from poc_lora.training.step import Pack


def validate(
    pack: Pack,
    *,
    stop: Callable[[], bool] = lambda: False,
    report: Callable[[str], None] = lambda note: None,
) -> dict[int | str, dict[str, Any]] | None:
    """Measure the base model, each live adapter, and their running merge.

    Args:
        pack: The adapters, at the same step.
        stop: Called before every micro-batch; validation ends if it returns True.
        report: Called with a note on progress before each model.

    Returns:
        Measures by name: `base`, each live adapter by its id, and `merge`. If there are validation rows, each has its
        `validation_loss` per token of their answers and its `row_losses`, summed over each row's answer; `base` has
        the answers' `row_tokens`. `merge` also has the adapters' pairwise `cosines` and the figures of
        `merging.gram.summary`, among them S² and the merge variance S²/M. None if `stop` returned True.
    """
    bank, examples = pack.bank, pack.data.validation
    measures: dict[int | str, dict[str, Any]] = {"merge": _similarity(pack) if pack.live else {}}
    if not examples:
        return measures
    tokens = [supervised_tokens(example) for example in examples]
    # Ranks that share a base run it equally often: those with fewer adapters measure the base once more instead.
    most = all_reduce_max([len(pack.live)])[0] if pack.sharded else len(pack.live)
    models: list[tuple[int | str, Callable[[], contextlib.AbstractContextManager[None]]]] = [
        *[("base", bank.disabled)] * (1 + most - len(pack.live)),
        *[(bank.adapters[slot], functools.partial(bank.only, slot)) for slot in pack.live],
        ("merge", bank.merged),
    ]
    for number, (name, activate) in enumerate(models, start=1):
        report(f"validating, model {number} of {len(models)}")
        with activate():
            losses = pack.row_losses(examples, stop)
        if losses is None:
            return None
        found = {"validation_loss": math.fsum(losses) / sum(tokens), "row_losses": [round(loss, 4) for loss in losses]}
        measures[name] = found | measures.get(name, {})
    measures["base"]["row_tokens"] = tokens
    return measures


@torch.no_grad()
def _similarity(pack: Pack) -> dict[str, Any]:
    inner = torch.zeros(len(pack.live), len(pack.live), dtype=torch.float64, device=exact_device(pack.device))
    for module in pack.bank.modules.values():
        A, B, scales = module.factors.A, module.factors.B, pack.bank.scales.values
        inner += gram(stack([Factors(A[slot], B[slot].T, scales[slot]) for slot in pack.live]))
    return {**summary(inner), "cosines": cosine(inner).tolist()}
