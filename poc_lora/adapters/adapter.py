"""One LoRA adapter, in memory and on disk in PEFT's format.

Adapter folders are untrusted and reading is default-deny: only settings and tensors that define ΔW = scale · B A
without doubt are accepted. Anything else raises an AdapterError with the reason, before a tensor is read. Only
adapter_config.json and adapter_model.safetensors are opened.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from poc_lora.adapters.factors import Factors, check_dtype, check_name, check_shapes, is_finite
from poc_lora.adapters.peft_config import auto_mapping, check_config, module_scales, plain_targets, target_pattern
from poc_lora.adapters.weights_file import PREFIX, LazyFactors, LazyModulesToSave, read_header
from poc_lora.errors import AdapterError
from poc_lora.files import (
    allow_as_usual,
    commit_folder,
    links_root,
    read_json,
    require_new,
    sync,
    system_errors_as,
)

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
CHAT_TEMPLATE_NAME = "chat_template.jinja"
# What beside an adapter belongs to a tokenizer with more tokens, or another chat template, than the base's.
TOKENIZER_FILES = (
    "added_tokens.json", CHAT_TEMPLATE_NAME, "merges.txt", "special_tokens_map.json", "spiece.model",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
)  # fmt: skip
PICKLE_NAME = "adapter_model.bin"

_EXPERT = re.compile(r"(?<=\.experts)\.\d+\.", re.ASCII)

MAX_CONFIG_BYTES = 16 * 2**20  # as much as the header of the weights: it may name every module
MAX_TOKENIZER_BYTES = 2**28


@dataclass(frozen=True, repr=False)
class Adapter:
    """A LoRA adapter.

    Args:
        modules: The factors of each module, by its path in the base model (`model.layers.0.self_attn.q_proj`).
        base_model: The base model's Hub id or folder.
        revision: The base model's branch, tag or commit.
        source: Where the adapter comes from, for messages.
        embeddings: The modules that are embeddings; their ΔW [d, vocabulary] is added to the transposed table.
        fan_in_fan_out: The base keeps the weights of other modules transposed too, [d_in, d_out], as GPT-2 does. PEFT
            has one flag for all modules, and corrects it for each layer of the base.
        modules_to_save: The parameters that replace the base's (PEFT's modules_to_save), by path (`lm_head.weight`).
            One of `modules` is the table that its ΔW is added to: PEFT saves it beside the factors.
        task_type: PEFT's task type, which selects its model class; None selects `PeftModel`, which fits any model.
        auto_mapping: The base's class (`base_model_class`, `parent_library`), for PEFT's `AutoPeftModel`.
        targets: Module names (last parts of paths) known to match no other module of the base; see `target_modules`.
        pattern: PEFT's regular expression of `modules`, known to match no other module of the base.
    """

    modules: Mapping[str, Factors]
    base_model: str | None = None
    revision: str | None = None
    source: str = field(default="memory", compare=False)
    embeddings: frozenset[str] = frozenset()
    fan_in_fan_out: bool = False
    modules_to_save: Mapping[str, Tensor] = field(default_factory=dict)
    task_type: str | None = None
    auto_mapping: Mapping[str, str] | None = None
    targets: frozenset[str] = field(default=frozenset(), compare=False)
    pattern: str | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        whole = f", {len(self.modules_to_save)} parameters whole" if self.modules_to_save else ""
        ranks = sorted({self.rank(module) for module in self.modules})
        rank = f"rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "") if ranks else "no rank"
        return f"Adapter({len(self.modules)} modules, {rank}{whole}, base_model={self.base_model!r})"

    def rank(self, module: str) -> int:
        """The rank of a module's factors, without reading them."""
        return self.modules.rank(module) if isinstance(self.modules, LazyFactors) else self.modules[module].rank

    def shape(self, module: str) -> tuple[int, int]:
        """The shape [d_out, d_in] of a module's ΔW, without reading its factors."""
        return self.modules.shape(module) if isinstance(self.modules, LazyFactors) else self.modules[module].shape


def read_adapter(folder: str | Path, *, root: Path | None = None) -> Adapter:
    """Read a PEFT adapter folder into memory.

    The factors keep their stored dtype; their scale is alpha / r, or alpha / sqrt(r) with rsLoRA.

    Args:
        folder: The adapter's folder.
        root: The folder that symbolic links may not lead out of; by default `links_root(folder)`.

    Raises:
        AdapterError: A file is missing, damaged or too large, or the adapter is not plain LoRA.
    """
    opened = open_adapter(folder, root=root)
    return replace(opened, modules=dict(opened.modules), modules_to_save=dict(opened.modules_to_save))


