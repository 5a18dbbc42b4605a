"""Drops the untrained embedding tables of the base model that PEFT may save beside an adapter."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from poc_lora.adapters.adapter import Adapter
from poc_lora.errors import ModelError
from poc_lora.files import open_safetensors
from poc_lora.lora.peft_targets import base_at_hand
from poc_lora.merging.compatible import same_parameter
from poc_lora.merging.fold import weight_files
from poc_lora.models.load import empty_base
from poc_lora.models.names import names_in_model


def drop_unchanged_tables(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Drop parameters of modules_to_save that are equal to the base's, where the adapters do not all have the same.

    Nothing is dropped if the base's weights are not on this machine.
    """
    names = {name for adapter in adapters for name in adapter.modules_to_save}
    odd = {
        name
        for name in names
        if not all(same_parameter(adapters[0].modules_to_save.get(name), a.modules_to_save.get(name)) for a in adapters)
    }
    return [_without(adapter, odd & adapter.modules_to_save.keys()) for adapter in adapters] if odd else list(adapters)


def _without(adapter: Adapter, names: set[str]) -> Adapter:
    folder = base_at_hand(adapter) if names else None
    if folder is None:
        return adapter
    try:
        own = _parameters(folder, names)
    except ModelError:  # only its configuration is here
        return adapter
    saved = adapter.modules_to_save
    kept = [n for n in saved if n not in own or own[n].shape != saved[n].shape or not _equal(own[n], saved[n])]
    return replace(adapter, modules_to_save={name: saved[name] for name in kept})


def _equal(base: Tensor, saved: Tensor) -> bool:
    return torch.equal(base.to(saved.dtype), saved)  # a base that was loaded in another dtype was saved in that


def _parameters(folder: Path, names: set[str]) -> dict[str, Tensor]:
    """The parameters of a base model that its files have, by their names in the adapter; a tied head is its table."""
    model = empty_base(str(folder))
    files = {key: file for file, keys in weight_files(folder).items() for key in keys}
    in_model = names_in_model(model, [*files, *names])
    keys = {in_model[key]: key for key in files}
    twins = {id(parameter): name for name, parameter in model.named_parameters(remove_duplicate=False) if name in keys}
    found = {}
    for name in names & in_model.keys():
        parameter = dict(model.named_parameters(remove_duplicate=False)).get(in_model[name])
        key = keys.get(in_model[name]) or keys.get(twins.get(id(parameter), ""))
        if key is not None:
            with open_safetensors(folder / files[key], error=ModelError) as stored:
                found[name] = stored.get_tensor(key)
    return found
