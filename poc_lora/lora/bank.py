"""M adapters stacked on one frozen base model, so that one forward pass serves them all."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from poc_lora import rng
from poc_lora.adapters.adapter import Adapter
from poc_lora.adapters.factors import Factors
from poc_lora.errors import AdapterError, ModelError
from poc_lora.lora.layer import BankLinear, Stack, View
from poc_lora.models.load import keep_differentiable, linear_names


class AdapterBank:
    """M LoRA adapters on one frozen base model, trained or evaluated in one pass.

    Every target `nn.Linear` is replaced by a module that calls the base once on the whole pack and adds
    the adapters' updates by one batched matmul. All adapters' parameters are rows of one float32 buffer
    `weights` [M, P], with gradients in `gradients` [M, P]; the modules hold views. So an optimizer's
    parameter, a checkpoint and a gradient norm are each one row of the buffer.

    model: any torch model whose batch dimension comes first, frozen; its linear layers may be bitsandbytes' 4-bit
    and 8-bit ones. Packed, it is called with M·b rows, the first b of them the first adapter's.
    targets: module names, matched by their last parts as in PEFT. rank, alpha: ΔW = (alpha / rank) B A.
    adapters: the ids of the adapters; an id, not a slot, keys an adapter's initialisation.
    dropout: probability of dropping an input of A while `model.training`.

    A starts uniform in ±1/sqrt(d_in) (PEFT's default) and B at zero. Raises ModelError for unmatched targets, and in
    a packed pass for an input that is not made of the rows that the model was called with.
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
        self._build(model, matching_linears(model, targets), rank, alpha / rank, list(adapters), dropout, targets)
        with torch.no_grad():
            for path, module in self.modules.items():
                bound = 1 / math.sqrt(module.base.in_features)
                for slot, adapter in enumerate(self.adapters):
                    draws = rng.uniform((rank, module.base.in_features), rng.key(seed, adapter, "init", 0, path))
                    module.stack.A[slot].copy_((2 * draws - 1) * bound)

    @classmethod
    def blank(
        cls, model: nn.Module, *, targets: Sequence[str], rank: int, adapters: Sequence[int], dropout: float = 0.0
    ) -> "AdapterBank":
        """A trainable bank whose weights are all zero: for its shapes, or to be filled from a checkpoint."""
        bank = cls.__new__(cls)
        bank._build(model, matching_linears(model, targets), rank, 1.0, list(adapters), dropout, targets)
        return bank

    @classmethod
    def from_adapters(cls, model: nn.Module, adapters: Sequence[Adapter]) -> "AdapterBank":
        """A bank that holds trained adapters, zero-padded to the largest rank, to be evaluated.

        It has no memory for gradients. Raises AdapterError for an adapter that does not fit the model.
        """
        linears = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}
        paths = [path for path in linears if any(path in a.modules for a in adapters)]
        for adapter in adapters:
            if adapter.modules_to_save:
                raise AdapterError(
                    f"the adapter replaces {min(adapter.modules_to_save)} (modules_to_save), which cannot be packed",
                    where=adapter.source,
                    fix="fold it into its base first: poc-lora fold ADAPTER --base BASE --out DIR",
                )
            for path in adapter.modules:
                shape = adapter.shape(path)
                found = (linears[path].out_features, linears[path].in_features) if path in linears else None
                if shape != found:
                    raise AdapterError(
                        f"the adapter updates '{path}' with shape {shape},"
                        f" the base model has {found or 'no such layer'}",
                        where=adapter.source,
                        fix="use the base model that the adapter was trained on",
                    )
        _refuse_regrouped(model, {path: linears[path] for path in paths})
        rank = max(f.A.shape[0] for a in adapters for f in a.modules.values())
        bank = cls.__new__(cls)
        bank._build(model, {path: linears[path] for path in paths}, rank, 1.0, list(range(len(adapters))), 0.0, None)
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
        targets: Sequence[str] | None,
    ) -> None:
        """targets: what the linear layers were found by; None for a bank that is not trained."""
        trainable = targets is not None
        M = len(adapters)
        if M > 1:
            _refuse_outlier_columns(model)
        self.model, self.adapters, self.rank, self.scale = model, adapters, rank, scale
        self.targets = frozenset(targets or ())
        self.dropped: set[int] = set()
        self.view = View(members=list(range(M)))
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
            stack = Stack(A.requires_grad_(trainable), B.requires_grad_(trainable), grad_A, grad_B, scale)
            module = BankLinear(linear, stack, self.view, dropout, rng.key(0, 0, "dropout-site", 0, path))
            module.train(linear.training)
            _replace(model, path, module)
            self.modules[path] = module
        keep_differentiable(model)
        self._hooks = [
            model.register_forward_pre_hook(self._count_rows, with_kwargs=True),
            model.register_forward_hook(self._forget_rows, always_call=True),
        ]
        if trainable:
            self.zero_grad()

    def _count_rows(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note how many rows the model is called with, by which its modules' inputs are judged."""
        main = kwargs.get(getattr(self.model, "main_input_name", ""))
        tensors = [x for x in (main, *args, *kwargs.values()) if isinstance(x, Tensor)]
        self.view.rows = next((len(x) for x in tensors if x.dim() > 1), None)
        if self.view.mode == "pack" and self.view.rows is not None and self.view.rows % self.size:
            raise ModelError(
                f"{self.view.rows} rows cannot be split among {self.size} adapters",
                fix="give every adapter the same number of rows, adapter after adapter",
            )

    def _forget_rows(self, *_: Any) -> None:
        """A layer that is run again in the backward pass may belong to an earlier call, with other rows."""
        self.view.rows = None

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
    def merged(self, slots: Sequence[int] | None = None) -> Iterator[None]:
        """Within the block every row goes through the average of the B A of all adapters not dropped, or of `slots`."""
        members = self.view.members
        self.view.members = members if slots is None else list(slots)
        try:
            with self._as("merged"):
                yield
        finally:
            self.view.members = members

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

    def adapter(
        self, slot: int, *, base_model: str | None = None, revision: str | None = None, task_type: str | None = None
    ) -> Adapter:
        """A copy of the adapter in `slot`, on the CPU. task_type: PEFT's, such as CAUSAL_LM; None fits any model."""
        modules = {
            path: Factors(
                module.stack.A[slot].detach().clone().cpu(),
                module.stack.B[slot].detach().T.clone(memory_format=torch.contiguous_format).cpu(),
                self.scale,
            )
            for path, module in self.modules.items()
        }
        return Adapter(modules, base_model=base_model, revision=revision, task_type=task_type, targets=self.targets)

    def remove(self) -> None:
        """Give the model its own linear layers back."""
        for hook in self._hooks:
            hook.remove()
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
    _refuse_regrouped(model, linears)
    for target in targets:
        if not any(path == target or path.endswith(f".{target}") for path in linears):
            raise ModelError(
                f"the base model has no module named '{target}'",
                where="lora.targets",
                fix=f"its linear layers are: {', '.join(linear_names(model)) or 'none'}",
            )
    return linears


def _refuse_regrouped(model: nn.Module, linears: dict[str, nn.Linear]) -> None:
    """Modules whose input is not the pack's rows in their order cannot be told which adapter a row belongs to.

    The output head is run only where logits are wanted; an expert sees the tokens that are routed to it.
    """
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    for path, linear in linears.items():
        what = "the output head" if linear is head else "a routed expert" if "experts" in path.split(".") else None
        if what:
            raise ModelError(f"'{path}' is {what}, which cannot be adapted", fix="leave it out of the targets")


def _refuse_outlier_columns(model: nn.Module) -> None:
    """An int8 layer that keeps some columns in float chooses them over all rows, which would tie adapters together."""
    for path, module in model.named_modules():
        if getattr(getattr(module, "state", None), "threshold", 0.0):
            raise ModelError(
                f"'{path}' is an int8 layer that picks outlier columns over all adapters' rows",
                fix="load the base model with BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)",
            )


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
