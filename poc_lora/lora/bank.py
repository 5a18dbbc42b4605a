"""M adapters on one frozen base model, trained or evaluated in one forward pass."""

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from poc_lora import rng
from poc_lora.adapters.adapter import Adapter
from poc_lora.adapters.factors import Factors
from poc_lora.config import ALL_LINEAR, Targets
from poc_lora.errors import AdapterError, ModelError
from poc_lora.lora.layer import BankLinear, FactorBuffers, ForwardState
from poc_lora.lora.shared_input import Scales
from poc_lora.models.load import keep_differentiable, linear_names


class AdapterBank:
    """M LoRA adapters on one frozen base model, trained or evaluated in one forward pass.

    Every target `nn.Linear` is replaced by a module that calls the base layer once for all adapters and adds their
    updates by one batched matmul. The adapters' parameters are the rows of one float32 buffer `weights` [M, P], with
    gradients in `gradients` [M, P]; modules hold torch views of both. So the optimizer's parameter, the checkpoint and
    the gradient norm of an adapter are each one row.

    A forward pass is packed by default: its batch has M·b rows, the first b for the first adapter. Within the blocks
    `only`, `merged` and `disabled` all rows of the batch pass through one model instead: one adapter, the average of
    the adapters, or the base model alone.

    A is initialised uniformly in ±1/sqrt(d_in), PEFT's default, and B with zeros.

    Args:
        model: A frozen torch model whose first dimension is the batch. Linear layers may be bitsandbytes' 4-bit or
            8-bit ones.
        targets: Module names, matched by the last parts of paths as in PEFT, or `all-linear`; see `resolve_targets`.
        rank: The rank r of every module.
        alpha: LoRA's alpha, or one for each adapter: ΔW = (alpha / rank) B A.
        adapters: The adapters' ids. An id, not the slot, keys an adapter's initialisation.
        seed: The run's seed, the other part of that key.
        dropout: Probability of dropping an input of A in training mode.

    Raises:
        ModelError: A target matches no linear layer or one that cannot be adapted; in a packed forward pass, an input
            is not made of the rows that the model was called with.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        targets: Targets,
        rank: int,
        alpha: float | Sequence[float],
        adapters: Sequence[int],
        seed: int = 0,
        dropout: float = 0.0,
    ):
        names = resolve_targets(model, targets)
        alphas = [alpha] * len(adapters) if isinstance(alpha, int | float) else alpha
        scales = [alpha / rank for alpha in alphas]
        self._build(model, matching_linears(model, names), rank, scales, list(adapters), dropout, names)
        with torch.no_grad():
            for path, module in self.modules.items():
                bound = 1 / math.sqrt(module.base.in_features)
                for slot, adapter in enumerate(self.adapters):
                    draws = rng.uniform((rank, module.base.in_features), rng.key(seed, adapter, "init", 0, path))
                    module.factors.A[slot].copy_((2 * draws - 1) * bound)

    @classmethod
    def blank(
        cls, model: nn.Module, *, targets: Targets, rank: int, adapters: Sequence[int], dropout: float = 0.0
    ) -> "AdapterBank":
        """Returns a trainable bank with weights of zero and scale 1, for its shapes or to load a checkpoint into."""
        bank, names = cls.__new__(cls), resolve_targets(model, targets)
        ones = [1.0] * len(adapters)
        bank._build(model, matching_linears(model, names), rank, ones, list(adapters), dropout, names)
        return bank

    @classmethod
    def from_adapters(cls, model: nn.Module, adapters: Sequence[Adapter]) -> "AdapterBank":
        """Returns a bank of trained adapters for evaluation, without gradients.

        Smaller ranks are padded with zeros to the largest.

        Raises:
            AdapterError: An adapter does not fit the model, or has modules_to_save.
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
        M, ones = len(adapters), [1.0] * len(adapters)
        bank._build(model, {path: linears[path] for path in paths}, rank, ones, list(range(M)), 0.0, None)
        with torch.no_grad():
            for slot, adapter in enumerate(adapters):
                for path, factors in adapter.modules.items():
                    r = factors.A.shape[0]
                    bank.modules[path].factors.A[slot, :r].copy_(factors.A)
                    bank.modules[path].factors.B[slot, :r].copy_(factors.B.to(torch.float32).T * factors.scale)
        return bank

    def _build(
        self,
        model: nn.Module,
        linears: dict[str, nn.Linear],
        rank: int,
        scales: list[float],
        adapters: list[int],
        dropout: float,
        targets: Sequence[str] | None,
    ) -> None:
        """targets: what the linear layers were found by; None for a bank that is not trained."""
        trainable = targets is not None
        M = len(adapters)
        if M > 1:
            _refuse_outlier_columns(model)
        self.model, self.adapters, self.rank, self.scales = model, adapters, rank, Scales(scales)
        self.targets = frozenset(targets or ())
        self.dropped: set[int] = set()
        self.state = ForwardState(members=list(range(M)))
        P = count_parameters(linears.values(), rank)
        device = next(iter(linears.values())).weight.device
        self.weights = torch.zeros(M, P, device=device)
        # Not trainable: a single zero expanded to a matrix, so that the views below cost no memory.
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
            factors = FactorBuffers(
                A.requires_grad_(trainable), B.requires_grad_(trainable), grad_A, grad_B, self.scales
            )
            module = BankLinear(linear, factors, self.state, dropout, rng.key(0, 0, "dropout-site", 0, path))
            module.train(linear.training)
            _replace(model, path, module)
            self.modules[path] = module
        keep_differentiable(model)
        self._hooks = [
            model.register_forward_pre_hook(self._count_rows, with_kwargs=True),
            model.register_forward_hook(self._forget_rows, always_call=True),
        ]
        for path in sorted({path.rpartition(".")[0] for path in linears}):  # the modules whose layers share an input
            parent = model.get_submodule(path)
            self._hooks.append(parent.register_forward_hook(self._forget_shared_input, always_call=True))
        if trainable:
            self.zero_grad()

    def _count_rows(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record how many rows the model is called with; its modules check their inputs against it."""
        self.state.read.clear()
        self.state.called.clear()
        main = kwargs.get(getattr(self.model, "main_input_name", ""))
        tensors = [x for x in (main, *args, *kwargs.values()) if isinstance(x, Tensor)]
        self.state.rows = next((len(x) for x in tensors if x.dim() > 1), None)
        if self.state.mode == "packed" and self.state.rows is not None and self.state.rows % self.size:
            raise ModelError(
                f"{self.state.rows} rows cannot be split among {self.size} adapters",
                fix="give every adapter the same number of rows, adapter after adapter",
            )

    def _forget_rows(self, *_: Any) -> None:
        """Layers recomputed in the backward pass may belong to an earlier call, with another number of rows."""
        self.state.rows = None
        skipped = self.state.read - self.state.called
        if skipped and self.state.mode != "base":
            path = next(path for path, module in self.modules.items() if module in skipped)
            raise ModelError(
                f"the model multiplies by the weight of '{path}' without calling that layer, so its update is skipped",
                where="lora.targets",
                fix=f"leave {path.rpartition('.')[2]} out of the targets",
            )

    def _forget_shared_input(self, *_: Any) -> None:
        self.state.shared.forget()

    @property
    def size(self) -> int:
        """M, the number of adapters."""
        return len(self.adapters)

    @property
    def parameters_per_adapter(self) -> int:
        """P, the number of one adapter's parameters."""
        return self.weights.shape[1]

    def zero_grad(self) -> None:
        """Zero all gradients, and set each row's `grad`; that of a dropped adapter is None, so it gets no update."""
        self.gradients.zero_()
        for slot, row in enumerate(self.rows):
            row.grad = None if slot in self.dropped else self.gradients[slot]

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Clip each adapter's gradient to the L2 norm `max_norm`. Returns the norms before clipping, [M]."""
        norms: Tensor = self.gradients.norm(dim=1)
        self.gradients.mul_((max_norm / (norms + 1e-6)).clamp(max=1.0)[:, None])
        return norms

    def drop(self, slot: int) -> None:
        """Stop training the adapter in `slot`, set its weights to zero, and leave it out of `merged()`.

        It keeps its rows in the pack, so that shapes, and with them the other adapters' bits, stay the same.
        """
        self.dropped.add(slot)
        self.state.members = [s for s in range(self.size) if s not in self.dropped]
        self.rows[slot].grad = None
        with torch.no_grad():
            self.weights[slot].zero_()

    def key_dropout(self, keys: Tensor | None) -> None:
        """Set the dropout keys, int64 [rows], of the next forward passes; see `rng.elementwise_uniform`."""
        self.state.dropout_keys = keys

    @contextlib.contextmanager
    def only(self, slot: int) -> Iterator[None]:
        """Within the block, apply the adapter in `slot` to every row."""
        with self._mode("single", slot):
            yield

    @contextlib.contextmanager
    def merged(self, slots: Sequence[int] | None = None) -> Iterator[None]:
        """Within the block, apply the average of the adapters' B A to every row.

        Args:
            slots: The adapters to average; by default all that were not dropped.
        """
        members = self.state.members
        self.state.members = members if slots is None else list(slots)
        try:
            with self._mode("merged"):
                yield
        finally:
            self.state.members = members

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the block, run the base model alone."""
        with self._mode("base"):
            yield

    @contextlib.contextmanager
    def _mode(self, mode: Literal["single", "merged", "base"], slot: int = 0) -> Iterator[None]:
        before = self.state.mode, self.state.slot
        self.state.mode, self.state.slot = mode, slot
        try:
            yield
        finally:
            self.state.mode, self.state.slot = before

    def adapter(
        self, slot: int, *, base_model: str | None = None, revision: str | None = None, task_type: str | None = None
    ) -> Adapter:
        """Returns a copy of the adapter in `slot`, on the CPU; see `Adapter` for the other arguments."""
        modules = {
            path: Factors(
                module.factors.A[slot].detach().clone().cpu(),
                module.factors.B[slot].detach().T.clone(memory_format=torch.contiguous_format).cpu(),
                self.scales.values[slot],
            )
            for path, module in self.modules.items()
        }
        return Adapter(modules, base_model=base_model, revision=revision, task_type=task_type, targets=self.targets)

    def remove(self) -> None:
        """Restore the model's own linear layers."""
        for hook in self._hooks:
            hook.remove()
        for path, module in self.modules.items():
            _replace(self.model, path, module.base)


def count_parameters(linears: Iterable[nn.Linear], rank: int) -> int:
    """Returns P, the number of parameters of one adapter of these layers."""
    return sum(rank * (linear.in_features + linear.out_features) for linear in linears)


def resolve_targets(model: nn.Module, targets: Targets) -> tuple[str, ...]:
    """Returns the module names that `targets` stands for.

    `all-linear` is every linear layer but the output head, as in PEFT, and but routed experts: by the last part of its
    path where no other module has that name, else by the whole path.

    Raises:
        ModelError: The model has no such layer.
    """
    if targets != ALL_LINEAR:
        return tuple(targets)
    named = dict(model.named_modules())
    linears = {path for path, m in named.items() if isinstance(m, nn.Linear) and not _why_regrouped(model, path, m)}
    if not linears:
        raise ModelError(
            "the base model has no linear layer that can be adapted", where="lora.targets", fix="choose another base"
        )
    others = {path.rpartition(".")[2] for path in named.keys() - linears}
    return tuple(sorted({path if (last := path.rpartition(".")[2]) in others else last for path in linears}))


def matching_linears(model: nn.Module, targets: Targets) -> dict[str, nn.Linear]:
    """Returns the linear layers whose paths end in one of `targets`, by path; see `resolve_targets`.

    Raises:
        ModelError: A target matches no linear layer, or one that cannot be adapted.
    """
    targets, named = resolve_targets(model, targets), dict(model.named_modules())
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
    """Refuse modules whose input is not the pack's rows in order, so that a row's adapter is not known."""
    for path, linear in linears.items():
        if what := _why_regrouped(model, path, linear):
            raise ModelError(f"'{path}' is {what}, which cannot be adapted", fix="leave it out of the targets")


def _why_regrouped(model: nn.Module, path: str, linear: nn.Linear) -> str | None:
    """The output head runs only at some positions; an expert gets only the tokens that are routed to it."""
    if isinstance(model, PreTrainedModel) and linear is model.get_output_embeddings():
        return "the output head"
    return "a routed expert" if "experts" in path.split(".") else None


def _refuse_outlier_columns(model: nn.Module) -> None:
    """Refuse int8 layers that choose float columns over all rows, which would make adapters depend on each other."""
    for path, module in model.named_modules():
        if getattr(getattr(module, "state", None), "threshold", 0.0):
            raise ModelError(
                f"'{path}' is an int8 layer that picks outlier columns over all adapters' rows",
                fix="load the base model with BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)",
            )


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
