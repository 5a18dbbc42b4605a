"""Checks of a PEFT LoRA configuration, which is untrusted, and the scales it gives the factors.

Only fields with a known meaning are accepted; any other field that is not at its default is refused by name.
"""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from poc_lora.adapters.factors import MAX_NAME, check_name
from poc_lora.config import MAX_RANK
from poc_lora.errors import AdapterError

MAX_ALPHA = 1e6
MAX_BASE_NAME = 4096  # the longest path; a merge copies the name
MAX_MODULES_TO_SAVE = 1024
COMPILE_STEPS = 1e5
MAX_PATTERN_STEPS = 3e8  # what matching all patterns may cost at worst; 1,000 plain ones on as many modules: 6e7

# Fields that do not change the meaning of the saved factors: how they were trained, initialised or selected.
HARMLESS = {
    "auto_mapping", "corda_config", "eva_config", "exclude_modules", "inference_mode", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_version",
    "qalora_group_size", "runtime_config", "target_modules",
}  # fmt: skip

UNDERSTOOD = {
    "alpha_pattern", "base_model_name_or_path", "bias", "fan_in_fan_out", "init_lora_weights", "lora_alpha",
    "modules_to_save", "peft_type", "r", "rank_pattern", "revision", "task_type", "use_rslora",
}  # fmt: skip

# By PEFT's task_type: transformers' class of the base model, and the Hub's name of the task.
TASKS = {
    "CAUSAL_LM": ("AutoModelForCausalLM", "text-generation"),
    "FEATURE_EXTRACTION": ("AutoModel", "feature-extraction"),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", "question-answering"),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", None),
    "SEQ_CLS": ("AutoModelForSequenceClassification", "text-classification"),
    "TOKEN_CLS": ("AutoModelForTokenClassification", "token-classification"),
}

# Fields that, if set, make the update something other than scale · B A on linear layers.
REFUSED = {
    "alora_invocation_tokens": "an activated LoRA applies only after certain tokens",
    "arrow_config": "Arrow routes every token among several adapters",
    "ensure_weight_tying": "tied embeddings share one update between two modules",
    "kasa_config": "KaSA changes the base weights and adds singular values between A and B",
    "layer_replication": "the adapter belongs to a model with repeated layers",
    "lora_bias": "the update has a bias beside B A",
    "megatron_config": "Megatron's parallel layers shard the factors",
    "monteclora_config": "MonteCLoRA draws random factors at every step",
    "target_parameters": "factors of bare parameters have another layout",
    "trainable_token_indices": "embedding rows were trained beside the factors",
    "use_bdlora": "BD-LoRA keeps its factors as blocks",
    "use_dora": "DoRA rescales the columns of the adapted weight, so its update is not B A",
    "use_qalora": "QA-LoRA pools the input before A",
    "velora_config": "VeLoRA projects activations inside the layer",
}

_PLAIN_INITS = ("gaussian", "eva", "orthogonal")
_CONVERTIBLE_INITS = ("pissa", "olora", "corda", "lora_ga")


