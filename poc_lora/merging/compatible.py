"""Checks whether adapters can be merged, and with which weights."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from poc_lora.adapters.adapter import Adapter
from poc_lora.errors import AdapterError, RequestError
from poc_lora.hub_ids import is_base_model_id

SAME_BASE = "merge only adapters of one base model"


def check_compatible(
    adapters: Sequence[Adapter], *, allow_base_mismatch: bool = False, modules_to_save: str = "same"
) -> None:
    """Check that adapters can be merged: same base model, same shapes, equal parameters of modules_to_save.

    Factors are not read.

    Args:
        adapters: The adapters.
        allow_base_mismatch: Do not compare the names of base models. Only names that are Hub ids are compared, since
            two folders may hold the same model.
        modules_to_save: `same`: these parameters must be equal. `mean`: only their shapes must be.

    Raises:
        RequestError: There are no adapters.
        AdapterError: Two adapters do not fit together.
    """
    if not adapters:
        raise RequestError("there are no adapters to merge", fix="give at least one")
    if not allow_base_mismatch:
        _check_bases(adapters)
    first_with: dict[str, Adapter] = {}
    for adapter in adapters:
        if not adapter.modules:
            raise AdapterError("the adapter has no modules", where=adapter.source)
        for name in adapter.modules:
            other = first_with.setdefault(name, adapter)
            shape, known = adapter.shape(name), other.shape(name)
            if shape != known:
                what = f"{name} is {_size(shape)} here, but {_size(known)} in {other.source}"
                raise AdapterError(what, where=adapter.source, fix=SAME_BASE)
            if (name in adapter.embeddings) != (name in other.embeddings):
                what = f"{name} is an embedding here or in {other.source}, but not in both"
                raise AdapterError(what, where=adapter.source, fix=SAME_BASE)
    _check_modules_to_save(adapters, same=modules_to_save == "same")


def checked_weights(weights: Sequence[float] | None, M: int) -> tuple[float, ...]:
    """Returns the weights, by default 1/M each. Raises RequestError unless they are M numbers that sum to 1."""
    if weights is None:
        return (1 / M,) * M
    if len(weights) != M:
        raise RequestError(f"{len(weights)} weights for {M} adapters", where="weights", fix="give one weight each")
    if not all(math.isfinite(weight) for weight in weights):
        raise RequestError("a weight is not a finite number", where="weights")
    total = math.fsum(weights)
    if abs(total - 1) > 1e-6:
        raise RequestError(
            f"the weights sum to {total:g}", where="weights", fix="divide each by that sum, so that they sum to 1"
        )
    return tuple(float(weight) for weight in weights)


def _check_modules_to_save(adapters: Sequence[Adapter], *, same: bool) -> None:
    """Parameters of modules_to_save must be the same in all, or of the same shapes if they are averaged."""
    first = adapters[0]
    for adapter in adapters[1:]:
        for name in sorted(adapter.modules_to_save.keys() | first.modules_to_save.keys()):
            one, other = adapter.modules_to_save.get(name), first.modules_to_save.get(name)
            if one is None or other is None:
                has, lacks = (first, adapter) if one is None else (adapter, first)
                fix = "merge adapters that all have it, or, if it is the base's own, save them without it"
                fix += " (save_embedding_layers=False)"
                raise AdapterError(f"{name} is saved whole in {has.source}, but not here", where=lacks.source, fix=fix)
            if same and not same_parameter(one, other):
                fix = "merge adapters that share it unchanged, or train without modules_to_save"
                if one.shape == other.shape:
                    fix = "average it (--modules-to-save mean); a classifier's labels must stand in the same order"
                what = f"{name}, saved whole, is not the same in {first.source}"
                raise AdapterError(what, where=adapter.source, fix=fix)
            if one.shape != other.shape:
                what = f"{name}, saved whole, is not of the same shape in {first.source}"
                raise AdapterError(what, where=adapter.source, fix=SAME_BASE)


def same_parameter(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two parameters of modules_to_save are equal, up to their dtypes; False if one of them is missing."""
    if one is None or other is None:
        return False
    wider = torch.promote_types(one.dtype, other.dtype)
    return one.shape == other.shape and torch.equal(one.to(wider), other.to(wider))


def _size(shape: tuple[int, int]) -> str:
    return "×".join(map(str, shape))


def _check_bases(adapters: Sequence[Adapter]) -> None:
    """Compare base models by name if both are Hub ids; two different paths may hold the same model."""
    named = [a for a in adapters if a.base_model and is_base_model_id(a.base_model)]
    for adapter in named[1:]:
        if adapter.base_model != named[0].base_model:
            raise AdapterError(
                f"the base model is {adapter.base_model}, but {named[0].source} has {named[0].base_model}",
                where=adapter.source,
                fix="merge adapters of one base model; if both names mean the same weights, allow the mismatch "
                "(--allow-base-mismatch)",
            )
