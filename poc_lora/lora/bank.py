"""M adapters stacked on one frozen base model, so that one forward pass serves them all."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from poc_lora import rng
from poc_lora.errors import AdapterError, ModelError
from poc_lora.lora.adapter import Adapter, Factors
from poc_lora.lora.base import linear_names


@dataclass
class _View:
    """What the next forward passes compute; shared by all modules of a bank."""

    mode: str = "pack"  # pack | only | merged | base
    slot: int = 0
    members: list[int] = field(default_factory=list)
    dropout_keys: Tensor | None = None  # int64 [rows], set for a training pass


class _PackedUpdate(torch.autograd.Function):
    """y += scale · (x A^T) B for M adapters at once, with gradients added straight into the bank's buffer.

    x [M, n, d_in], A [M, r, d_in], B [M, r, d_out], y [M, n, d_out]. With u = x A^T and dy given:
    dB = scale · u^T dy, du = scale · dy B^T, dA = du^T x, dx = du A. Writing dA and dB in place of
    returning them lets every module accumulate into a view of one flat buffer, without a copy.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, grad_A: Tensor, grad_B: Tensor, scale: float
    ) -> Tensor:
        A, B = A.to(x.dtype), B.to(x.dtype)
        u = torch.bmm(x, A.transpose(1, 2))
        ctx.save_for_backward(x, u, A, B)
        ctx.grads, ctx.scale = (grad_A, grad_B), scale
        ctx.mark_dirty(y)
        return y.baddbmm_(u, B, alpha=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, u, A, B = ctx.saved_tensors
        grad_A, grad_B = ctx.grads
        du = torch.bmm(dy, B.transpose(1, 2)).mul_(ctx.scale)
        if dy.dtype == grad_A.dtype:
            grad_A.baddbmm_(du.transpose(1, 2), x)
            grad_B.baddbmm_(u.transpose(1, 2), dy, alpha=ctx.scale)
        else:
            grad_A.add_(torch.bmm(du.transpose(1, 2), x))
            grad_B.add_(torch.bmm(u.transpose(1, 2), dy), alpha=ctx.scale)
        dx = torch.bmm(du, A) if ctx.needs_input_grad[1] else None
        return dy if ctx.needs_input_grad[0] else None, dx, None, None, None, None, None


class BankLinear(nn.Module):
    """A frozen linear layer plus the stacked updates of M adapters.

    y = W x + scale · B_j A_j dropout(x) for the rows of adapter j, where rows are adapter-major: with M
    adapters the leading dimension of x is M·b, the first b rows belonging to the first adapter.
    """

    def __init__(self, base: nn.Linear, stack: "_Stack", view: _View, dropout: float, salt: int):
        super().__init__()
        self.base = base
        self.stack = stack
        self.view = view
        self.dropout = dropout
        self.salt = salt

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        mode, stack = self.view.mode, self.stack
        if mode == "base":
            return y
        if mode == "pack":
            M = stack.A.shape[0]
            if x.shape[0] % M:
                raise ModelError(
                    f"an input with leading dimension {x.shape[0]} cannot be split among {M} adapters",
                    fix="give every adapter the same number of rows, adapter after adapter",
                )
            packed = self._drop(x).reshape(M, -1, x.shape[-1])
            updated = _PackedUpdate.apply(
                y.view(M, -1, y.shape[-1]), packed, stack.A, stack.B, stack.grad_A, stack.grad_B, stack.scale
            )
            return updated.view(y.shape)
        slots = [self.view.slot] if mode == "only" else self.view.members
        A = stack.A.detach()[slots].flatten(0, 1).to(x.dtype)  # [m·r, d_in]
        B = stack.B.detach()[slots].flatten(0, 1).to(x.dtype)
        hidden_Nr = x.reshape(-1, x.shape[-1]) @ A.T
        y.view(-1, y.shape[-1]).addmm_(hidden_Nr, B, alpha=stack.scale / max(1, len(slots)))
        return y

    def _drop(self, x: Tensor) -> Tensor:
        if not (self.dropout and self.training):
            return x
        keys = self.view.dropout_keys
        if keys is None or x.dim() != 3 or len(keys) != x.shape[0]:
            raise ModelError("dropout needs one key per row", fix="call bank.key_dropout(keys) before the forward pass")
        draws = rng.elementwise_uniform(keys, self.salt, x.shape[1], x.shape[2])
        return x * (draws >= self.dropout).to(x.dtype).div_(1 - self.dropout)


@dataclass
class _Stack:
    """One module's share of the bank's buffers."""

    A: Tensor  # [M, r, d_in]
    B: Tensor  # [M, r, d_out]
    grad_A: Tensor
    grad_B: Tensor
    scale: float


class AdapterBank:
    """M LoRA adapters on one frozen base model, trained or evaluated in one pass.

    Every target `nn.Linear` is replaced by a module that calls the base once on the whole pack and adds
    the adapters' updates by one batched matmul. All adapters' parameters are rows of one float32 buffer
    `weights` [M, P], with gradients in `gradients` [M, P]; the modules hold views. So an optimizer's
    parameter, a checkpoint and a gradient norm are each one row of the buffer.

    model: any torch model whose batch dimension comes first; its parameters must be frozen.
    targets: module names, matched by their last parts as in PEFT. rank, alpha: ΔW = (alpha / rank) B A.
    adapters: the ids of the adapters; an id, not a slot, keys an adapter's initialisation.
    dropout: probability of dropping an input of A while `model.training`.

    A starts uniform in ±1/sqrt(d_in) (PEFT's default) and B at zero. Raises ModelError for unmatched targets.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        targets: Sequence[str],
        rank: int,
        alpha: float,
        adapters: Sequence[int],
        seed: int = 0,
        dropout: float = 0.0,
    ):
        self._build(
            model, matching_linears(model, targets), rank, alpha / rank, list(adapters), dropout, trainable=True
        )
        with torch.no_grad():
            for path, module in self.modules.items():
                bound = 1 / math.sqrt(module.base.in_features)
                for slot, adapter in enumerate(self.adapters):
                    draws = rng.uniform((rank, module.base.in_features), rng.key(seed, adapter, "init", 0, path))
                    module.stack.A[slot].copy_((2 * draws - 1) * bound)

    @classmethod
    def from_adapters(cls, model: nn.Module, adapters: Sequence[Adapter]) -> "AdapterBank":
        """A bank that holds trained adapters, zero-padded to the largest rank, to be evaluated.

        It has no memory for gradients. Raises AdapterError for an adapter that does not fit the model.
        """
        linears = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}
        paths = [path for path in linears if any(path in a.modules for a in adapters)]
        for adapter in adapters:
            for path, factors in adapter.modules.items():
                shape = (factors.B.shape[0], factors.A.shape[1])
                found = (linears[path].out_features, linears[path].in_features) if path in linears else None
                if shape != found:
                    raise AdapterError(
                        f"the adapter updates '{path}' with shape {shape},"
                        f" the base model has {found or 'no such layer'}",
                        where=adapter.source,
                        fix="use the base model that the adapter was trained on",
                    )
        _refuse_head(model, {path: linears[path] for path in paths})
        rank = max(f.A.shape[0] for a in adapters for f in a.modules.values())
        bank = cls.__new__(cls)
        bank._build(model, {path: linears[path] for path in paths}, rank, 1.0, list(range(len(adapters))), 0.0, False)
        with torch.no_grad():
            for slot, adapter in enumerate(adapters):
                for path, factors in adapter.modules.items():
                    r = factors.A.shape[0]
                    bank.modules[path].stack.A[slot, :r].copy_(factors.A)
                    bank.modules[path].stack.B[slot, :r].copy_(factors.B.to(torch.float32).T * factors.scale)
        return bank

    def _build(
        self,
        model: nn.Module,
        linears: dict[str, nn.Linear],
        rank: int,
        scale: float,
        adapters: list[int],
        dropout: float,
        trainable: bool,
    ) -> None:
        M = len(adapters)
        self.model, self.adapters, self.rank, self.scale = model, adapters, rank, scale
        self.dropped: set[int] = set()
        self.view = _View(members=list(range(M)))
        P = sum(rank * (linear.in_features + linear.out_features) for linear in linears.values())
        device = next(iter(linears.values())).weight.device
        self.weights = torch.zeros(M, P, device=device)
        # Without gradients: one zero seen as a matrix, so that the views below exist and cost nothing.
        self.gradients = torch.zeros(M, P, device=device) if trainable else torch.zeros(1, 1).expand(M, P)
        self.rows = [nn.Parameter(self.weights[slot]) for slot in range(M)]
        self.modules: dict[str, BankLinear] = {}
        offset = 0
        for path, linear in linears.items():
            views: list[Tensor] = []
            for width in (linear.in_features, linear.out_features):
                part = slice(offset, offset + rank * width)
                offset += rank * width
                views += [buffer[:, part].unflatten(1, (rank, width)) for buffer in (self.weights, self.gradients)]
            A, grad_A, B, grad_B = views
            stack = _Stack(A.requires_grad_(trainable), B.requires_grad_(trainable), grad_A, grad_B, scale)
            module = BankLinear(linear, stack, self.view, dropout, rng.key(0, 0, "dropout-site", 0, path))
            module.train(linear.training)
            _replace(model, path, module)
            self.modules[path] = module
        if trainable:
            self.zero_grad()

    @property
    def size(self) -> int:
        """M, the number of adapters."""
        return len(self.adapters)

    @property
    def parameters_per_adapter(self) -> int:
        return self.weights.shape[1]

    def zero_grad(self) -> None:
        """Clear all gradients and hand each live adapter's row to the optimizer."""
        self.gradients.zero_()
        for slot, row in enumerate(self.rows):
            row.grad = None if slot in self.dropped else self.gradients[slot]

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Scale each adapter's gradient to a norm of at most `max_norm`; returns the norms before, [M]."""
        norms = self.gradients.norm(dim=1)
        self.gradients.mul_((max_norm / (norms + 1e-6)).clamp(max=1.0)[:, None])
        return norms

    def drop(self, slot: int) -> None:
        """Stop training the adapter in `slot` and leave it out of `merged()`; its weights become zero.

        It keeps its rows in the pack, so the shapes that the other adapters are computed in stay the same,
        and with them every bit of the others.
        """
        self.dropped.add(slot)
        self.view.members = [s for s in range(self.size) if s not in self.dropped]
        self.rows[slot].grad = None
        with torch.no_grad():
            self.weights[slot].zero_()

    def key_dropout(self, keys: Tensor | None) -> None:
        """Set the dropout keys (int64 [rows]) of the next forward pass; see `rng.elementwise_uniform`."""
        self.view.dropout_keys = keys

    @contextlib.contextmanager
    def only(self, slot: int) -> Iterator[None]:
        """Within the block every row goes through the adapter in `slot` alone."""
        with self._as("only", slot):
            yield

    @contextlib.contextmanager
    def merged(self) -> Iterator[None]:
        """Within the block every row goes through the average of the B A of all adapters not dropped."""
        with self._as("merged"):
            yield

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the block every row goes through the base model alone."""
        with self._as("base"):
            yield

    @contextlib.contextmanager
    def _as(self, mode: str, slot: int = 0) -> Iterator[None]:
        before = self.view.mode, self.view.slot
        self.view.mode, self.view.slot = mode, slot
        try:
            yield
        finally:
            self.view.mode, self.view.slot = before

    def adapter(self, slot: int, *, base_model: str | None = None, revision: str | None = None) -> Adapter:
        """A copy of the adapter in `slot`, on the CPU."""
        modules = {
            path: Factors(
                module.stack.A[slot].detach().clone().cpu(),
                module.stack.B[slot].detach().T.clone(memory_format=torch.contiguous_format).cpu(),
                self.scale,
            )
            for path, module in self.modules.items()
        }
        return Adapter(modules, base_model=base_model, revision=revision)

    def remove(self) -> None:
        """Give the model its own linear layers back."""
        for path, module in self.modules.items():
            _replace(self.model, path, module.base)


def matching_linears(model: nn.Module, targets: Sequence[str]) -> dict[str, nn.Linear]:
    """The linear layers whose paths end in one of `targets`. Raises ModelError where a target names none."""
    named = dict(model.named_modules())
    linears: dict[str, nn.Linear] = {}
    for path, module in named.items():
        if any(path == t or path.endswith(f".{t}") for t in targets):
            if not isinstance(module, nn.Linear):
                raise ModelError(
                    f"the target '{path}' is a {type(module).__name__}, not a linear layer", where="lora.targets"
                )
            linears[path] = module
    _refuse_head(model, linears)
    for target in targets:
        if not any(path == target or path.endswith(f".{target}") for path in linears):
            raise ModelError(
                f"the base model has no module named '{target}'",
                where="lora.targets",
                fix=f"its linear layers are: {', '.join(linear_names(model)) or 'none'}",
            )
    return linears


def _refuse_head(model: nn.Module, linears: dict[str, nn.Linear]) -> None:
    """The output head cannot be adapted: it is run only where logits are wanted, which packs its rows anew."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    for path, linear in linears.items():
        if linear is head:
            raise ModelError(f"'{path}' is the output head, which cannot be adapted", fix="leave it out of the targets")


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
