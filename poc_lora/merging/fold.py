"""Fold an adapter into its base model's weights, for engines that do not serve adapters."""

import contextlib
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from poc_lora.adapters.adapter import Adapter, open_adapter
from poc_lora.adapters.factors import Factors
from poc_lora.errors import AdapterError, ModelError, PocLoraError, RequestError, first_line
from poc_lora.files import allow_as_usual, commit_folder, read_json, require_plain
from poc_lora.hub_ids import is_base_model_id
from poc_lora.models.load import empty_base
from poc_lora.progress import progress_bar

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx")
COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*", "USE_POLICY*")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Folded:
    """The result of a fold."""

    folder: Path
    modules: int
    files: int  # weight files written


def fold(adapter: Path, base: str, out: Path) -> Folded:
    """Write the base model with weights W + ΔW to the new folder `out`.

    Files, tensors, dtypes and their order stay those of the base; tokenizer and configuration are copied. Sums are
    computed in float32 (float64 for a float64 base) and rounded once. Memory holds one weight file at a time.

    Args:
        adapter: The adapter's folder.
        base: The base model's folder or Hub id. It is not changed.
        out: The folder to create.

    Raises:
        AdapterError: The adapter cannot be read, or was trained on another base.
        ModelError: The base cannot be found, is quantised, or is not in safetensors.
        RequestError: `out` exists.
    """
    read = open_adapter(adapter)
    folder, out = _base_folder(base), Path(out)
    if out.exists() or out.is_symlink():
        raise RequestError("the output exists already", where=out, fix="choose a new folder")
    transposed = _layout(read, folder, _read_config(folder))
    files = _weight_files(folder)
    _check_fits(read, transposed, files)
    others = list(_other_files(folder))
    try:
        with commit_folder(out) as aside, progress_bar(len(files), f"folding into {len(files)} files") as bar:
            for path in others:
                shutil.copyfile(path, aside / path.name)
            for name, keys in files.items():
                tensors, metadata = _folded(read, transposed, folder / name, keys)
                save_file(tensors, aside / name, metadata=metadata)
                allow_as_usual(aside / name)
                bar.advance()
    except (OSError, SafetensorError) as problem:
        raise PocLoraError(f"the model could not be written: {problem}", where=out) from problem
    return Folded(out, len(read.modules), len(files))


def updated(weight: Tensor, factors: Factors) -> Tensor:
    """Returns W + scale · B A in W's dtype, computed in float32 or float64 and rounded once."""
    working = torch.promote_types(weight.dtype, torch.float32)
    update = factors.B.to(working) @ (factors.A.to(working) * factors.scale)
    return update.add_(weight.to(working)).to(weight.dtype)


def _base_folder(base: str) -> Path:
    path = Path(base).expanduser()
    if path.is_dir():
        return path
    if not is_base_model_id(base):
        raise ModelError(f"no base model at '{base}'", where="--base", fix="give a folder, or a Hub id org/name")
    try:
        return Path(snapshot_download(base, allow_patterns=["*.safetensors", *COPIED]))
    except Exception as problem:  # huggingface_hub raises many kinds
        raise ModelError(
            f"the base model '{base}' cannot be fetched: {first_line(problem)}", where="--base"
        ) from problem


def _read_config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json", error=ModelError)
    if not isinstance(config, dict):
        raise ModelError("config.json is not an object", where=folder)
    if config.get("quantization_config"):
        raise ModelError(
            "the base model is quantised, so updates of its weights would be lost to rounding",
            where=folder,
            fix="fold into the unquantised model, and quantise the result",
        )
    return config


def _layout(adapter: Adapter, folder: Path, config: Mapping[str, Any]) -> frozenset[str]:
    """The adapter's modules whose weights the base keeps transposed, [d_in, d_out].

    PEFT has one flag for all modules of an adapter, which cannot describe a base with both kinds of layers; so the
    layers of the base decide. Raises AdapterError if the adapter changes an embedding that is tied to the output head.
    """
    try:
        model = empty_base(str(folder))
    except ModelError:  # not a causal language model: only its files are known
        layers: dict[str, nn.Module] = {}
        tables = {
            name for name, tensor in adapter.modules_to_save.items() if tensor.shape[0] == config.get("vocab_size")
        }
        tied = config.get("tie_word_embeddings", True)
        shared = {*adapter.embeddings, *(name.removesuffix(".weight") for name in tables)} if tied else set()
    else:
        layers = dict(model.named_modules())
        tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        shared = {path for path, layer in layers.items() if tied and layer in ends}
    for name in sorted(shared):
        if name in adapter.modules or f"{name}.weight" in adapter.modules_to_save:
            raise AdapterError(
                f"the adapter changes {name}, which this base ties to its output head",
                where=adapter.source,
                fix="use the adapter without folding it",
            )
    return frozenset(
        name
        for name in adapter.modules
        if name in adapter.embeddings
        or (isinstance(layers[name], Conv1D) if name in layers else adapter.fan_in_fan_out)
    )


