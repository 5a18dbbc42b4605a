"""Load the frozen base model and its tokenizer, without running code from their repository."""

import contextlib
import importlib.util
import logging
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch._guards import detect_fake_mode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from poc_lora.envvars import flag, one_of, whole_number
from poc_lora.errors import ConfigError, ModelError, first_line
from poc_lora.files import require_plain, size, system_errors_as
from poc_lora.hub_ids import is_base_model_id
from poc_lora.models.float8 import quantize_float8, require_float8

BITSANDBYTES = ("nf4", "int8")  # the quantisations that it does
# Stored so, weights are dequantised as they are read: kernels that compute with them are code from the Hub.
DEQUANTIZED = ("fp8", "mxfp4")
# The packages and modules that read checkpoints which are quantised already, by quant_method.
STORED_NEEDS = {
    "aqlm": {"aqlm": "aqlm"},
    "auto-round": {"auto-round": "auto_round"},
    "awq": {"gptqmodel": "gptqmodel"},
    "bitsandbytes": {"bitsandbytes": "bitsandbytes"},
    "compressed-tensors": {"compressed-tensors": "compressed_tensors"},
    "gptq": {"gptqmodel": "gptqmodel", "optimum": "optimum"},
    "hqq": {"hqq": "hqq"},
    "quanto": {"optimum-quanto": "optimum.quanto"},
    "torchao": {"torchao": "torchao"},
    "vptq": {"vptq": "vptq"},
}
MAX_LAYERS = 500  # three times as many as the deepest have; each is simulated
# The most bytes of a base's files that are no weights, by how their names end.
MAX_BYTES = {
    "tokenizer_config.json": 2**24,
    "config.json": 2**20,
    ".jinja": 2**20,
    ".json": 2**28,
    ".txt": 2**28,
    ".model": 2**28,
}
MIXED_PRECISION = {"no": None, "bf16": "bfloat16", "fp16": "float16"}  # accelerate's names


def default_device() -> torch.device:
    """This process's CUDA device if there is one and accelerate is not set to use the CPU, else the CPU.

    Other accelerators are not chosen by default, since nothing has been tested on them.
    """
    if flag("ACCELERATE_USE_CPU") or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", whole_number("LOCAL_RANK", 0))


def load_base(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    quantization: str | None = None,
    device: torch.device | None = None,
    floats_only: bool = False,
    chat_template: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a base model, frozen and in eval mode, and its tokenizer.

    Only safetensors weights are read, and no code from the model's repository is run.

    Args:
        name: A folder or a Hub id.
        revision: The branch, tag or commit on the Hub.
        dtype: A torch dtype's name, or `auto`; see `resolve_dtype`.
        quantization: None, or for linear layers but the head bitsandbytes' `nf4` or `int8`, computing in `dtype`, or
            `fp8`; see `Float8Linear`. A checkpoint that is quantised already takes only None; int8 ones are computed
            without outlier columns, and those in `DEQUANTIZED` in `dtype`.
        device: The device to load to; default: `default_device()`.
        floats_only: Store 4-bit weights in tensors of `dtype`, since FSDP shards only floating-point tensors.
        chat_template: The tokenizer's chat template, in place of its own.

    Raises:
        ModelError: The model cannot be loaded, or lacks weights.
        ConfigError: The device cannot multiply in float8.
    """
    device = device or default_device()
    require_quantization(quantization, device)
    name = resolve_base(name)
    stored = require_stored(name, quantization, revision=revision)
    packed = quantization in BITSANDBYTES or stored is not None  # while it is read, and straight to the device
    tokenizer = load_tokenizer(name, revision=revision, chat_template=chat_template)
    if not sys.stderr.isatty():
        disable_progress_bar()  # a bar in a log file is noise
    chosen = _quantization(quantization, resolve_dtype(dtype, device), floats_only=floats_only)
    try:
        pair: Any = AutoModelForCausalLM.from_pretrained(
            name,
            config=_config(name, revision),
            revision=revision,
            dtype=getattr(torch, resolve_dtype(dtype, device)),
            **({} if chosen is None else {"quantization_config": chosen}),  # None would hide the checkpoint's own
            device_map={"": device} if packed else None,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as problem:  # the library raises many kinds, all of which mean that it cannot be loaded
        raise _cannot_load(name, problem) from problem
    model, loaded = pair
    if loaded["missing_keys"]:
        raise _cannot_load(name, ValueError(f"its weights lack {', '.join(sorted(loaded['missing_keys'])[:3])}"))
    model.requires_grad_(False)
    keep_differentiable(model)
    if stored == "int8":
        _without_outlier_columns(model)
    if quantization == "fp8":
        quantize_float8(model, device)
    return (model if packed else model.to(device)).eval(), tokenizer


def resolve_dtype(dtype: str, device: torch.device) -> str:
    """Returns `dtype`; for `auto` accelerate's mixed precision, or else bfloat16 on a GPU and float32 on the CPU."""
    if dtype != "auto":
        return dtype
    mixed = MIXED_PRECISION[one_of("ACCELERATE_MIXED_PRECISION", tuple(MIXED_PRECISION), "no")]
    return mixed or ("float32" if device.type == "cpu" else "bfloat16")


def require_gradients(dtype: str) -> None:
    """Raises ConfigError for float16, in which adapters cannot be trained."""
    if dtype == "float16":
        raise ConfigError(
            "float16 gradients underflow to zero without loss scaling, which packed training does not have",
            where="model.dtype",
            fix="set it to bfloat16 or float32, which overrides accelerate's mixed precision; eval may use float16",
        )


def _quantization(kind: str | None, dtype: str, *, floats_only: bool) -> BitsAndBytesConfig | None:
    if kind not in BITSANDBYTES:
        return None
    if kind == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
            bnb_4bit_quant_storage=getattr(torch, dtype) if floats_only else torch.uint8,
        )
    # Threshold 0, as in `_without_outlier_columns`.
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)


