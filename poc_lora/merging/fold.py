"""Fold an adapter into its base model's weights, for engines that do not serve adapters."""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import save_file
from torch import Tensor

from poc_lora.adapters.adapter import TOKENIZER_FILES, Adapter, open_adapter, real_file
from poc_lora.adapters.factors import Factors
from poc_lora.adapters.sources import Source, find_sources
from poc_lora.errors import AdapterError, ModelError, RequestError, first_line
from poc_lora.files import (
    allow_as_usual,
    commit_folder,
    links_root,
    open_safetensors,
    read_json,
    require_new,
    system_errors_as,
)
from poc_lora.hub_ids import split_revision
from poc_lora.merging.fold_plan import INDEX_NAME, FoldPlan, changed_texts, loading_class, plan_fold
from poc_lora.models.load import resolve_base
from poc_lora.progress import progress_bar

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
    left_out: list[str]  # what the model needs and the folder does not have
    loaded_by: str | None  # the class of transformers that loads it; None if none does without custom code


def fold(adapter: str | Path, base: str | Path | None, out: str | Path, *, untie_head: bool = False) -> Folded:
    """Write the base model with weights W + ΔW to the new folder `out`.

    The folder has the base's files, with the same tensors in the same order and dtypes, its configuration, and its
    tokenizer or, if there is one, the adapter's. Sums are computed in float32 (float64 for a float64 base) and rounded
    once. One weight file at a time is in memory.

    Args:
        adapter: The adapter's folder or Hub id, which may end in @revision.
        base: The base model's folder or Hub id, which may end in @revision; without one the adapter's own is used, if
            it names this base. None: the base that the adapter names. It is not changed.
        out: The folder to create.
        untie_head: If the output head is tied to the embedding and the adapter changes one of them, write the head's
            weights separately.

    Raises:
        AdapterError: The adapter cannot be read, or was trained on another base.
        ModelError: The base cannot be found, is quantised, or is not in safetensors.
        RequestError: `out` exists, and is not an empty folder; or no base is given, and the adapter names none.
        WriteError: The disk could not be written to.
    """
    source = _one_source(adapter)
    read, out = open_adapter(source.folder, root=source.root), Path(out)
    if base is None and not read.base_model:
        raise RequestError("the adapter does not name its base model", where=adapter, fix="add --base DIR_OR_ID")
    folder = _base_folder(str(base or read.base_model), read)
    require_new(out)
    config = _read_config(folder)
    files = weight_files(folder)
    plan = plan_fold(read, folder, config, files, untie_head=untie_head)
    others = dict(_other_files(folder)) | dict(_tokenizer_beside(source))
    texts = changed_texts(plan, folder, config, files)
    with commit_folder(out) as aside, progress_bar(len(files), f"folding into {len(files)} files") as bar:
        for name, path in others.items():
            _copy(path, aside / name)
        for name, text in texts.items():
            (aside / name).write_text(text, encoding="utf-8")
        for name, keys in files.items():
            tensors, metadata = _folded(read, plan, folder / name, keys)
            save_file(tensors, aside / name, metadata=metadata)
            allow_as_usual(aside / name)
            bar.advance()
    return Folded(out, len(read.modules), len(files), _left_out(folder, config), loading_class(config))


def updated(weight: Tensor, factors: Factors) -> Tensor:
    """Returns W + scale · B A in W's dtype, computed in float32 or float64 and rounded once."""
    working = torch.promote_types(weight.dtype, torch.float32)
    update = factors.B.to(working) @ (factors.A.to(working) * factors.scale)
    return update.add_(weight.to(working)).to(weight.dtype)


def _one_source(adapter: str | Path) -> Source:
    sources = find_sources(adapter)
    if len(sources) > 1:
        what = f"{len(sources)} adapters, where one is folded"
        raise AdapterError(what, where=adapter, fix="merge them first, or name one of them")
    return sources[0]


def _base_folder(base: str, adapter: Adapter) -> Path:
    with system_errors_as(ModelError, "cannot be read", base):
        is_folder = Path(base).expanduser().is_dir()
    name, revision = (base, None) if is_folder else split_revision(base)
    found = resolve_base(base if revision == "" else name)
    if is_folder:
        return Path(found)
    if revision is None and name == adapter.base_model:
        revision = adapter.revision
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=["*.safetensors", *COPIED]))
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


def weight_files(folder: Path) -> dict[str, dict[str, tuple[int, ...]]]:
    """Returns the shapes of the tensors in every weight file, by file name, read from the headers."""
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
        with open_safetensors(folder / name, error=ModelError) as stored:
            files[name] = {key: tuple(stored.get_slice(key).get_shape()) for key in stored.keys()}  # noqa: SIM118
    return files


def _folded(
    adapter: Adapter, plan: FoldPlan, source: Path, keys: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """One file's tensors with their updates, and its metadata."""
    with open_safetensors(source, error=ModelError) as stored:
        metadata = stored.metadata()
        tensors = {key: stored.get_tensor(key) for key in keys}
    if plan.untied and plan.untied[1] in tensors:
        tensors[plan.untied[0]] = tensors[plan.untied[1]].clone()
    for key, tensor in tensors.items():
        if key not in plan.modules and key not in plan.whole:
            continue
        if tensor.dtype not in FLOATS:
            raise ModelError(f"{key} is {tensor.dtype}: quantised weights cannot be folded into", where=source)
        if key in plan.whole:
            tensors[key] = adapter.modules_to_save[plan.whole[key]].to(tensor.dtype)
        if key in plan.modules:
            factors, weight = adapter.modules[plan.modules[key]], tensors[key]
            tensors[key] = (
                updated(weight.T, factors).T.contiguous() if key in plan.transposed else updated(weight, factors)
            )
        if not bool(torch.isfinite(tensors[key]).all()):
            raise AdapterError(f"the sum overflows in {key}", where=adapter.source, fix="use a wider base dtype")
    return tensors, metadata


def _copy(source: Path, target: Path) -> None:
    with system_errors_as(ModelError, "cannot be read", source):
        handle = source.open("rb")
    with handle, target.open("wb") as out:
        shutil.copyfileobj(handle, out)


def _left_out(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """The custom code of the base: it is not copied, since loading it would run it."""
    code = sorted(path.name for path in folder.glob("*.py"))
    if not code and config.get("auto_map"):
        code = ["the custom code that config.json names (auto_map)"]
    return code


def _tokenizer_beside(source: Source) -> Iterator[tuple[str, Path]]:
    """The files of a tokenizer in an adapter's folder, which may have more tokens, or another chat template."""
    for name in TOKENIZER_FILES:
        path = source.folder / name
        if path.is_file():
            yield name, real_file(source.folder, name, source.root)


def _other_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Tokenizer, configuration and licence; links may not lead out of the folder, which is untrusted."""
    root = links_root(folder)
    for pattern in COPIED:
        for path in sorted(folder.glob(pattern)):
            if path.is_file() and not any(path.match(weights) for weights in WEIGHT_FILES):
                if not path.resolve().is_relative_to(root):
                    what = f"{path.name} is a link that leads out of its folder"
                    raise ModelError(what, where=path, fix="copy the file there, or remove the link")
                yield path.name, path
