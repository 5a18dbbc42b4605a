"""Compile the memory-bound parts of a base model with torch.compile, for the length of a block."""

import contextlib
import functools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from poc_lora.errors import ConfigError, first_line
from poc_lora.fusion import compiled, fusing

ROTARY = "apply_rotary_pos_emb"  # transformers' name for it in every family that has it

# transformers' MLPs that compute down_proj(act_fn(gate_proj(x)) * up_proj(x)). Others clamp, scale or drop something.
GATED_MLPS = frozenset({
    "Cohere2MLP", "CohereMLP", "Gemma2MLP", "Gemma3MLP", "GemmaMLP", "GraniteMLP", "HeliumMLP", "LlamaMLP",
    "MinistralMLP", "MistralMLP", "Olmo2MLP", "Olmo3MLP", "OlmoMLP", "Qwen2MLP", "Qwen3MLP", "SmolLM3MLP",
    "StableLmMLP",
})  # fmt: skip


@contextlib.contextmanager
def compiled_parts(
    model: PreTrainedModel, compile: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None
) -> Iterator[None]:
    """Within the block, run the model's norms, rotary embedding and gated activations as one compiled kernel each.

    These parts are memory-bound, so compilation pays: each reads and writes its tensors once. They compile in seconds,
    where a whole decoder takes minutes. Matmuls and MLPs not in `GATED_MLPS` run as they are. Functions of this library
    marked `fusable` (dropout, cross-entropy) are compiled too.

    compile: Makes the kernels in place of torch.compile, such as `memory_of_kernel`; fusable functions then stay as
        they are.

    Raises:
        ConfigError: torch.compile does not work here.
    """
    with contextlib.ExitStack() as undo:
        if compile is None:
            require_compiler(model.device)
            undo.enter_context(fusing())
            compile = with_known_widths
        # One compiled function for all layers of a kind: torch.compile gives up on a function recompiled too often.
        kernels: dict[Any, Callable[..., Any]] = {}
        module: Any
        for module in model.modules():
            kind = type(module)
            if kind.__name__.endswith("Norm") and not list(module.children()):
                forward = kernels.setdefault(kind, compile(kind.forward))
                _patch(undo, module, types.MethodType(forward, module))
            elif is_gated_mlp(module):
                key = kind, type(module.act_fn)
                _patch(undo, module, _gated_forward(module, kernels.setdefault(key, compile(_gated(module.act_fn)))))
        for name in {type(module).__module__ for module in model.modules()}:
            library = sys.modules[name]
            if hasattr(library, ROTARY):
                original = getattr(library, ROTARY)
                setattr(library, ROTARY, compile(original))
                undo.callback(setattr, library, ROTARY, original)
        yield


def with_known_widths(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled for any number of rows and tokens, which change, but for the widths at hand, which do not.

    Kernels that know widths and strides read wide. On an H200, training of an 8B shape took 7 % less time where
    torch.compile had found out the widths by itself, with twice as many compilations.
    """
    kernel = compiled(function)
    tokens = 2 if function.__name__ == ROTARY else 1  # which dimension; the rotary embedding's come after the heads

    @functools.wraps(function)
    def run(*args: Any, **named: Any) -> Any:
        for x in args:
            if isinstance(x, Tensor):
                varying = (0, tokens if x.dim() == 4 else 1)
                for dim in {*range(x.dim())} - {*varying} | {x.dim() - 1}:
                    torch._dynamo.mark_static(x, dim)
        return kernel(*args, **named)

    return run


def memory_of_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with what a compiled one keeps for the gradient: its inputs, from which all else is computed again.

    For tensors that have shapes but no data: its gradients have no values.
    """

    def run(*args: Any, **named: Any) -> Any:
        return _Kernel.apply(functools.partial(function, **named), *args)  # type: ignore[no-untyped-call]

    return run


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Any], *args: Any) -> Any:
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in args))
        return function(*args)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        needed = zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
        return None, *(torch.empty_like(x) if wanted else None for x, wanted in needed)


def is_gated_mlp(module: Any) -> bool:
    """Whether a module is one of transformers' `GATED_MLPS`, with an activation that has no parameters of its own."""
    kind = type(module)
    known = kind.__name__ in GATED_MLPS and kind.__module__.startswith("transformers.models.")
    return known and not list(module.act_fn.parameters())


def compiles(setting: bool | Literal["auto"], device: torch.device) -> bool:
    """What `train.compile` comes to on `device`: `auto` is true on a GPU for which torch.compile works.

    Raises:
        ConfigError: It is true, and torch.compile does not work.
    """
    if setting == "auto":
        return device.type == "cuda" and not why_not_compiled(setting, device)
    if setting:
        require_compiler(device)
    return setting


def why_not_compiled(setting: bool | Literal["auto"], device: torch.device) -> str:
    """Why `auto` comes to false on a GPU, in a line; empty where it does not, and for other settings and devices."""
    return compiler_problem(device) if setting == "auto" and device.type == "cuda" else ""


@functools.cache
def compiler_problem(device: torch.device) -> str:
    """Why torch.compile does not work on `device`, in a line; empty if it works."""
    try:
        compiled(lambda x: x * 2 + 1)(torch.ones(4, device=device))
    except Exception as problem:  # inductor raises many kinds
        return first_line(problem)
    return ""


def require_compiler(device: torch.device, *, where: str = "train.compile") -> None:
    """Raises ConfigError, which names the key `where`, if torch.compile does not work on `device`."""
    if problem := compiler_problem(device):
        raise ConfigError(
            f"torch.compile does not work here: {problem}",
            where=where,
            fix="install a C++ compiler such as g++ (on a GPU, triton too), or leave that key out",
        )


def _gated(act_fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def gated(gate: Tensor, up: Tensor) -> Tensor:
        return act_fn(gate) * up

    return gated


def _gated_forward(module: Any, gated: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        down: Tensor = module.down_proj(gated(module.gate_proj(x), module.up_proj(x)))
        return down

    return forward


def _patch(undo: contextlib.ExitStack, module: nn.Module, forward: Callable[..., Any]) -> None:
    module.forward = forward
    undo.callback(delattr, module, "forward")
