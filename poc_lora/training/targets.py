"""Checks before weights are read: updates of the targets have an effect, and PEFT attaches to the same modules."""

import contextlib

import torch

from poc_lora.config import RunConfig
from poc_lora.errors import PocLoraError
from poc_lora.lora.bank import AdapterBank, matching_linears, resolve_targets
from poc_lora.lora.peft_targets import require_attached
from poc_lora.models.load import empty_base
from poc_lora.training.shapes import shapes_only


def require_targets(config: RunConfig) -> None:
    """Raises ModelError if a target matches no layer, if PEFT attaches other modules, or if an update has no effect."""
    section = config.model
    model = empty_base(section.name, revision=section.revision)
    targets = resolve_targets(model, config.lora.targets)
    require_attached(model, list(matching_linears(model, targets)), targets)
    with shapes_only(), torch.no_grad():
        model = empty_base(section.name, revision=section.revision)
        AdapterBank.blank(model, targets=targets, rank=1, adapters=[0])
        try:
            with contextlib.redirect_stderr(None):
                model(input_ids=torch.zeros(1, 8, dtype=torch.int64))
        except PocLoraError:
            raise
        except Exception:  # noqa: S110  (not every model runs on shapes; the bank looks at every pass)
            pass
