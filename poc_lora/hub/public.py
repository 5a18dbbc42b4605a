"""Which parts of an adapter's files may be published; for a run's files, `poc_lora.artifacts` says so."""

import re
from pathlib import Path
from typing import Any

from poc_lora.adapters.peft_config import HARMLESS, auto_mapping
from poc_lora.errors import AdapterError
from poc_lora.files import open_safetensors

_PATTERN = re.compile(r"[\w.*+?|()\[\]{}\\^$:,=!<>-]{1,4096}", re.ASCII)  # a module, or PEFT's pattern of several

# The fields that decide which update the factors are, and where PEFT attaches them.
PATTERNS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
CONFIG_FIELDS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "lora_alpha", "lora_dropout", "modules_to_save", "peft_type", "peft_version", "r",
    "rank_pattern", "revision", "task_type", "use_dora", "use_rslora", *PATTERNS,
}  # fmt: skip


def public_config(
    config: dict[str, Any], base: str, *, keep_revision: bool, where: Path
) -> tuple[dict[str, Any], list[str]]:
    """Reduce an adapter's configuration to what is needed to load the adapter.

    Args:
        config: A configuration that `open_adapter` accepts.
        base: The base model's Hub id.
        keep_revision: Whether the revision is one of that repository.

    Returns:
        The public configuration, and the names of the fields with content that it lacks.

    Raises:
        AdapterError: A field of module names holds something else.
    """
    public = {name: value for name, value in config.items() if name in CONFIG_FIELDS}
    public["base_model_name_or_path"] = base
    public["revision"] = (config.get("revision") or None) if keep_revision else None
    for name in (*PATTERNS, "rank_pattern", "alpha_pattern"):
        given = public.get(name)
        if not all(isinstance(x, int) or _PATTERN.fullmatch(x) for x in _names(given)):
            what = f"{name} has a value that is not a module's name or a pattern of names: {str(given)[:80]}"
            raise AdapterError(what, where=where, fix="name the modules plainly, for example q_proj")
    for name in ("target_modules", "exclude_modules"):
        if isinstance(public.get(name), str):
            _check_pattern(name, public[name], where)
    if public.get("auto_mapping") is not None:
        public["auto_mapping"] = auto_mapping(config)
        if public["auto_mapping"] is None:
            del public["auto_mapping"]
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
    # Only dictionaries are reported: ordinary adapters have further fields with a plain value, such as megatron_core.
    unknown = (HARMLESS - CONFIG_FIELDS) | ({"auto_mapping"} - public.keys())
    return public, [name for name in unknown if isinstance(config.get(name), dict) and config[name]]


def _check_pattern(name: str, pattern: str, where: Path) -> None:
    """Raises AdapterError for an invalid pattern, and for nested repetition or repeated alternatives: (a+)+, (a|ab)*.

    Others will load it, and matching such a pattern can take exponentially long.
    """
    fix = "name the modules plainly, for example q_proj"
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as problem:
        raise AdapterError(f"{name} is not a pattern: {problem}", where=where, fix=fix) from problem
    rest, before = re.sub(r"\\.|\[\^?\]?[^\]]*\]", "x", pattern), ""
    rest = re.sub(r"\(\?([:=!]|<[=!]|P<\w+>)", "(", rest)
    while rest != before:  # innermost groups first; + stands for one that repeats or varies
        if re.search(r"\([^()]*[*+?{|][^()]*\)[*+{]", rest):
            what = f"{name} repeats a group that repeats or varies, and could take very long to match: {pattern[:80]!r}"
            raise AdapterError(what, where=where, fix=fix)
        rest, before = re.sub(r"\(([^()]*)\)", lambda group: "+" if set("*+?{|") & set(group[1]) else "x", rest), rest


def _names(value: Any) -> list[Any]:
    """The texts and numbers in a field of names; for a field of another type [""], which is not a name."""
    if value is None:
        return []
    if isinstance(value, str | int):
        return [value]
    if isinstance(value, list | dict) and all(isinstance(inner, str | int) for inner in value):
        return list(value)
    return [""]


def refuse_metadata(path: Path) -> None:
    """Raise AdapterError for weights with metadata other than their format: some trainers put paths there."""
    with open_safetensors(path, error=AdapterError) as stored:
        more = sorted((stored.metadata() or {}).keys() - {"format"})
    if more:
        names = ", ".join(more)[:200]
        raise AdapterError(
            f"the header of the weights holds more than their format, and would be uploaded: {names!r}",
            where=path,
            fix=f"write the adapter anew, without it: poc-lora merge {path.parent} --out NEW_FOLDER",
        )
