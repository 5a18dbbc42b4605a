"""Finds the tensors in a base's files that an adapter changes, by transformers' loading maps, and what else changes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from poc_lora.adapters.adapter import Adapter
from poc_lora.errors import AdapterError, ModelError
from poc_lora.files import read_json
from poc_lora.models.load import empty_models
from poc_lora.models.names import names_in_model

HEAD_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
INDEX_NAME = "model.safetensors.index.json"
AUTO_CLASSES = (
    "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification", "AutoModelForTokenClassification", "AutoModelForQuestionAnswering",
    "AutoModel",
)  # fmt: skip

Files = Mapping[str, Mapping[str, tuple[int, ...]]]


@dataclass(frozen=True)
class FoldPlan:
    """What a fold does to the tensors of a base's files. The keys are their names in the files."""

    modules: Mapping[str, str]  # the adapter's module whose update is added
    whole: Mapping[str, str]  # the adapter's parameter (modules_to_save) that replaces it
    transposed: frozenset[str]  # kept as [d_in, d_out]
    untied: tuple[str, str] | None  # a new head, and the embedding that it starts from
    is_untied: bool
    rows: int | None  # of resized tables of tokens


def plan_fold(adapter: Adapter, folder: Path, config: Mapping[str, Any], files: Files, *, untie_head: bool) -> FoldPlan:
    """Find the tensors that an adapter changes. Raises AdapterError if it does not fit the base."""
    shapes = {key: shape for keys in files.values() for key, shape in keys.items()}
    wanted = [f"{module}.weight" for module in adapter.modules] + list(adapter.modules_to_save)
    model, key_of = None, {key: key for key in shapes}  # of no known class: only its files are known
    best = -1
    for candidate in empty_models(folder):
        names = names_in_model(candidate, dict.fromkeys([*shapes, *wanted]))
        by_name = {names[key]: key for key in shapes}
        keys = {name: by_name.get(names[name], name) for name in wanted}
        fitting = sum(key in shapes or names[name] in candidate.state_dict() for name, key in keys.items())
        if fitting > best:
            best, model, key_of = fitting, candidate, {**{name: names[name] for name in wanted}, **keys}
            head_names = by_name
    layers = dict(model.named_modules()) if model is not None else {}
    in_model = names_in_model(model, wanted) if model is not None else {name: name for name in wanted}
    if len(set(in_model.values())) < len(set(wanted)):
        raise AdapterError("two of its modules are the same module of this base", where=adapter.source)

    # PEFT has one flag for all modules, which cannot describe a base with both kinds of layers; so its layers decide.
    def is_transposed(module: str) -> bool:
        layer = layers.get(in_model[f"{module}.weight"].removesuffix(".weight"))
        return module in adapter.embeddings or (adapter.fan_in_fan_out if layer is None else isinstance(layer, Conv1D))

    untied = None
    tied = _tied_tables(model, adapter, config)
    changed = sorted({name for name in wanted if in_model[name] in tied})
    stays_tied = model is not None and _are_one_table(adapter, changed)
    if changed and not (untie_head or stays_tied):
        raise AdapterError(
            f"the adapter changes {changed[0].removesuffix('.weight')}, which this base ties to its output head",
            where=adapter.source,
            fix="give the head weights of its own (--untie-head), or use the adapter without folding it",
        )
    stored: dict[str, str] = {}
    if changed and model is not None:
        table, head = tied
        stored = {name: head_names.get(name, name) for name in (table, head)}
        key_of = {name: stored.get(in_model[name], key_of[name]) for name in wanted}
        if stored[head] not in shapes and stored[table] in shapes:
            if stays_tied:
                key_of = {name: stored[table] if key == stored[head] else key for name, key in key_of.items()}
            else:
                untied = (stored[head], stored[table])
                shapes[stored[head]] = shapes[stored[table]]
    modules = {key_of.get(f"{m}.weight", f"{m}.weight"): m for m in adapter.modules}
    whole = {key_of.get(name, name): name for name in adapter.modules_to_save}
    for module in adapter.modules:
        name = f"{module}.weight"
        if name in changed and name in adapter.modules_to_save:  # PEFT loads it into the base's, which both ends share
            whole = dict.fromkeys(stored.values(), name) | whole
    transposed = frozenset(key for key, module in modules.items() if is_transposed(module))
    tables = _tables(model, in_model, key_of) | set(stored.values())
    rows = _check_shapes(adapter, modules, whole, transposed, shapes, tables)
    for name in _ends(model) if rows else ():
        if (key := head_names.get(name, name)) in shapes.keys() - whole.keys() and shapes[key][0] != rows:
            what = f"the adapter has a table of {rows} tokens, but no {key}, of which the base has {shapes[key][0]}"
            fix = "save both: train with modules_to_save=['embed_tokens', 'lm_head']"
            raise AdapterError(what, where=adapter.source, fix=fix)
    return FoldPlan(modules, whole, transposed, untied, bool(changed) and not stays_tied, rows)