def stored_quantization(name: str, *, revision: str | None = None) -> str | None:
    """How a checkpoint's weights are quantised: `nf4`, `int8` or another method's name, or None. Raises ModelError."""
    name = resolve_base(name)
    try:
        config, _ = PretrainedConfig.get_config_dict(name, revision=revision)
    except Exception as problem:
        raise _cannot_load(name, problem) from problem
    parts = (config, config.get("text_config"))  # a model of images and text may keep it in either
    own = next((part["quantization_config"] for part in parts if part and part.get("quantization_config")), None)
    if own is None:
        return None
    if own.get("load_in_4bit") or own.get("load_in_8bit"):
        return "nf4" if own.get("load_in_4bit") else "int8"
    return str(own.get("quant_method") or "bitsandbytes")


def require_stored(name: str, quantization: str | None, *, revision: str | None = None) -> str | None:
    """Returns `stored_quantization`.

    Raises:
        ModelError: The package that it needs is missing, or another quantisation is asked for.
    """
    kind = stored_quantization(name, revision=revision)
    if kind is None:
        return None
    method = "bitsandbytes" if kind in BITSANDBYTES else kind
    if quantization is not None:
        what = (
            f"the weights of '{name}' are quantised already ({method}), so they cannot be quantised to {quantization}"
        )
        raise ModelError(what, where="model.quantization", fix="leave it out, or use the unquantised model")
    missing = [package for package, module in STORED_NEEDS.get(method, {}).items() if not _is_there(module)]
    if missing:
        what = f"the weights of '{name}' are quantised with {method}, which needs the package {' and '.join(missing)}"
        fix = f"pip install {' '.join(missing)}, or use the unquantised model"
        raise ModelError(what, where="model.name", fix=fix)
    if method == "bitsandbytes":
        _quiet_bitsandbytes()
    return kind


def _without_outlier_columns(model: nn.Module) -> None:
    """Keep int8 layers from picking outlier columns over all rows of a pack, which would tie its adapters together."""
    for module in model.modules():
        if getattr(getattr(module, "state", None), "threshold", 0.0):
            vars(module)["state"].threshold = 0.0


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def require_quantization(kind: str | None, device: torch.device) -> None:
    """Raises ModelError if bitsandbytes is needed and not installed, ConfigError if `device` has no float8."""
    if kind == "fp8":
        require_float8(device)
    if kind not in BITSANDBYTES:
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"quantization '{kind}' needs bitsandbytes", where="model.quantization", fix="pip install 'poc-lora[bnb]'"
        )
    _quiet_bitsandbytes()


def _quiet_bitsandbytes() -> None:
    """It warns at every call of an int8 layer, and of a kernel that `keep_differentiable` turns off."""
    for module in ("autograd._functions", "backends.cpu.ops"):
        logging.getLogger(f"bitsandbytes.{module}").setLevel(logging.ERROR)


