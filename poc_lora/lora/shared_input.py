"""A packed linear layer as one autograd function, which sums the gradients of an input that several layers share.

q_proj, k_proj and v_proj read one tensor, and so do gate_proj and up_proj. Autograd would compute a gradient of it in
each and add them afterwards, each time reading and writing tensors as large as the input. Here the layers form a chain
instead: each returns, besides its output, a link that stands for the input in the next one. So the backward pass hands
the gradient from layer to layer, and each adds its part within its own matmuls. Over a float8 base they also share the
quantised input.
"""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from poc_lora.models.float8 import Float8Linear, quantized


class SharedInput:
    """The last input of a bank's layers and the link that stands for it in the next layer.

    Layers share an input if it is the same tensor object, so no names of layers are needed. The tensor cannot have
    been changed in between: the layers save it for the backward pass, and autograd refuses to use it once changed.
    """

    def __init__(self) -> None:
        self._input: Tensor | None = None
        self._link: Tensor | None = None
        self._quantized: tuple[Tensor, tuple[Tensor, Tensor]] | None = None

    def link(self, x: Tensor) -> Tensor:
        """Returns the link for `x` if it was the last input, otherwise `x`."""
        return self._link if x is self._input and self._link is not None else x

    def quantized(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the rows of `x` in float8 with their scales, computed once for layers in a row."""
        if self._quantized is None or self._quantized[0] is not x:
            self._quantized = x, quantized(x.reshape(-1, x.shape[-1]))
        return self._quantized[1]

    def keep(self, x: Tensor, link: Tensor) -> None:
        """Let `link` stand for `x` in the next layer."""
        self._input, self._link = x, link

    def forget(self) -> None:
        """Drop the input, so that its memory and its graph live no longer than without sharing."""
        self._input = self._link = self._quantized = None


class PackedLinear(torch.autograd.Function):
    """y = x W^T + bias + scale · (x A^T) B for M adapters at once, and a link that stands for x in the next layer.

    x [rows, ..., d_in], W [d_out, d_in] and bias [d_out] or None of `layer`, A [M, r, d_in], B [M, r, d_out], and
    y [n, d_out] with one row for each of x. With u = x A^T and the gradient dy: dB = scale · u^T dy, du = dy B^T,
    dA = scale · du^T x, dx = the link's gradient + dy W + scale · du A. dA and dB are added to `grad_A` and `grad_B`,
    as in the update alone. x and W have the same dtype, and all but the accumulated gradients is computed in it; or the
    layer is a Float8Linear, whose products are its own, and `in_float8` holds the quantised rows of x and their scales.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        layer: nn.Linear,
        in_float8: tuple[Tensor, Tensor] | None,
        A: Tensor,
        B: Tensor,
        grad_A: Tensor,
        grad_B: Tensor,
        scales: "Scales",
    ) -> tuple[Tensor, Tensor]:
        M, d_in = len(A), x.shape[-1]
        # In every micro-batch anew: it takes 0.6 % of a step of 8B parameters on a GPU and 0.2 % on a CPU, and a copy
        # kept from step to step would have to follow every change of the weights.
        A, B = A.to(x.dtype), B.to(x.dtype)
        weight: Tensor | None
        if isinstance(layer, Float8Linear) and in_float8 is not None:
            y, weight, ctx.float8 = layer.product(*in_float8, x.dtype), None, layer
        else:
            y, weight, ctx.float8 = F.linear(x.reshape(-1, d_in), layer.weight, layer.bias), layer.weight, None
        u = torch.bmm(x.reshape(M, -1, d_in), A.transpose(1, 2))
        scales.baddbmm_(y.view(M, -1, y.shape[-1]), u, B)
        ctx.save_for_backward(x, u, A, B, weight)
        ctx.grads, ctx.scales = (grad_A, grad_B), scales
        ctx.set_materialize_grads(False)  # the last link of a chain has no gradient
        return y, x.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dlink: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return dlink, *[None] * 7
        x, u, A, B, weight = ctx.saved_tensors
        grad_A, grad_B = ctx.grads
        M, d_in, d_out = len(A), x.shape[-1], dy.shape[-1]
        dy_packed = dy.reshape(M, -1, d_out)
        dy = dy_packed.view(-1, d_out)
        with without_autocast(x.device):  # backward() may be called within it
            # In place, as the link and so its gradient are known to the next layer of the chain alone.
            if ctx.float8 is not None:
                dx = ctx.float8.gradient(dy)
                dx = dx if dlink is None else dlink.view(-1, d_in).add_(dx)
            else:
                dx = dy @ weight if dlink is None else dlink.view(-1, d_in).addmm_(dy, weight)
            du = torch.bmm(dy_packed, B.transpose(1, 2))
            ctx.scales.baddbmm_(dx.view(M, -1, d_in), du, A)
            ctx.scales.add_product(grad_A, du.transpose(1, 2), x.reshape(M, -1, d_in))
            ctx.scales.add_product(grad_B, u.transpose(1, 2), dy_packed)
        return dx.view(x.shape), *[None] * 7