def check_config(config: Any, where: Path) -> None:
    """Raises AdapterError unless the configuration is of plain LoRA."""
    if not isinstance(config, dict):
        raise AdapterError("the configuration is not a JSON object", where=where)
    if config.get("peft_type") != "LORA":
        what = f"peft_type is {str(config.get('peft_type'))[:80]!r}, not 'LORA'"
        raise AdapterError(what, where=where, fix="use an adapter of plain LoRA: other methods have other updates")
    for name, value in config.items():
        if name in HARMLESS or name in UNDERSTOOD or _is_off(value):
            continue
        if name in REFUSED:
            fix = f"use an adapter trained without {name}"
            raise AdapterError(f"{name} is set: {REFUSED[name]}", where=where, fix=fix)
        fix = "remove the field only if it does not change the update B A"
        raise AdapterError(
            f"the field {name[:MAX_NAME]!r} is not known, so neither is the update", where=where, fix=fix
        )
    if config.get("bias", "none") not in ("none", None):
        what = f"bias is {str(config['bias'])[:80]!r}: biases were trained beside the factors"
        raise AdapterError(what, where=where, fix="use an adapter trained with bias='none'")
    for name in ("base_model_name_or_path", "revision"):
        text = config.get(name)
        if not isinstance(text, str | None) or len(text or "") > MAX_BASE_NAME:
            raise AdapterError(f"{name} is not a text of at most {MAX_BASE_NAME} characters", where=where)
    # A merge copies it, and a model card puts it into code that readers paste.
    if not re.fullmatch(r"[\w./-]{0,255}", config.get("revision") or "", re.ASCII):
        what = "revision is not the name of a branch, a tag or a commit"
        raise AdapterError(what, where=where, fix="correct it, for example to main")
    if (config.get("task_type") or "CAUSAL_LM") not in TASKS:
        what = f"task_type is {str(config['task_type'])[:80]!r}, which PEFT does not know"
        raise AdapterError(what, where=where, fix=f"one of: {', '.join(TASKS)}")
    for name in ("use_rslora", "fan_in_fan_out"):
        if not isinstance(config.get(name, False), bool | None):
            raise AdapterError(f"{name} is neither true nor false", where=where)
    to_save = config.get("modules_to_save") or []
    if (
        not isinstance(to_save, list)
        or len(to_save) > MAX_MODULES_TO_SAVE
        or not all(isinstance(name, str) for name in to_save)
    ):
        raise AdapterError(f"modules_to_save is not a list of up to {MAX_MODULES_TO_SAVE} names", where=where)
    for name in to_save:
        check_name(name, where)
    _check_init(config.get("init_lora_weights", True), where)


def plain_targets(config: dict[str, Any]) -> frozenset[str]:
    """The `target_modules` that match all modules of the base with that name, and none is excluded."""
    targets = config.get("target_modules")
    restricted = any(config.get(name) not in (None, []) for name in ("exclude_modules", "layers_to_transform"))
    if not isinstance(targets, list) or restricted:
        return frozenset()
    return frozenset(target for target in targets if isinstance(target, str))


def target_pattern(config: dict[str, Any], names: list[str], where: Path) -> str | None:
    """The regular expression in `target_modules`, if it matches all these modules and cannot take long to match."""
    targets = config.get("target_modules")
    if not isinstance(targets, str) or targets == "all-linear" or config.get("exclude_modules"):
        return None
    try:
        _compile([targets], names, where)
    except AdapterError:
        return None
    return targets if all(re.fullmatch(targets, name) for name in names) else None


def auto_mapping(config: dict[str, Any]) -> dict[str, str] | None:
    """The base's class in transformers, by which PEFT's AutoPeftModel loads it; None for any other content."""
    given = config.get("auto_mapping")
    if not isinstance(given, dict) or not given.keys() >= {"base_model_class", "parent_library"}:
        return None  # Unsloth adds a key of its own
    name, library = str(given["base_model_class"]), str(given["parent_library"])
    # PEFT imports the library by its name.
    known = re.fullmatch(r"transformers(\.\w{1,80}){0,8}", library, re.ASCII)
    named = re.fullmatch(r"[A-Za-z]\w{0,120}", name, re.ASCII)
    return {"base_model_class": name, "parent_library": library} if known and named else None