def open_adapter(folder: str | Path, *, root: Path | None = None) -> Adapter:
    """Like `read_adapter`, but each tensor is read from the file when it is accessed, and not kept."""
    folder = Path(folder)
    with system_errors_as(AdapterError, "cannot be read", folder):
        config_path, weights_path = (
            real_file(folder, name, root or links_root(folder)) for name in (CONFIG_NAME, WEIGHTS_NAME)
        )
    config = read_json(config_path, error=AdapterError, max_bytes=MAX_CONFIG_BYTES)
    check_config(config, config_path)
    header = read_header(weights_path, config.get("modules_to_save") or ())
    scales = module_scales(config, {name: pair.shape_A[0] for name, pair in header.layers.items()}, config_path)
    return Adapter(
        modules=LazyFactors(header, scales),
        base_model=config.get("base_model_name_or_path") or None,
        revision=config.get("revision") or None,
        source=str(folder),
        embeddings=header.embeddings,
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        modules_to_save=LazyModulesToSave(header),
        task_type=config.get("task_type") or None,
        auto_mapping=auto_mapping(config),
        targets=plain_targets(config),
        pattern=target_pattern(config, list(header.layers), config_path),
    )


def write_adapter(
    adapter: Adapter,
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    extra_files: Mapping[str, str | bytes] | None = None,
) -> None:
    """Write an adapter as a new PEFT adapter folder, atomically; the same adapter gives the same bytes.

    All modules get one rank, the largest, and smaller ones are padded with zeros; lora_alpha = rank, and the scales go
    into B. The files are read back and compared before the folder gets its name.

    Args:
        adapter: The adapter to write.
        folder: The folder to create.
        dtype: The dtype of the factors; parameters of modules_to_save keep theirs.
        extra_files: The contents of further files, by name.

    Raises:
        RequestError: `folder` exists and is not empty, or `dtype` is none that adapters have.
        AdapterError: The adapter has no modules, or does not fit in `dtype`.
        WriteError: The disk could not be written to.
    """
    folder = Path(folder)
    _check_writable(adapter, folder, dtype)
    rank = max(factors.rank for factors in adapter.modules.values())
    tensors = {
        _saved_key(adapter, name): saved.detach().contiguous() for name, saved in adapter.modules_to_save.items()
    }
    for name, factors in adapter.modules.items():
        check_name(name, adapter.source)
        check_shapes(name, tuple(factors.A.shape), tuple(factors.B.shape), adapter.source)
        A, B = _padded(factors, rank, dtype)
        if not (is_finite(A) and is_finite(B)):
            if not factors.is_finite():
                raise AdapterError(f"the factors of {name} are not finite", where=adapter.source)
            what = f"the factors of {name} do not fit in {dtype}"
            raise AdapterError(what, where=adapter.source, fix="write float32 or bfloat16")
        key_A, key_B = _keys(adapter, name)
        tensors[key_A], tensors[key_B] = A, B
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": adapter.task_type,
        "auto_mapping": None if adapter.auto_mapping is None else dict(adapter.auto_mapping),
        "base_model_name_or_path": adapter.base_model,
        "revision": adapter.revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": adapter.pattern or target_modules(adapter.modules, adapter.targets),
        "bias": "none",
        "fan_in_fan_out": adapter.fan_in_fan_out,
        "init_lora_weights": True,
        "modules_to_save": sorted(
            {name.rpartition(".")[0] for name in adapter.modules_to_save} - adapter.modules.keys()
        )
        or None,
        "use_dora": False,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    texts: dict[str, str | bytes] = {CONFIG_NAME: json.dumps(config, indent=2) + "\n", **(extra_files or {})}
    with commit_folder(folder) as aside:
        # More metadata than this one key would be serialised in random order.
        save_file(tensors, aside / WEIGHTS_NAME, metadata={"format": "pt"})
        allow_as_usual(aside / WEIGHTS_NAME)
        for name, text in texts.items():
            (aside / name).write_bytes(text.encode() if isinstance(text, str) else text)
        with ThreadPoolExecutor(1) as pool:  # the disk is waited for anyway
            on_disk = pool.submit(sync, aside / WEIGHTS_NAME)
            _check_written(adapter, tensors, aside)
            on_disk.result()


def written_bytes(adapter: Adapter, rank: int) -> int:
    """Returns the bytes of the tensors that `write_adapter` writes in float32, of an adapter's modules at one rank."""
    widths = sum(sum(adapter.shape(name)) for name in adapter.modules)
    return 4 * rank * widths + sum(saved.nbytes for saved in adapter.modules_to_save.values())


def shared_tokenizer(folders: Sequence[tuple[Path, Path]]) -> dict[str, bytes]:
    """The files of the tokenizer that lies beside adapters, by name, where it is the same beside all.

    Args:
        folders: The adapters' folders, each with the folder that links may not lead out of.

    Raises:
        AdapterError: Adapters were saved with different tokenizers, so their token ids may mean different tokens.
    """
    shared: dict[str, bytes] = {}
    for name in TOKENIZER_FILES:
        paths = [real_file(folder, name, root) for folder, root in folders if (folder / name).is_file()]
        for path in paths:
            if path.stat().st_size > MAX_TOKENIZER_BYTES:
                raise AdapterError(f"{name} is larger than any tokenizer", where=path)
        contents = {path.read_bytes() for path in paths}
        if len(contents) > 1 and name in ("tokenizer.json", "added_tokens.json", "tokenizer.model"):
            fix = "merge adapters of one tokenizer, or remove its files from all folders if the base's own is meant"
            raise AdapterError(f"the adapters were saved with different tokenizers ({name})", where=paths[0], fix=fix)
        if len(contents) == 1:
            shared[name] = contents.pop()
    return shared


