"""Forward passes of the base model that run its head only at the positions whose logits are needed."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel, masking_utils


@contextlib.contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Within the block, torch's scaled-dot-product attention does not use cuDNN.

    On recent GPUs torch prefers cuDNN, which plans for about a second per new shape (nearly every micro-batch has one),
    has given NaN gradients with a mask, and is not deterministic in the backward pass. The setting is global to the
    process, so it also holds in autograd's threads, where gradient checkpointing recomputes layers.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@contextlib.contextmanager
def one_sequence_per_row() -> Iterator[None]:
    """Within the block, transformers does not look for several sequences in one row, which reads from the device.

    Without a mask and a cache it would compare the positions of every forward pass, and so wait for the GPU.
    """
    library: Any = masking_utils
    before, library.find_packed_sequence_indices = library.find_packed_sequence_indices, lambda _: None
    try:
        yield
    finally:
        library.find_packed_sequence_indices = before


def logits_at(
    model: PreTrainedModel, input_ids: Tensor, rows: Tensor, columns: Tensor, *, past: Cache | None = None
) -> Tensor:
    """Returns the logits [n, vocabulary] at the positions `(rows[i], columns[i])` of `input_ids` [R, T].

    The whole model runs, so scales and caps around the head apply, but the head gets only the n positions. Rows are
    padded on the right, so under a causal mask no token attends to padding.

    Args:
        past: The keys and values of preceding tokens, for R rows.
    """
    logits, _ = _run(model, input_ids, lambda hidden: hidden[rows, columns].unsqueeze(0), past)
    return logits.squeeze(0)


def hidden_at(model: PreTrainedModel, input_ids: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Returns the head's inputs [n, d] at the positions of `logits_at`, without running the head."""
    _, hidden = _run(model, input_ids, lambda hidden: hidden[:, :0])
    return hidden[rows, columns]


def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether the logits are the output of a linear head as it is; some families scale or cap them."""
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
    """Returns the logits with `narrow(hidden)` as the head's input, and the hidden states before narrowing."""
    seen: list[Tensor] = []

    def before_head(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        seen.append(inputs[0])
        return (narrow(inputs[0]), *inputs[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(before_head)
    try:
        with one_sequence_per_row():
            logits = model(input_ids=input_ids, past_key_values=past, use_cache=past is not None).logits
        return logits, seen[0]
    finally:
        hook.remove()