def keep_differentiable(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit layers on some CPUs.

    It would do so for good at a layer's first call without gradients, for a bfloat16 kernel without a backward pass.
    """
    for module in model.modules():
        if "support_avx512bf16_for_cpu" in vars(module):
            vars(module)["support_avx512bf16_for_cpu"] = False


def load_tokenizer(
    name: str, *, revision: str | None = None, chat_template: str | None = None
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a base model, with another chat template if one is given. Raises ModelError."""
    name = resolve_base(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except Exception as problem:
        raise _cannot_load(name, problem) from problem
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def tokenizer_files(tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """Returns the files from which transformers loads the tokenizer, by name."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}


def empty_base(name: str, *, revision: str | None = None, dtype: str = "float32") -> PreTrainedModel:
    """Build the base model from its config alone, without weights, on the meta device. Raises ModelError.

    Within a FakeTensorMode it is on the CPU, whose tensors are fake then.
    """
    name = resolve_base(name)
    try:
        config = _config(name, revision)
        with torch.device("cpu" if detect_fake_mode() else "meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        model.requires_grad_(False).eval()
        return model
    except Exception as problem:  # the library raises many kinds, all of which mean that it cannot be loaded
        raise _cannot_load(name, problem) from problem


def empty_models(folder: Path) -> Iterator[PreTrainedModel]:
    """A base as a causal language model, and as the classes that its config names, without weights as in `empty_base`.

    There are none of a class that transformers does not have.
    """
    try:
        config = _config(resolve_base(str(folder)), None)
    except Exception:  # of many kinds
        return
    with contextlib.suppress(ModelError):
        yield empty_base(str(folder))
    for name in config.architectures or ():
        kind = getattr(transformers, str(name), None)
        if isinstance(kind, type) and issubclass(kind, PreTrainedModel):
            try:
                with torch.device("meta"):
                    yield kind(config)
            except Exception:  # noqa: S112  (of many kinds)
                continue


def _config(name: str, revision: str | None) -> PretrainedConfig:
    """The base model's configuration.

    Raises:
        ModelError: It has more layers than any model, or asks for an attention kernel, which is code.
    """
    config: PretrainedConfig = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    for part in (config, *(getattr(config, key, None) for key in config.sub_configs)):
        layers = getattr(part, "num_hidden_layers", 0)
        if isinstance(layers, int) and layers > MAX_LAYERS:
            raise ModelError(f"the base model's config.json has {layers:,} layers, more than any model", where=name)
        kernel = getattr(part, "_attn_implementation", None)
        if isinstance(kernel, str) and not kernel.isidentifier():
            raise ModelError(
                f"the base model's config.json asks for the attention kernel {kernel!r}, which is code from the Hub",
                where=name,
                fix="remove attn_implementation from its config.json",
            )
        stored = getattr(part, "quantization_config", None)
        if isinstance(stored, dict) and stored.get("quant_method") in DEQUANTIZED:
            stored["dequantize"] = True
    return config


def context_length(model: PreTrainedModel) -> int | None:
    """The maximum number of tokens in a row; None if the model's config has no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def linear_names(model: nn.Module) -> list[str]:
    """The distinct names (last parts of paths) of the model's linear layers, sorted."""
    return sorted({path.split(".")[-1] for path, m in model.named_modules() if isinstance(m, nn.Linear)})


def resolve_base(name: str) -> str:
    """Returns the path of a base model's folder, or its Hub id as it is. Raises ModelError if it is neither."""
    with system_errors_as(ModelError, "cannot be read", name):
        folder = Path(name).expanduser()
        if folder.is_dir():
            for path in folder.iterdir():
                with contextlib.suppress(FileNotFoundError):  # a link to nothing, which is missed where it is needed
                    require_plain(path, error=ModelError)
                    _require_size(path)
            return str(folder)
        is_id = is_base_model_id(name)
    if not is_id:
        raise ModelError(
            f"no base model at '{name}'", where="model.name", fix="give a folder with config.json, or a Hub id org/name"
        )
    return name


def _require_size(path: Path) -> None:
    """Raise ModelError for a file that is no weights and larger than any model's."""
    limit = next((limit for end, limit in MAX_BYTES.items() if path.name.endswith(end)), None)
    nbytes = path.stat().st_size
    if limit is not None and nbytes > limit:
        raise ModelError(f"a file of {size(nbytes)}, where no model has more than {size(limit)}", where=path)


def _cannot_load(name: str, problem: Exception) -> ModelError:
    if isinstance(problem, ModelError):
        return problem
    return ModelError(
        f"the base model '{name}' cannot be loaded: {first_line(problem)}",
        where="model.name",
        fix="it needs config.json, a tokenizer and *.safetensors weights of a causal language model",
    )
