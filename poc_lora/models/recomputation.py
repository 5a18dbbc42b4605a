"""Gradient checkpointing of the base model, for the length of a block."""

import contextlib
import functools
from collections.abc import Iterator

from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from poc_lora.errors import ModelError


@contextlib.contextmanager
def gradient_checkpointing(model: PreTrainedModel) -> Iterator[None]:
    """Within the block, each decoder layer keeps only its input and is recomputed in the backward pass.

    Gradients are the same bit for bit: dropout is keyed, so the second run draws the same mask.

    Raises:
        ModelError: The model has no layers that transformers can checkpoint.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(
            f"{type(model).__name__} has no layers that can be checkpointed",
            where="train.gradient_checkpointing",
            fix="set it to false",
        )
    for layer in layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
