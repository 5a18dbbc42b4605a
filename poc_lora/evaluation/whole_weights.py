"""Evaluates adapters that no bank can hold, such as those with whole modules, in the model's own weights."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from poc_lora.adapters.adapter import Adapter
from poc_lora.errors import AdapterError
from poc_lora.lora.bank import AdapterBank
from poc_lora.models.names import names_in_model


def named_as_in(model: PreTrainedModel, adapter: Adapter) -> Adapter:
    """The adapter with its modules named as the model names them; see `names_in_model`. Raises AdapterError."""
    wanted = [f"{module}.weight" for module in adapter.modules] + list(adapter.modules_to_save)
    names = names_in_model(model, wanted)
    if all(name == found for name, found in names.items()):
        return adapter
    if len(set(names.values())) < len(set(wanted)):
        raise AdapterError("two of its modules are the same module of this base", where=adapter.source)
    modules = {names[f"{m}.weight"].removesuffix(".weight"): factors for m, factors in adapter.modules.items()}
    embeddings = frozenset(names[f"{m}.weight"].removesuffix(".weight") for m in adapter.embeddings)
    saved = {names[name]: tensor for name, tensor in adapter.modules_to_save.items()}
    return replace(
        adapter, modules=modules, embeddings=embeddings, modules_to_save=saved, targets=frozenset(), pattern=None
    )


def check_fits(model: PreTrainedModel, adapter: Adapter) -> None:
    """Raises AdapterError unless the adapter's updates have the shapes of weights of the model.

    An embedding or head that replaces the model's may have more or fewer rows. Updates of quantised linear layers are
    computed beside them; all other weights that the adapter changes must be floating-point.
    """
    adapter, _ = _split(model, adapter)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tables = {id(module) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    saved = {name: tuple(tensor.shape) for name, tensor in adapter.modules_to_save.items()}
    added = {f"{m}.weight": _shape(model, adapter, m) for m in adapter.modules}
    for name, shape in [*saved.items(), *added.items()]:
        found = parameters.get(name)
        known = None if found is None else tuple(found.shape)
        if known and name in saved and name in added and saved[name] != added[name]:
            what = f"{name} is of shape {saved[name]}, but its update of shape {added[name]}"
            raise AdapterError(what, where=adapter.source)
        if known and name in saved and id(model.get_submodule(name.rpartition(".")[0])) in tables:
            known, shape = known[1:], shape[1:]
        if found is not None and not found.is_floating_point():
            what = f"{name} is quantised, so it cannot be changed as a whole"
            raise AdapterError(what, where=adapter.source, fix="evaluate it on the unquantised base")
        if shape != known:
            what = f"the adapter updates {name} of shape {shape}, the base model has {known or 'no such weight'}"
            raise AdapterError(what, where=adapter.source, fix="use the base model that the adapter was trained on")


@contextlib.contextmanager
def in_weights(model: PreTrainedModel, adapters: Sequence[Adapter]) -> Iterator[None]:
    """Within the block the mean of the adapters' updates is added to the model's weights.

    An embedding or head that an adapter saves whole replaces only itself, as in PEFT, also where the two are tied. If
    the adapter has factors for it too, it replaces both, since PEFT loads it into the base's shared parameter.

    Raises:
        AdapterError: An adapter does not fit.
    """
    before: dict[str, nn.Parameter] = {}

    def put(name: str, tensor: Tensor) -> None:
        path, _, last = name.rpartition(".")
        module, old = model.get_submodule(path), model.get_parameter(name)
        before.setdefault(name, old)
        setattr(module, last, nn.Parameter(tensor.to(old.device, old.dtype), requires_grad=False))

    for adapter in adapters:
        check_fits(model, adapter)
    adapters, beside = (list(parts) for parts in zip(*(_split(model, adapter) for adapter in adapters), strict=True))
    bank = AdapterBank.from_adapters(model, beside) if any(adapter.modules for adapter in beside) else None
    try:
        for name, tensor in adapters[0].modules_to_save.items():
            shared = [name]
            if name.rpartition(".")[0] in adapters[0].modules:
                old = model.get_parameter(name)
                shared = [n for n, parameter in model.named_parameters(remove_duplicate=False) if parameter is old]
            for each in shared:
                put(each, tensor)
        for module in dict.fromkeys(module for adapter in adapters for module in adapter.modules):
            weight = model.get_parameter(f"{module}.weight")
            total = torch.zeros(weight.shape, device=weight.device)
            for adapter in adapters:
                if module in adapter.modules:
                    factors = adapter.modules[module]
                    B, A = (factor.to(weight.device, torch.float32) for factor in (factors.B, factors.A))
                    update = factors.scale / len(adapters) * (B @ A)
                    total += update.T if _transposed(model, adapter, module) else update
            put(f"{module}.weight", weight + total)
        with contextlib.nullcontext() if bank is None else bank.merged():
            yield
    finally:
        if bank is not None:
            bank.remove()
        for name, old in before.items():
            path, _, last = name.rpartition(".")
            setattr(model.get_submodule(path), last, old)


def _split(model: PreTrainedModel, adapter: Adapter) -> tuple[Adapter, Adapter]:
    """The adapter without its updates of quantised linear layers, and these alone."""
    layers = dict(model.named_modules())
    beside = {module: layers[module] for module in adapter.modules if module in layers}
    beside = {module: layer for module, layer in beside.items() if isinstance(layer, nn.Linear) and _is_packed(layer)}
    if not beside:
        return adapter, replace(adapter, modules={}, modules_to_save={})
    rest = {module: factors for module, factors in adapter.modules.items() if module not in beside}
    alone = {module: adapter.modules[module] for module in beside}
    return replace(adapter, modules=rest), replace(adapter, modules=alone, modules_to_save={})


def _is_packed(layer: nn.Linear) -> bool:
    return not layer.weight.is_floating_point() or layer.weight.shape != (layer.out_features, layer.in_features)


def _transposed(model: PreTrainedModel, adapter: Adapter, module: str) -> bool:
    return module in adapter.embeddings or isinstance(dict(model.named_modules()).get(module), Conv1D)


def _shape(model: PreTrainedModel, adapter: Adapter, module: str) -> tuple[int, ...]:
    d_out, d_in = adapter.shape(module)
    return (d_in, d_out) if _transposed(model, adapter, module) else (d_out, d_in)