class Scales:
    """The scale of each adapter's update, and products scaled by them.

    Adapters of equal scale that follow one another share a matmul: usually all do, and then there is one. Each matmul
    multiplies by its scale as one of a whole pack with that scale would, so that an adapter gets the same bits.

    Args:
        values: The scales of the M adapters.
    """

    def __init__(self, values: Sequence[float]):
        self.values = tuple(values)
        ends = [*itertools.accumulate(len(list(same)) for _, same in itertools.groupby(self.values))]
        self._parts = [(slice(start, end), self.values[start]) for start, end in itertools.pairwise([0, *ends])]

    def baddbmm_(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        """Add scale · left right to `total`, of the same dtype, adapter by adapter."""
        for alpha, (to, a, b) in self._each(total, left, right):
            to.baddbmm_(a, b, alpha=alpha)

    def add_product(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        """Add scale · left right to `total`, float32, adapter by adapter; see the function `add_product`."""
        for alpha, (to, a, b) in self._each(total, left, right):
            add_product(to, a, b, alpha)

    def mul_(self, x: Tensor) -> Tensor:
        """Multiply each adapter's part of x by its scale, in place."""
        for alpha, (part,) in self._each(x):
            part.mul_(alpha)
        return x

    def shared(self, B: Tensor, slots: Sequence[int]) -> tuple[Tensor, float]:
        """Returns the B [m, r, d_out] of some adapters, and a scale for all: 1, with their own in B, if they differ."""
        own = [self.values[slot] for slot in slots]
        if len(set(own)) == 1:
            return B, own[0]
        return B * torch.tensor(own, device=B.device).view(-1, 1, 1), 1.0

    def _each(self, *tensors: Tensor) -> Iterator[tuple[float, tuple[Tensor, ...]]]:
        """Scales with the parts of the tensors that they belong to."""
        if len(self._parts) == 1:
            yield self.values[0], tensors
            return
        for part, alpha in self._parts:
            yield alpha, tuple(tensor[part] for tensor in tensors)


def add_product(total: Tensor, left: Tensor, right: Tensor, alpha: float) -> None:
    """Add alpha · left right to `total`, float32, batch by batch. On a GPU a low-precision product is not rounded."""
    if left.dtype == total.dtype:
        total.baddbmm_(left, right, alpha=alpha)
    elif total.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        torch.baddbmm(total, left, right, alpha=alpha, out_dtype=total.dtype, out=total)
    else:
        total.add_(torch.bmm(left, right), alpha=alpha)


def autocast_enabled(device: torch.device) -> bool:
    """Whether torch.autocast is on for a device."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Disable autocast, which changes the dtype of matmuls but not of in-place ones; dtypes are explicit here."""
    return torch.autocast(device.type, enabled=False) if autocast_enabled(device) else contextlib.nullcontext()
