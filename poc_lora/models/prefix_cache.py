"""Run a prefix that many rows share once, and attend to its keys and values from every row."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from poc_lora.models.forward import logits_at


def run_prefix(model: PreTrainedModel, tokens: Tensor, copies: int) -> Cache | None:
    """Returns the keys and values of a prefix, for the `past` of `logits_at`.

    Args:
        model: The base model, possibly with a bank.
        tokens: The prefix, [P].
        copies: The number of adapters in the pack, 1 outside a packed pass; rows after it are adapter-major.

    Returns:
        The cache, for any number of rows; None if the model keeps other state, such as a sliding window.
    """
    found = DynamicCache(config=model.config)
    nowhere = torch.zeros(0, dtype=torch.int64, device=model.device)
    logits_at(model, tokens.repeat(copies, 1).to(model.device), nowhere, nowhere, past=found)
    layers: list[Any] = [layer for layer in found.layers if type(layer) is DynamicLayer]
    if not layers or len(layers) < len(found.layers) or any(layer.get_seq_length() != len(tokens) for layer in layers):
        return None
    return Cache(layers=[_Shared(layer.keys, layer.values) for layer in layers])


class _Shared(DynamicLayer):
    """One layer's keys and values [copies, heads, P, d]; those of the rows after it are not kept."""

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()  # type: ignore[no-untyped-call]
        self.lazy_initialization(keys, values)
        self.keys, self.values = self.prefix = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = self.prefix
        return _after(keys, key_states), _after(values, value_states)


def _after(prefix: Tensor, rows: Tensor) -> Tensor:
    """Returns [copies · b, heads, P + T, d]: each row after the prefix of its copy."""
    b = len(rows) // len(prefix)
    behind = prefix[:, None].expand(-1, b, -1, -1, -1).flatten(0, 1) if b > 1 else prefix
    return torch.cat([behind, rows], dim=-2)
