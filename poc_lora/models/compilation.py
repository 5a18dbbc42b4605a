"""Ways to run the base model with less memory or time, put in place for the length of a block and undone after it."""

import contextlib
import functools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from poc_lora import rng
from poc_lora.errors import ConfigError

ROTARY = "apply_rotary_pos_emb"  # what transformers calls it in every family that has it
Product = Callable[[Tensor, Tensor], Tensor]  # act_fn(gate) * up


@contextlib.contextmanager
def compiled_parts(model: PreTrainedModel) -> Iterator[None]:
    """Within the block norms, rotary embedding and gated activations of the model run as one compiled kernel each.

    They are the memory-bound parts, where compilation pays: each reads and writes its tensors once. They take seconds
    to compile; a whole decoder takes minutes. The bank's modules and the matmuls stay as they are. Raises ConfigError
    where torch.compile has no compiler to use.
    """
    require_compiler(model.device)
    with contextlib.ExitStack() as undo:
        # One compiled function for all layers of a kind: torch.compile gives up on one that it meets too often anew.
        forwards: dict[type, Callable[..., Any]] = {}
        products: dict[type, tuple[Product, Product]] = {}
        for module in model.modules():
            if type(module).__name__.endswith("Norm") and not list(module.children()):
                forward = forwards.setdefault(type(module), _compiled(type(module).forward))
                _patch(undo, module, "forward", types.MethodType(forward, module))
            elif hasattr(module, "act_fn") and all(
                isinstance(getattr(module, name, None), nn.Linear) for name in ("gate_proj", "up_proj", "down_proj")
            ):
                _patch_gated(undo, module, model.dtype, products)
        for name in {type(module).__module__ for module in model.modules()}:
            library = sys.modules[name]
            if hasattr(library, ROTARY):
                original = getattr(library, ROTARY)
                setattr(library, ROTARY, _compiled(original))
                undo.callback(setattr, library, ROTARY, original)
        yield


def require_compiler(device: torch.device) -> None:
    """Raises ConfigError where torch.compile does not work."""
    try:
        _compiled(lambda x: x * 2 + 1)(torch.ones(4, device=device))
    except Exception as problem:  # inductor raises many kinds
        raise ConfigError(
            f"torch.compile does not work here: {str(problem).strip().splitlines()[0]}",
            where="train.compile",
            fix="install a C++ compiler such as g++ (on a GPU, triton too), or set it to false",
        ) from problem


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


def _patch(undo: contextlib.ExitStack, module: nn.Module, name: str, value: Any) -> None:
    setattr(module, name, value)
    undo.callback(delattr, module, name)


def _patch_gated(
    undo: contextlib.ExitStack, module: Any, dtype: torch.dtype, products: dict[type, tuple[Product, Product]]
) -> None:
    """Compile `act_fn(gate) * up` where that is what the module computes: found out on numbers.

    On numbers small and large, since some families cut off large ones.
    """
    act = module.act_fn

    def gated(gate: Tensor, up: Tensor) -> Tensor:
        return act(gate) * up

    def forward(x: Tensor, product: Product) -> Tensor:
        return module.down_proj(product(module.gate_proj(x), module.up_proj(x)))

    plain, compiled = products.setdefault(type(act), (gated, _compiled(gated)))
    scales = 10.0 ** torch.arange(-2, 5)
    x = rng.normal((1, len(scales), module.gate_proj.in_features), rng.key(0, 0, "compile probe"))
    x = (x * scales[:, None]).to(module.gate_proj.weight.device, dtype)
    try:
        with torch.no_grad():
            same = torch.allclose(module(x), forward(x, plain), rtol=0, atol=0, equal_nan=True)
    except Exception:  # a module that wants other inputs, or returns something else
        return
    if same:
        _patch(undo, module, "forward", functools.partial(forward, product=compiled))