def _weight_files(folder: Path) -> dict[str, dict[str, tuple[int, ...]]]:
    """The weight files by name, with the shapes of their tensors, from their headers."""
    if (folder / INDEX_NAME).exists():
        index = read_json(folder / INDEX_NAME, error=ModelError)
        mapping = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(mapping, dict) or not all(isinstance(name, str) for name in mapping.values()):
            raise ModelError("the index has no weight_map", where=folder / INDEX_NAME)
        names = sorted(set(mapping.values()))
    elif (folder / SINGLE_NAME).exists():
        names = [SINGLE_NAME]
    else:
        raise ModelError(
            f"there is neither {SINGLE_NAME} nor {INDEX_NAME}",
            where=folder,
            fix="convert the weights with transformers: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW)",
        )
    files: dict[str, dict[str, tuple[int, ...]]] = {}
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{name!r} is not a safetensors file of this folder", where=folder / INDEX_NAME)
        with _opened(folder / name) as stored:
            files[name] = {key: tuple(stored.get_slice(key).get_shape()) for key in stored.keys()}  # noqa: SIM118
    return files


def _check_fits(
    adapter: Adapter, transposed: Collection[str], files: Mapping[str, Mapping[str, tuple[int, ...]]]
) -> None:
    shapes = {key: shape for keys in files.values() for key, shape in keys.items()}
    wanted: dict[str, tuple[int, ...]] = {name: tuple(tensor.shape) for name, tensor in adapter.modules_to_save.items()}
    for module in adapter.modules:
        d_out, d_in = adapter.shape(module)
        wanted[f"{module}.weight"] = (d_in, d_out) if module in transposed else (d_out, d_in)
    for name, shape in wanted.items():
        if shapes.get(name) != shape:
            raise AdapterError(
                f"the adapter changes {name} of shape {shape}, the base has {shapes.get(name) or 'no such weight'}",
                where=adapter.source,
                fix="fold it into the base model it was trained on; if its files name tensors differently from its "
                "modules, use PEFT's merge_and_unload",
            )


def _folded(
    adapter: Adapter, transposed: Collection[str], source: Path, keys: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """One file's tensors with their updates, and its metadata."""
    with _opened(source) as stored:
        metadata = stored.metadata()
        tensors = {key: stored.get_tensor(key) for key in keys}
    for key, tensor in tensors.items():
        module = key.removesuffix(".weight") if key.endswith(".weight") else ""
        if key not in adapter.modules_to_save and module not in adapter.modules:
            continue
        if tensor.dtype not in FLOATS:
            raise ModelError(f"{key} is {tensor.dtype}: quantised weights cannot be folded into", where=source)
        if key in adapter.modules_to_save:
            tensors[key] = adapter.modules_to_save[key].to(tensor.dtype)
        elif module in transposed:
            tensors[key] = updated(tensor.T, adapter.modules[module]).T.contiguous()
        else:
            tensors[key] = updated(tensor, adapter.modules[module])
        if not bool(torch.isfinite(tensors[key]).all()):
            raise AdapterError(f"the sum overflows in {key}", where=adapter.source, fix="use a wider base dtype")
    return tensors, metadata


def _other_files(folder: Path) -> Iterator[Path]:
    """Tokenizer, configuration and licence; links may not lead out of the folder, which is untrusted."""
    real = folder.resolve()
    root = real.parents[1] if real.parent.name == "snapshots" else real  # the Hub's cache has links to blobs/
    for pattern in COPIED:
        for path in sorted(folder.glob(pattern)):
            if path.is_file() and not any(path.match(weights) for weights in WEIGHT_FILES):
                if not path.resolve().is_relative_to(root):
                    what = f"{path.name} is a link that leads out of its folder"
                    raise ModelError(what, where=path, fix="copy the file there, or remove the link")
                yield path


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        require_plain(path, error=ModelError)
        with safe_open(path, framework="pt") as stored:
            yield stored
    except (SafetensorError, OSError) as problem:
        raise ModelError(f"not a readable safetensors file: {problem}", where=path, fix="fetch it again") from problem