def _are_one_table(adapter: Adapter, names: list[str]) -> bool:
    """Whether the adapter replaces tied tables by one and the same, so that they stay tied."""
    if len(names) < 2 or any(name.removesuffix(".weight") in adapter.modules for name in names):
        return False
    table, head = (adapter.modules_to_save[name] for name in names)
    return table.dtype == head.dtype and torch.equal(table, head)


def _tied_tables(model: PreTrainedModel | None, adapter: Adapter, config: Mapping[str, Any]) -> list[str]:
    """The weights of the embedding and the head, by name in the model, if they are tied."""
    if model is None:
        if not config.get("tie_word_embeddings", True):
            return []
        saved = adapter.modules_to_save.items()
        tables = [name for name, tensor in saved if tensor.shape[0] == config.get("vocab_size")]
        return [*tables, *(f"{module}.weight" for module in adapter.embeddings)]
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    if None in ends or not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return []
    path_of = {id(layer): path for path, layer in model.named_modules()}
    return [f"{path_of[id(end)]}.weight" for end in ends]


def _tables(model: PreTrainedModel | None, in_model: Mapping[str, str], key_of: Mapping[str, str]) -> set[str]:
    """The keys among those to change that are tables of tokens, which may be resized."""
    names = _ends(model)
    return {key_of[name] for name, found in in_model.items() if found in names}


def _ends(model: PreTrainedModel | None) -> set[str]:
    """The names of the weights of the embedding and the head."""
    if model is None:
        return set()
    ends: list[nn.Module | None] = [model.get_input_embeddings(), model.get_output_embeddings()]
    return {f"{path}.weight" for path, layer in model.named_modules() if any(layer is end for end in ends)}


def _check_shapes(
    adapter: Adapter,
    modules: Mapping[str, str],
    whole: Mapping[str, str],
    transposed: frozenset[str],
    shapes: Mapping[str, tuple[int, ...]],
    tables: set[str],
) -> int | None:
    """Raises AdapterError for a shape that does not fit; returns the rows of resized tables, if there are such."""
    rows: set[int] = set()
    known = dict(shapes)
    for key, name in whole.items():
        shape = tuple(adapter.modules_to_save[name].shape)
        if key in tables and key in known and shape[1:] == known[key][1:] and shape != known[key]:
            known[key] = shape
            rows.add(shape[0])
        _check_shape(adapter, key, shape, known)
    for key, module in modules.items():
        d_out, d_in = adapter.shape(module)
        _check_shape(adapter, key, (d_in, d_out) if key in transposed else (d_out, d_in), known)
    if len(rows) > 1:
        raise AdapterError("its resized tables of tokens have different numbers of rows", where=adapter.source)
    return rows.pop() if rows else None


def _check_shape(adapter: Adapter, key: str, shape: tuple[int, ...], known: Mapping[str, tuple[int, ...]]) -> None:
    if known.get(key) != shape:
        fix = "fold it into the base model it was trained on"
        if key not in known and adapter.task_type in HEAD_TASKS:
            fix = (
                "a head made for a task is in no file of the base: load base and adapter with PEFT, merge_and_unload()"
            )
        what = f"the adapter changes {key} of shape {shape}, the base has {known.get(key) or 'no such weight'}"
        raise AdapterError(what, where=adapter.source, fix=fix)


def changed_texts(plan: FoldPlan, folder: Path, config: Mapping[str, Any], files: Files) -> dict[str, str]:
    """The configuration and the index where the fold changes them, by file name."""
    texts: dict[str, str] = {}
    changes = ({"tie_word_embeddings": False} if plan.is_untied else {}) | (
        {"vocab_size": plan.rows} if plan.rows else {}
    )
    if changes:
        new: dict[str, Any] = dict(config)
        nested = new.get("text_config")
        if isinstance(nested, dict):
            new["text_config"] = nested | changes
        if not isinstance(nested, dict) or plan.is_untied:
            new |= {name: value for name, value in changes.items() if name in new or not isinstance(nested, dict)}
        if plan.is_untied:
            new["tie_word_embeddings"] = False
        texts["config.json"] = json.dumps(new, indent=2) + "\n"
    if plan.untied and (folder / INDEX_NAME).exists():
        index = read_json(folder / INDEX_NAME, error=ModelError)
        head, table = plan.untied
        index["weight_map"][head] = next(name for name, keys in files.items() if table in keys)
        index.get("metadata", {}).pop("total_size", None)
        texts[INDEX_NAME] = json.dumps(index, indent=2) + "\n"
    return texts


def loading_class(config: Mapping[str, Any]) -> str | None:
    """The class of transformers whose from_pretrained loads a model with this config, without custom code."""
    names = [str(name) for name in config.get("architectures") or ()]
    if config.get("auto_map"):
        return None
    for auto in AUTO_CLASSES:
        known = getattr(transformers, auto)._model_mapping._model_mapping.values()
        if any(name in known or any(name in own for own in known if isinstance(own, tuple)) for name in names):
            return auto
    return next((name for name in names if hasattr(transformers, name)), None if names else "AutoModelForCausalLM")
