"""How a pack stands on held-out rows, and how alike its adapters are."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch

from poc_lora.adapters.factors import Factors
from poc_lora.merging.gram import cosine, gram, summary
from poc_lora.merging.stacked import exact_device, stack
from poc_lora.training.step import Pack


def validate(
    pack: Pack,
    *,
    stop: Callable[[], bool] = lambda: False,
    tell: Callable[[str], None] = lambda note: None,
) -> dict[int | str, dict[str, Any]] | None:
    """Measures by name: `base`, each live adapter by its id, and `merge`, from the bank's own views.

    Each has its `validation_loss`, where there are validation rows. `merge`, the average of the live adapters, has
    their pairwise `cosines` and the statistics of `gram.summary`, such as S² and the merge variance S²/M.
    stop: asked before every micro-batch; None is returned where it became true. tell: given a word of how far it is.
    """
    bank, examples = pack.bank, pack.data.validation
    measures: dict[int | str, dict[str, Any]] = {"merge": _similarity(pack) if pack.live else {}}
    if not examples:
        return measures
    # Ranks that share a base run it equally often: those with fewer adapters measure the base once more instead.
    most = max(pack.largest([len(pack.live)])) if pack.largest else len(pack.live)
    views: list[tuple[int | str, Callable[[], contextlib.AbstractContextManager[None]]]] = [
        *[("base", bank.disabled)] * (1 + most - len(pack.live)),
        *[(bank.adapters[slot], functools.partial(bank.only, slot)) for slot in pack.live],
        ("merge", bank.merged),
    ]
    for number, (name, view) in enumerate(views, start=1):
        tell(f"validating, model {number} of {len(views)}")
        with view():
            loss = pack.loss(examples, stop)
        if loss is None:
            return None
        measures[name] = {"validation_loss": loss} | measures.get(name, {})
    return measures


@torch.no_grad()
def _similarity(pack: Pack) -> dict[str, Any]:
    inner = torch.zeros(len(pack.live), len(pack.live), dtype=torch.float64, device=exact_device(pack.device))
    for module in pack.bank.modules.values():
        A, B, scale = module.factors.A, module.factors.B, pack.bank.scale
        inner += gram(stack([Factors(A[slot], B[slot].T, scale) for slot in pack.live]))
    return {**summary(inner), "cosines": cosine(inner).tolist()}
