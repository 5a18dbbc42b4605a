"""What of the JSON files is for others: known fields, built anew. What a file says besides stays on this machine."""

import math
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import safe_open

from poc_lora.adapters.peft_config import HARMLESS
from poc_lora.errors import AdapterError
from poc_lora.merging.merge import MergeReport, ModuleReport

_PATTERN = re.compile(r"[\w.*+?|()\[\]\\^$:-]{1,4096}", re.ASCII)  # a module's name, or PEFT's pattern of several

# Of an adapter's configuration: what decides which update the factors are, and where PEFT attaches them.
PATTERNS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
CONFIG_FIELDS = {
    "alpha_pattern", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "init_lora_weights",
    "lora_alpha", "lora_dropout", "modules_to_save", "peft_type", "peft_version", "r", "rank_pattern", "revision",
    "task_type", "use_dora", "use_rslora", *PATTERNS,
}  # fmt: skip

MODULE_FIELDS = {field.name for field in fields(ModuleReport)}
SOURCE_FIELDS = ("name", "hub_commit", "sha256", "base_model", "base_revision")
LIBRARIES = ("poc_lora", "torch", "safetensors")
MERGE_FIELDS = {field.name for field in fields(MergeReport)} | {
    "method", "requested_rank", "canonical", "seed", "dtype", "base_mismatch_allowed", "sources", "versions",
    "modules_to_save", "embeddings", "rank_sweep",
}  # fmt: skip


def public_config(
    config: dict[str, Any], base: str, *, keep_revision: bool, where: Path
) -> tuple[dict[str, Any], list[str]]:
    """An accepted adapter's configuration for others, and the fields with content that it leaves out.

    base: what others know the base model by. keep_revision: whether the revision is one of that repository. Raises
    AdapterError for what is neither a module's name nor a pattern.
    """
    public = {name: value for name, value in config.items() if name in CONFIG_FIELDS}
    public["base_model_name_or_path"] = base
    public["revision"] = (config.get("revision") or None) if keep_revision else None
    for name in (*PATTERNS, "rank_pattern", "alpha_pattern"):
        given = public.get(name)
        if not all(isinstance(x, int) or _PATTERN.fullmatch(x) for x in _names(given)):
            what = f"{name} holds what is neither a module's name nor a pattern of names: {str(given)[:80]}"
            raise AdapterError(what, where=where, fix="name the modules plainly, for example q_proj")
    for name, kind, form in (
        ("task_type", str, r"[A-Z0-9_]{1,40}"),
        ("peft_version", str, r"[\w.+@-]{1,80}"),
        ("lora_dropout", int | float, r".*"),
        ("inference_mode", bool, r".*"),
        ("use_dora", bool, r".*"),
    ):
        value = public.get(name)
        if value is not None and not (isinstance(value, kind) and re.fullmatch(form, str(value), re.ASCII)):
            del public[name]
    # Fields of an ordinary adapter that have a plain value, such as megatron_core, are not worth a word.
    return public, [name for name in HARMLESS - CONFIG_FIELDS if isinstance(config.get(name), dict) and config[name]]


def _names(value: Any) -> list[Any]:
    """The texts and numbers that a field of names holds; [""], which is no name, where it is of another type."""
    if value is None:
        return []
    if isinstance(value, str | int):
        return [value]
    if isinstance(value, list | dict) and all(isinstance(inner, str | int) for inner in value):
        return list(value)
    return [""]


def public_merge(merge: dict[str, Any]) -> dict[str, Any]:
    """The fields of a merge.json that `merge` writes, where they are of the types that it writes."""
    public = {name: value for name, value in merge.items() if name in MERGE_FIELDS and _is_plain(value)}
    public["sources"] = [
        {name: source[name] for name in SOURCE_FIELDS if name in source and _is_plain(source[name])}
        for source in merge["sources"]
    ]
    public["modules"] = {
        module: {
            name: value
            for name, value in report.items()
            if name in MODULE_FIELDS and (_is_plain(value) or (name == "sweep" and _is_sweep(value)))
        }
        for module, report in merge["modules"].items()
    }
    if isinstance(versions := merge.get("versions"), dict):
        public["versions"] = {name: versions[name] for name in LIBRARIES if isinstance(versions.get(name), str)}
    if isinstance(sweep := merge.get("rank_sweep"), dict):
        public["rank_sweep"] = {kind: errors for kind, errors in sweep.items() if _is_sweep(errors)}
    return {name: public[name] for name in merge if name in public}


def _is_plain(value: Any) -> bool:
    """Whether a value is a text, a finite number, true, false or null, or a list of such."""
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return math.isfinite(value) if isinstance(value, float) else not isinstance(value, dict)


def _is_sweep(value: Any) -> bool:
    return isinstance(value, dict) and all(
        rank.isdecimal() and isinstance(error, int | float) and _is_plain(error) for rank, error in value.items()
    )


def public_json(value: Any, names: dict[str, str]) -> Any:
    """JSON with those names replaced, and of absolute paths only the last part: they tell of this machine."""
    if isinstance(value, dict):
        return {key: public_json(inner, names) for key, inner in value.items()}
    if isinstance(value, list):
        return [public_json(inner, names) for inner in value]
    if isinstance(value, str):
        return names.get(value, Path(value).name if Path(value).is_absolute() else value)
    return value


def refuse_metadata(path: Path) -> None:
    """Raises AdapterError for weights whose header says more than their format: some trainers put paths there."""
    with safe_open(path, framework="pt") as stored:
        more = sorted((stored.metadata() or {}).keys() - {"format"})
    if more:
        told = ", ".join(more)[:200]
        raise AdapterError(
            f"the header of the weights holds more than their format, and would be uploaded: {told!r}",
            where=path,
            fix=f"write the adapter anew, without it: poc-lora merge {path.parent} --out NEW_FOLDER",
        )
