"""The frozen base model run with its head only where logits are wanted."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel


@contextlib.contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Within the block torch's scaled-dot-product attention leaves cuDNN out; then the setting is as it was before.

    Where torch may choose, on recent GPUs it takes cuDNN first. That plans for about a second per new shape, and
    nearly every micro-batch has one; has given NaN gradients with a mask; and is not deterministic backwards. The
    setting is one of the whole process, so it holds as well for autograd's threads, which run layers again under
    gradient checkpointing.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def logits_at(
    model: PreTrainedModel, input_ids: Tensor, rows: Tensor, columns: Tensor, *, past: Cache | None = None
) -> Tensor:
    """Logits [n, vocabulary] after the tokens at `(rows[i], columns[i])` of `input_ids` [R, T].

    past: keys and values of tokens before these, one row of them for each of R.

    The whole model runs, so that scales and caps round the head stay in place, but the head itself sees
    only the n positions. Rows are padded on the right: under a causal mask no real token sees padding,
    and `use_cache=False` keeps transformers from treating rows as packed sequences.
    """
    logits, _ = _run(model, input_ids, lambda hidden: hidden[rows, columns].unsqueeze(0), past)
    return logits.squeeze(0)


def hidden_at(model: PreTrainedModel, input_ids: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """What the head would see [n, d] at the positions of `logits_at`; the head runs on nothing."""
    _, hidden = _run(model, input_ids, lambda hidden: hidden[:, :0])
    return hidden[rows, columns]


def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether the model's logits are its linear head's very output: some families scale or cap them."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or not head.weight.is_floating_point():
        return False
    outputs: list[tuple[Tensor, int]] = []
    hook = head.register_forward_hook(lambda _, inputs, output: outputs.append((output, output._version)))
    try:
        with torch.no_grad():
            logits = model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=model.device), use_cache=False).logits
    finally:
        hook.remove()
    output, version = outputs[0]
    return logits is output and logits._version == version


def _run(
    model: PreTrainedModel, input_ids: Tensor, narrow: Callable[[Tensor], Tensor], past: Cache | None = None
) -> tuple[Tensor, Tensor]:
    """The model's logits where the head sees `narrow(hidden)` only, and the hidden states before it."""
    seen: list[Tensor] = []

    def before_head(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        seen.append(inputs[0])
        return (narrow(inputs[0]), *inputs[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(before_head)
    try:
        logits = model(input_ids=input_ids, past_key_values=past, use_cache=past is not None).logits
        return logits, seen[0]
    finally:
        hook.remove()
