"""The loss of a pack: each adapter's mean over its own supervised tokens, summed over adapters."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from poc_lora.data.batches import MicroBatch
from poc_lora.devices import by_device, grouped_sums
from poc_lora.fusion import fusable, is_fusing
from poc_lora.models.forward import hidden_at, logits_at

# Logits held at once, by kind of device. On a CPU a chunk stays in the cache; on a GPU it keeps the matmul busy.
CHUNK_LOGITS = {"cpu": 2**18, "cuda": 2**27}
MIN_CHUNK_ROWS = 32


def packed_loss(
    model: PreTrainedModel, batch: MicroBatch, tokens_per_slot: Tensor, *, plain_head: bool
) -> tuple[Tensor, Tensor]:
    """Compute one micro-batch's part of a step's loss Σ_j (1/n_j) Σ_t CE_jt, the sum of the adapters' mean losses.

    Args:
        model: The base model, with a bank.
        batch: The rows of all adapters.
        tokens_per_slot: The number n_j of each adapter's supervised tokens in all micro-batches of the step [M].
        plain_head: See `has_plain_head`. Logits that are scaled or capped are computed all at once.

    Returns:
        The part, a scalar to differentiate, and each adapter's term of it [M], detached.
    """
    if plain_head:
        head: Any = model.get_output_embeddings()
        hidden_nd = hidden_at(model, batch.input_ids, batch.row, batch.column)
        per_token = chunked_cross_entropy(hidden_nd, head.weight, head.bias, batch.target)
    else:
        logits_nV = logits_at(model, batch.input_ids, batch.row, batch.column).float()
        per_token = torch.nn.functional.cross_entropy(logits_nV, batch.target, reduction="none")
    weighted = per_token / tokens_per_slot[batch.slot]
    return weighted.sum(), grouped_sums(weighted.detach(), batch.slot, len(tokens_per_slot))


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    """Returns −log softmax(hidden Wᵀ + b)[target], float32 [n], computed without the logits of all positions at once.

    The gradient d(loss)/d(hidden) = (softmax − onehot) W is computed in the forward pass, from each chunk's logits.

    Args:
        hidden: [n, d].
        weight: W [V, d], frozen.
        bias: b [V], frozen, or None.
        target: The tokens to predict [n].
    """
    losses: Tensor = _ChunkedCrossEntropy.apply(hidden, weight, bias, target)  # type: ignore[no-untyped-call]
    return losses


def chunk_rows(vocabulary: int, device_type: str) -> int:
    """Returns the number of positions whose logits are computed at once."""
    return max(MIN_CHUNK_ROWS, by_device(CHUNK_LOGITS, device_type) // vocabulary)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
        n, V = len(hidden), len(weight)
        rows = chunk_rows(V, hidden.device.type)
        losses = torch.empty(n, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, n, rows):
            part = slice(start, start + rows)
            logits = torch.nn.functional.linear(hidden[part], weight, bias)
            if gradient is None:
                losses[part] = torch.nn.functional.cross_entropy(logits.float(), target[part], reduction="none")
                continue
            if is_fusing():
                torch._dynamo.mark_static(logits, 1)  # V known: one pass for maximum and sum, wide reads
                losses[part], residual = fused_residual_(logits, target[part]), logits
            else:
                losses[part], residual = plain_residual(logits, target[part])
            if hidden.device.type == "cpu" and weight.dtype != torch.float32:
                # With AMX, oneDNN's bfloat16 product lets a row of NaN reach the row before it, maybe of another
                # adapter, unless V is a multiple of 32. The loss itself says that this adapter has diverged.
                residual.masked_fill_(~losses[part, None].isfinite(), 0)
            torch.mm(residual, weight, out=gradient[part])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(upstream[:, None].to(gradient.dtype)), None, None, None


def plain_residual(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Returns losses, float32 [n], and their gradient softmax − onehot, of logits [n, V], which it may overwrite."""
    chosen, x = target[:, None], logits.float()
    log_normaliser = x.logsumexp(1, keepdim=True)
    losses = (log_normaliser - x.gather(1, chosen)).squeeze(1)
    softmax = x.sub_(log_normaliser).exp_()
    softmax.scatter_add_(1, chosen, torch.full_like(chosen, -1, dtype=softmax.dtype))
    return losses, softmax.to(logits.dtype)


@fusable
def fused_residual_(logits: Tensor, target: Tensor) -> Tensor:
    """`plain_residual` with the gradient written over `logits`, for the compiler: two reads and one write.

    All arithmetic is in float32, but no float32 copy of the logits is made.
    """
    x = logits.float()
    largest = x.amax(1, keepdim=True)
    log_normaliser = largest + (x - largest).exp().sum(1, keepdim=True).log()
    losses = log_normaliser - x.gather(1, target[:, None])
    onehot = torch.arange(logits.shape[1], device=logits.device) == target[:, None]
    logits.copy_((x - log_normaliser).exp() - onehot.float())
    return losses.squeeze(1)