def target_modules(names: Iterable[str], known: Collection[str]) -> list[str]:
    """Returns the `target_modules` with which PEFT attaches exactly the modules `names`.

    These are last parts of paths, such as q_proj, if each is `known` to match no other module and matches one module,
    or one of each expert, in each layer 0..L-1 of a single stack; otherwise the full paths, which are always right.
    """
    names = sorted(names)
    layers_of: dict[str, dict[str, set[int]]] = {}  # suffix -> path with the layer left out -> layers
    for name in names:
        match = re.match(r"(?P<stack>(?:[^.]+\.)*?)(?P<layer>\d+)\.(?P<rest>.+)", name, re.ASCII)
        if match is None:
            return names
        path = f"{match['stack']}*.{_EXPERT.sub('.*.', match['rest'])}"
        layers_of.setdefault(name.rpartition(".")[2], {}).setdefault(path, set()).add(int(match["layer"]))
    stacks = [layers for paths in layers_of.values() for layers in paths.values()]
    regular = len(stacks) == len(layers_of) and all(layers == set(range(len(stacks[0]))) for layers in stacks)
    return sorted(layers_of) if regular and layers_of.keys() <= set(known) else names


def _padded(factors: Factors, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns A and B of the given rank and dtype, with the scale in B; not copied if they are so already."""
    A, B = factors.A.detach(), factors.B.detach()
    B = (B.double() * factors.scale if factors.scale != 1 else B).to(dtype)
    missing = rank - factors.rank
    if missing:
        A, B = functional.pad(A, (0, 0, 0, missing)), functional.pad(B, (0, missing))
    return A.to(dtype).contiguous(), B.contiguous()


def _keys(adapter: Adapter, module: str) -> tuple[str, str]:
    """PEFT's names of the module's A and B."""
    if module in adapter.embeddings:
        return f"{PREFIX}{module}.lora_embedding_A", f"{PREFIX}{module}.lora_embedding_B"
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"


def _saved_key(adapter: Adapter, name: str) -> str:
    """PEFT's name of a parameter of modules_to_save."""
    module, _, last = name.rpartition(".")
    return f"{PREFIX}{module}.base_layer.{last}" if module in adapter.modules else PREFIX + name


def _check_written(adapter: Adapter, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Raises AdapterError unless the folder reads back as these tensors, with scales of 1."""
    written = open_adapter(folder)
    saved = written.modules_to_save

    def same(module: str) -> bool:
        found, (key_A, key_B) = written.modules[module], _keys(adapter, module)
        return found.scale == 1 and torch.equal(found.A, tensors[key_A]) and torch.equal(found.B, tensors[key_B])

    if not (
        written.modules.keys() == adapter.modules.keys()
        and saved.keys() == adapter.modules_to_save.keys()
        and all(same(module) for module in adapter.modules)
        and all(
            torch.equal(tensor, tensors[_saved_key(adapter, name)]) for name, tensor in written.modules_to_save.items()
        )
    ):
        raise AdapterError(
            "the file does not read back as it was written", where=folder, fix="check the disk, and write again"
        )


def _check_writable(adapter: Adapter, folder: Path, dtype: torch.dtype) -> None:
    check_dtype(dtype)
    if not adapter.modules:
        raise AdapterError("an adapter without modules cannot be written", where=adapter.source)
    require_new(folder)


def real_file(folder: Path, name: str, root: Path) -> Path:
    """Returns the resolved path of a regular file; links may not lead out of `root`."""
    path = folder / name
    if not folder.is_dir():
        raise AdapterError("no such folder", where=folder, fix="give the folder that holds adapter_config.json")
    if not path.exists():
        if name == WEIGHTS_NAME and (folder / PICKLE_NAME).exists():
            raise AdapterError(
                f"the weights are in {PICKLE_NAME}, a pickle, which can run code when it is opened",
                where=folder,
                fix="if you trust it, convert it with PEFT: PeftModel.from_pretrained(base, FOLDER)"
                ".save_pretrained(NEW_FOLDER, safe_serialization=True)",
            )
        raise AdapterError(f"there is no {name}", where=folder, fix="a PEFT adapter has this file")
    real = path.resolve()
    if not real.is_relative_to(root.resolve()):
        raise AdapterError(f"{name} is a link that leads out of its folder", where=path, fix="copy the file there")
    if not real.is_file():
        raise AdapterError(f"{name} is not a plain file", where=path)
    return real
