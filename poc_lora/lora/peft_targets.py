"""Asks PEFT which modules it would attach an adapter to, on a model without weights."""

import contextlib
import logging
import warnings
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedModel

from poc_lora.adapters.adapter import Adapter, target_modules
from poc_lora.errors import AdapterError, ModelError, PocLoraError, first_line
from poc_lora.models.load import empty_base, empty_models
from poc_lora.models.names import names_in_model


def why_not_attached(model: PreTrainedModel, modules: Collection[str], targets: str | list[str]) -> str | None:
    """Returns None if PEFT attaches an adapter of `modules` to exactly these, otherwise what it does instead.

    Routed experts are compared as a whole: PEFT converts those of older checkpoints to parameters.

    Args:
        model: The base on the meta device, which PEFT changes.
        modules: The paths of the adapter's modules.
        targets: The adapter's `target_modules` in PEFT.
    """
    with _quiet_import():
        from peft import LoraConfig  # slow to import
        from peft.tuners.lora import LoraModel

    config = LoraConfig(r=1, target_modules=targets)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tuner = LoraModel(model, config, "default", low_cpu_mem_usage=True)
    except Exception as problem:  # PEFT raises many kinds
        return f"PEFT cannot attach the adapter: {first_line(problem)}"
    ours = {path for path in modules if "experts" not in path.split(".")}
    theirs, parameters = set(tuner.targeted_module_names), list(getattr(tuner, "targeted_parameter_names", []))
    if ours - theirs:
        return f"PEFT would not attach {min(ours - theirs)}" + (f", but {parameters[0]}" if parameters else "")
    if more := sorted(theirs - set(modules)) or (parameters if len(ours) == len(modules) else []):
        return f"PEFT would also attach {more[0]}"
    return None


@contextlib.contextmanager
def _quiet_import() -> Iterator[None]:
    """Within the block bitsandbytes, which PEFT imports where it is installed, does not warn about kernels."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def require_attached(model: PreTrainedModel, modules: Collection[str], targets: Collection[str]) -> None:
    """Raises ModelError unless PEFT attaches adapters trained on `targets` to exactly `modules`; it changes `model`."""
    if problem := why_not_attached(model, modules, target_modules(modules, targets)):
        raise ModelError(
            f"{problem}; the trained adapter would not be the loaded one",
            where="lora.targets",
            fix="leave out the names that routed experts have too, or that PEFT refuses, for example"
            " lora.targets=[q_proj, k_proj, v_proj, o_proj]",
        )


def attachable(adapter: Adapter) -> Adapter:
    """Returns the adapter with `target_modules` that PEFT attaches to exactly its modules.

    These are its own if they do that, otherwise the modules' full names. They are not checked if the base's config is
    not on this machine, or has other modules.

    Raises:
        AdapterError: PEFT would attach other modules, or none.
    """
    problem = None
    full = replace(adapter, targets=frozenset(), pattern=None)
    for named in (adapter, replace(adapter, pattern=None), full) if adapter.pattern else (adapter, full):
        model = _shapes_at_hand(adapter)
        plain = {path for path in adapter.modules if "experts" not in path.split(".")}
        if model is None or not plain <= {path for path, _ in model.named_modules()}:
            _require_a_module(adapter, plain)
            return adapter
        targets = named.pattern or target_modules(named.modules, named.targets)
        problem = why_not_attached(model, list(adapter.modules), targets)
        if problem is None:
            return named
    raise AdapterError(
        f"{problem}; the written adapter would not be the loaded one",
        where=adapter.source,
        fix="merge adapters without these modules, or with the version of transformers and PEFT that they are from",
    )


def _require_a_module(adapter: Adapter, modules: Collection[str]) -> None:
    """Raises AdapterError if the base, as any class that its config names, has none of the modules."""
    folder = base_at_hand(adapter)
    models = [] if folder is None or not modules else list(empty_models(folder))
    for model in models:
        there = model.state_dict()
        if any(name in there for name in names_in_model(model, [f"{module}.weight" for module in modules]).values()):
            return
    if models:
        raise AdapterError(
            f"its base {adapter.base_model} has no module {min(modules)}, nor any other that the adapter is for",
            where=adapter.source,
            fix="correct base_model_name_or_path, or save the adapter again with PEFT's save_pretrained",
        )


def base_at_hand(adapter: Adapter) -> Path | None:
    """Returns the folder with the config of the adapter's base, local or in the Hub's cache; None if there is none."""
    name = adapter.base_model
    if not name:
        return None
    try:
        folder = Path(name).expanduser()
        if (folder / "config.json").is_file():
            return folder
        cached = try_to_load_from_cache(name, "config.json", revision=adapter.revision)
        return Path(cached).parent if isinstance(cached, str) else None
    except (OSError, ValueError, RuntimeError):  # a name that is no id, and no path
        return None


def _shapes_at_hand(adapter: Adapter) -> PreTrainedModel | None:
    """The adapter's base on the meta device, if its config is on this machine and can be used."""
    folder = base_at_hand(adapter)
    try:
        return None if folder is None else empty_base(str(folder))
    except PocLoraError:  # another kind of model
        return None
