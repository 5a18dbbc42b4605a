"""How a pack stands on held-out rows, and how alike its adapters are."""

from typing import Any

import torch

from poc_lora.lora.factors import Factors
from poc_lora.lora.similarity import cosine, gram_of_stack, summary
from poc_lora.lora.stacked import exact_device, stack
from poc_lora.training.pack import Pack


def validate(pack: Pack) -> dict[int | str, dict[str, Any]]:
    """Measures by name: `base`, each live adapter by its id, and `merge`, from the bank's own views.

    Each has its `validation_loss`, where there are validation rows. `merge`, the average of the live adapters, has
    their pairwise `cosines` and the figures of `similarity.summary`: S² and the error bar S²/M among them.
    """
    bank, examples = pack.bank, pack.data.validation
    measures: dict[int | str, dict[str, Any]] = {"merge": _similarity(pack) if pack.live else {}}
    if examples:
        most = max(pack.largest([len(pack.live)])) if pack.largest else 0
        with bank.disabled():
            measures["base"] = {"validation_loss": pack.loss(examples)}
            for _ in range(most - len(pack.live)):  # other ranks, which share the base, have more adapters to measure
                pack.loss(examples)
        for slot in pack.live:
            with bank.only(slot):
                measures[bank.adapters[slot]] = {"validation_loss": pack.loss(examples)}
        with bank.merged():
            measures["merge"] = {"validation_loss": pack.loss(examples)} | measures["merge"]
    return measures


@torch.no_grad()
def _similarity(pack: Pack) -> dict[str, Any]:
    inner = torch.zeros(len(pack.live), len(pack.live), dtype=torch.float64, device=exact_device(pack.device))
    for module in pack.bank.modules.values():
        A, B, scale = module.stack.A, module.stack.B, pack.bank.scale
        inner += gram_of_stack(stack([Factors(A[slot], B[slot].T, scale) for slot in pack.live]))
    return {**summary(inner), "cosines": cosine(inner).tolist()}
