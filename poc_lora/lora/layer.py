"""The module that a bank puts in place of a target: a frozen linear layer with the updates of M adapters."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from poc_lora import rng
from poc_lora.errors import ModelError
from poc_lora.lora.dropout import dropout
from poc_lora.lora.shared_input import (
    PackedLinear,
    Scales,
    SharedInput,
    add_product,
    autocast_enabled,
    without_autocast,
)
from poc_lora.models.float8 import Float8Linear


@dataclass
class ForwardState:
    """What the forward passes of a bank compute; shared by all its modules.

    In the mode `packed` each adapter is applied to its own rows. The other modes apply the same to all rows: `single`
    the adapter in `slot`, `merged` the average of the adapters in `members`, `base` nothing.
    """

    mode: Literal["packed", "single", "merged", "base"] = "packed"
    slot: int = 0
    members: list[int] = field(default_factory=list)
    dropout_keys: Tensor | None = None  # int64 [rows], set before a training pass
    rows: int | None = None  # rows of the model's input, during a call
    # Layers whose weight was read and that were called, in a forward pass.
    read: set["BankLinear"] = field(default_factory=set)
    called: set["BankLinear"] = field(default_factory=set)
    shared: SharedInput = field(default_factory=SharedInput)


@dataclass
class FactorBuffers:
    """One module's torch views of the bank's buffers."""

    A: Tensor  # [M, r, d_in]
    B: Tensor  # [M, r, d_out]
    grad_A: Tensor
    grad_B: Tensor
    scales: Scales


class _PackedUpdate(torch.autograd.Function):
    """y += scale · (x A^T) B for M adapters at once, with gradients added straight into the bank's buffer.

    x [M, n, d_in], A [M, r, d_in], B [M, r, d_out], y [M, n, d_out]. With u = x A^T and the gradient dy:
    dB = scale · u^T dy, du = scale · dy B^T, dA = du^T x, dx = du A. dA and dB are added to `grad_A` and `grad_B`,
    which are views of one flat buffer, and not returned, which saves a copy. x and y have the same dtype; all but the
    accumulated gradients is computed in it.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, grad_A: Tensor, grad_B: Tensor, scales: Scales
    ) -> Tensor:
        M = len(A)
        A, B = A.to(x.dtype), B.to(x.dtype)
        u = torch.bmm(x.view(M, -1, x.shape[-1]), A.transpose(1, 2))
        ctx.save_for_backward(x, u, A, B)
        ctx.grads, ctx.scales = (grad_A, grad_B), scales
        ctx.mark_dirty(y)
        scales.baddbmm_(y.view(M, -1, y.shape[-1]), u, B)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, u, A, B = ctx.saved_tensors
        grad_A, grad_B = ctx.grads
        packed, dy = x.view(len(A), -1, x.shape[-1]), upstream.reshape(len(A), -1, upstream.shape[-1])
        with without_autocast(x.device):  # backward() may be called within it
            du = ctx.scales.mul_(torch.bmm(dy, B.transpose(1, 2)))
            add_product(grad_A, du.transpose(1, 2), packed, 1.0)
            ctx.scales.add_product(grad_B, u.transpose(1, 2), dy)
            dx = torch.bmm(du, A).view(x.shape) if ctx.needs_input_grad[1] else None
        return upstream if ctx.needs_input_grad[0] else None, dx, None, None, None, None, None


