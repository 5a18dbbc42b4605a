"""What rows of tokens share at their start, run once: each layer's keys and values of it, which every row sees."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from poc_lora.models.forward import logits_at


def run_prefix(model: PreTrainedModel, tokens: Tensor, copies: int) -> Cache | None:
    """The keys and values of `tokens` [P] for each of `copies` models, whose rows are adapter-major.

    To be given to `logits_at` for any number of rows after it. None where the model keeps anything else: a sliding
    window, a recurrent state.
    """
    found = DynamicCache(config=model.config)
    nowhere = torch.zeros(0, dtype=torch.int64, device=model.device)
    logits_at(model, tokens.repeat(copies, 1).to(model.device), nowhere, nowhere, past=found)
    layers: list[Any] = [layer for layer in found.layers if type(layer) is DynamicLayer]
    if not layers or len(layers) < len(found.layers) or any(layer.get_seq_length() != len(tokens) for layer in layers):
        return None
    return Cache(layers=[_Shared(layer.keys, layer.values) for layer in layers])


class _Shared(DynamicLayer):
    """One layer's keys and values [copies, heads, P, d]; what the rows add to them is not kept."""

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = self.prefix = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = self.prefix
        return _after(keys, key_states), _after(values, value_states)


def _after(prefix: Tensor, rows: Tensor) -> Tensor:
    """[copies · b, heads, P + T, d]: every row behind the prefix of its copy."""
    b = len(rows) // len(prefix)
    behind = prefix[:, None].expand(-1, b, -1, -1, -1).flatten(0, 1) if b > 1 else prefix
    return torch.cat([behind, rows], dim=-2)