def _is_off(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def _check_init(init: Any, where: Path) -> None:
    if init is None or isinstance(init, bool) or init in _PLAIN_INITS:
        return
    fix = "use an adapter trained from a plain start"
    if isinstance(init, str) and init.startswith(_CONVERTIBLE_INITS):
        fix = (
            "convert it to plain LoRA with PEFT: model.save_pretrained(FOLDER, "
            "path_initial_model_for_weight_conversion=THE_UNTRAINED_ADAPTER)"
        )
    what = f"init_lora_weights is {str(init)[:80]!r}: that start may change the base, so B A is not the whole update"
    raise AdapterError(what, where=where, fix=fix)


def module_scales(config: dict[str, Any], ranks: dict[str, int], where: Path) -> dict[str, float]:
    """Returns each module's scale as PEFT computes it.

    Args:
        config: A configuration that `check_config` accepts.
        ranks: The rank of each module's tensors.
        where: The configuration's file, for messages.

    Raises:
        AdapterError: A rank differs from the configuration's, or a rank or alpha pattern cannot be used.
    """
    names = list(ranks)
    stated = _by_module(config, "rank_pattern", "r", names, where, largest=MAX_RANK)
    alphas = _by_module(config, "alpha_pattern", "lora_alpha", names, where, largest=MAX_ALPHA)
    for name, rank in ranks.items():
        if stated[name] != rank:
            what = f"{name} has rank {rank}, but the configuration says {stated[name]:g}"
            raise AdapterError(what, where=where, fix="correct r or rank_pattern")
    root = bool(config.get("use_rslora"))
    return {name: alphas[name] / (math.sqrt(rank) if root else rank) for name, rank in ranks.items()}


def _by_module(
    config: dict[str, Any], patterns_key: str, default_key: str, names: list[str], where: Path, *, largest: float
) -> dict[str, float]:
    """The value for each module: that of the first pattern that matches its path, as in PEFT, or the default."""
    patterns = config.get(patterns_key) or {}
    if not isinstance(patterns, dict):
        raise AdapterError(f"{patterns_key} is not an object", where=where)
    default = config.get(default_key, 8)  # 8: PEFT's default for both
    for key, value in [(default_key, default), *patterns.items()]:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= largest:
            raise AdapterError(f"{key[:MAX_NAME]} is {str(value)[:80]}, not a number up to {largest:g}", where=where)
    wrapper = re.compile(r"_orig_mod|_(checkpoint|fsdp)_wrapped_module")
    if wrapped := next((key for key in patterns if wrapper.search(key)), None):
        what = f"{wrapped[:80]!r} in {patterns_key} names a wrapper, which the base model does not have"
        raise AdapterError(what, where=where, fix="save the adapter again, from the model without wrappers")
    compiled = _compile(patterns, names, where)
    return {
        name: next((patterns[key] for key, regex in compiled if regex.match(name)), patterns.get(name, default))
        for name in names
    }


def _compile(patterns: Iterable[str], names: list[str], where: Path) -> list[tuple[str, re.Pattern[str]]]:
    """Compile the patterns as PEFT does, and refuse those that could take very long to match.

    Without repeated groups, matching takes at most len(name) ** repetitions × product of choices steps. Compiling a
    pattern counts as COMPILE_STEPS.
    """
    compiled, steps, longest = [], 0.0, max(map(len, names))
    for key in patterns:
        plain = key.replace("(?:", "(")
        repetitions = len(re.findall(r"[*+]", plain))
        choices = plain.count("?") + sum(math.log2(1 + part.count("|")) for part in re.split(r"[()]", plain))
        # Module paths are ASCII, and a class of other characters takes long to compile.
        simple = len(key) <= MAX_NAME and key.isascii() and not re.search(r"\(\?|\)[*+]|\\[0-9NUu]|[{}]", plain)
        steps += 2.0 ** min(1000, choices + (1 + repetitions) * math.log2(longest)) * len(names) + COMPILE_STEPS
        if not simple or steps > MAX_PATTERN_STEPS:
            fix = "name the modules plainly, for example layers.0.self_attn.q_proj"
            raise AdapterError(f"the pattern {key[:80]!r} could take very long to match", where=where, fix=fix)
        try:
            compiled.append((key, re.compile(rf"(.*\.)?({key})$")))
        except (re.error, OverflowError, RecursionError) as problem:
            raise AdapterError(f"{key!r} is not a pattern: {problem}", where=where) from problem
    return compiled