class BankLinear(nn.Module):
    """A frozen linear layer plus the updates of M adapters.

    y = W x + scale · B_j A_j dropout(x) for the rows of adapter j. Rows are adapter-major: x has M·b rows, the first b
    of the first adapter. The update is computed in the dtype of W x, which under torch.autocast is autocast's, as in
    PEFT.

    Args:
        base: The frozen layer, W.
        factors: The adapters' factors and gradients.
        state: What to compute; shared by the bank's modules.
        dropout: Probability of dropping an input of A in training mode.
        salt: Distinguishes the dropout masks of this module from those of others.

    Raises:
        ModelError: In a packed forward pass, x is not made of the rows that the model was called with, or dropout is
            on and x is not [rows, length, width] with a dropout key for each row.
    """

    def __init__(self, base: nn.Linear, factors: FactorBuffers, state: ForwardState, dropout: float, salt: int):
        super().__init__()
        self.base = base
        self.factors = factors
        self.state = state
        self.dropout = dropout
        self.salt = rng.salt_words(salt, factors.A.device)

    @property
    def weight(self) -> Tensor:
        """The base's weight. A model that multiplies by it itself, without calling the layer, skips the updates."""
        self.state.read.add(self)
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        self.state.called.add(self)
        mode, factors = self.state.mode, self.factors
        y: Tensor
        if mode == "base":
            y = self.base(x)
            return y
        if mode == "packed" and self._is_plain(x):
            return self._plain_forward(x)
        # Two dimensions: for three, bitsandbytes' int8 layers return a view, to which autograd forbids adding in place.
        y = self.base(x.reshape(-1, x.shape[-1]))
        with without_autocast(x.device):
            if mode == "packed":
                self._check_rows(x, len(factors.A))
                dropped = self._drop(x).to(y.dtype).contiguous()
                y = _PackedUpdate.apply(  # type: ignore[no-untyped-call]
                    y, dropped, factors.A, factors.B, factors.grad_A, factors.grad_B, factors.scales
                )
            else:
                slots = [self.state.slot] if mode == "single" else self.state.members
                A = factors.A.detach()[slots].flatten(0, 1).to(y.dtype)  # [m·r, d_in]
                B, scale = factors.scales.shared(factors.B.detach()[slots], slots)
                hidden_Nr = x.reshape(-1, x.shape[-1]).to(y.dtype) @ A.T
                y.addmm_(hidden_Nr, B.flatten(0, 1).to(y.dtype), alpha=scale / max(1, len(slots)))
        return y.view(*x.shape[:-1], y.shape[-1])

    def _is_plain(self, x: Tensor) -> bool:
        """Whether `PackedLinear` computes what the steps below it would: not with bitsandbytes, hooks or casts."""
        base = self.base
        return (
            (type(base) is Float8Linear or (type(base) is nn.Linear and x.dtype == base.weight.dtype))
            and x.requires_grad
            and not any(parameter.requires_grad for parameter in base.parameters())
            and not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks)
            and not (self.dropout and self.training)
            and not autocast_enabled(x.device)
        )

    def _plain_forward(self, x: Tensor) -> Tensor:
        factors, shared = self.factors, self.state.shared
        self._check_rows(x, len(factors.A))
        y, link = PackedLinear.apply(  # type: ignore[no-untyped-call]
            shared.link(x),
            self.base,
            shared.quantized(x) if isinstance(self.base, Float8Linear) else None,
            factors.A,
            factors.B,
            factors.grad_A,
            factors.grad_B,
            factors.scales,
        )
        shared.keep(x, link)
        return y.view(*x.shape[:-1], y.shape[-1])  # type: ignore[no-any-return]

    def _check_rows(self, x: Tensor, M: int) -> None:
        rows = self.state.rows or M
        if x.shape[0] % rows:
            raise ModelError(
                f"an input with leading dimension {x.shape[0]} cannot be split among {M} adapters:"
                f" it is not made of the {rows} rows that the model was called with",
                fix="give every adapter the same number of rows, adapter after adapter; modules that regroup"
                " rows, such as routed experts, cannot be targets",
            )

    def _drop(self, x: Tensor) -> Tensor:
        if not (self.dropout and self.training):
            return x
        keys = self.state.dropout_keys
        if keys is None or x.dim() != 3 or len(keys) != x.shape[0]:
            raise ModelError(
                f"dropout needs inputs [rows, length, width] and a key for each row; an input is {list(x.shape)}",
                fix="call bank.key_dropout(keys) before the forward pass; modules that flatten rows go without dropout",
            )
        return dropout(x, keys, self.salt, self.dropout)
