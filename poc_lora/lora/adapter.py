"""One LoRA adapter: in memory, and on disk in PEFT's format, read as untrusted.

Reading is default-deny. Only what leaves no doubt about ΔW = scale · B A is accepted; anything else is an
AdapterError that says why, before a tensor is read. Nothing in the folder but the two named files is opened.
"""

import json
import math
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from poc_lora.errors import AdapterError, PocLoraError
from poc_lora.files import commit_folder, read_json
from poc_lora.lora.peft_config import MAX_NAME, MAX_RANK, check_config, module_scales

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
PREFIX = "base_model.model."  # PEFT's wrapper around the base model, in every tensor name

MAX_CONFIG_BYTES = 2**20
MAX_HEADER_BYTES = 16 * 2**20
MAX_WEIGHTS_BYTES = 32 * 2**30
MAX_MODULES = 2**14
MAX_WIDTH = 2**20

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_TENSOR = re.compile(re.escape(PREFIX) + r"(?P<module>.+)\.lora_(?P<factor>(embedding_)?[AB])(?P<weight>\.weight)?")


@dataclass(frozen=True)
class Factors:
    """One module's update ΔW = scale · B A, with A [r, d_in] and B [d_out, r]."""

    A: Tensor
    B: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1]:
            raise AdapterError(
                f"factors of shapes A {list(self.A.shape)} and B {list(self.B.shape)} have no product B A",
                fix="A is [r, d_in] and B is [d_out, r]",
            )

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """The shape [d_out, d_in] of ΔW."""
        return self.B.shape[0], self.A.shape[1]

    def is_finite(self) -> bool:
        return math.isfinite(self.scale) and _finite(self.A) and _finite(self.B)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: module path in the base model (such as `model.layers.0.self_attn.q_proj`) to factors.

    embeddings: the modules that are embeddings, whose ΔW [d, vocabulary] is added to the transposed table.
    fan_in_fan_out: the base keeps the weights of the other modules transposed too, [d_in, d_out], as GPT-2 does.
    """

    modules: dict[str, Factors]
    base_model: str | None = None
    revision: str | None = None
    source: str = field(default="memory", compare=False)
    embeddings: frozenset[str] = frozenset()
    fan_in_fan_out: bool = False

    def is_transposed(self, module: str) -> bool:
        """Whether the base's weight of a module has the shape of ΔW transposed."""
        return self.fan_in_fan_out or module in self.embeddings


def read_adapter(folder: Path, *, root: Path | None = None) -> Adapter:
    """Read a PEFT adapter folder; the factors keep their stored dtype, the scale is alpha / r or alpha / sqrt(r).

    root: the folder that links may not lead out of, default the adapter's own.
    Raises AdapterError for whatever is missing, damaged, too large, or not plain LoRA.
    """
    folder = Path(folder)
    try:
        config_path, weights_path = (_real_file(folder, name, root or folder) for name in (CONFIG_NAME, WEIGHTS_NAME))
    except OSError as problem:
        raise AdapterError(f"cannot be read: {problem.strerror}", where=folder) from None
    config = read_json(config_path, error=AdapterError, max_bytes=MAX_CONFIG_BYTES)
    check_config(config, config_path)
    tensors, embeddings = _read_tensors(weights_path)
    scales = module_scales(config, {name: A.shape[0] for name, (A, _) in tensors.items()}, config_path)
    return Adapter(
        modules={name: Factors(A, B, scales[name]) for name, (A, B) in tensors.items()},
        base_model=config.get("base_model_name_or_path") or None,
        revision=config.get("revision") or None,
        source=str(folder),
        embeddings=embeddings,
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
    )


def write_adapter(
    adapter: Adapter,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    extra_files: Mapping[str, str] | None = None,
) -> None:
    """Write `adapter` as a new PEFT adapter folder, whole or not at all; same adapter, same bytes.

    One rank for all modules (the largest; smaller ones are padded with zeros), lora_alpha = rank, the scales
    folded into B. `extra_files`: further text files of the folder by name. Raises AdapterError for an adapter
    that cannot be written in `dtype`, RequestError if `folder` exists.
    """
    folder = Path(folder)
    _check_writable(adapter, folder, dtype)
    rank = max(factors.rank for factors in adapter.modules.values())
    tensors = {}
    for name, factors in adapter.modules.items():
        A, B = _padded(factors, rank, dtype)
        if not (_finite(A) and _finite(B)):
            what = f"the factors of {name} do not fit in {dtype}"
            raise AdapterError(what, where=adapter.source, fix="write float32 or bfloat16")
        kind = "lora_embedding_{}" if name in adapter.embeddings else "lora_{}.weight"
        tensors[f"{PREFIX}{name}.{kind.format('A')}"], tensors[f"{PREFIX}{name}.{kind.format('B')}"] = A, B
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base_model,
        "revision": adapter.revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": target_modules(adapter.modules),
        "bias": "none",
        "fan_in_fan_out": adapter.fan_in_fan_out,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    texts = {CONFIG_NAME: json.dumps(config, indent=2) + "\n", **(extra_files or {})}
    try:
        with commit_folder(folder) as aside:
            # More metadata than this one key would be serialised in random order.
            save_file(tensors, aside / WEIGHTS_NAME, metadata={"format": "pt"})
            (aside / WEIGHTS_NAME).chmod(0o644)
            for name, text in texts.items():
                (aside / name).write_text(text, encoding="utf-8")
    except (OSError, SafetensorError) as problem:
        raise PocLoraError(f"the adapter could not be written: {problem}", where=folder) from None


def target_modules(names: Iterable[str]) -> list[str]:
    """The `target_modules` under which PEFT attaches the modules `names`.

    Short suffixes such as q_proj where every one of them names one module in each of the layers 0..L-1 of a
    single stack; else full module paths, which are always right.
    """
    names = sorted(names)
    layers_of: dict[str, dict[str, set[int]]] = {}  # suffix -> path with the layer left out -> layers
    for name in names:
        match = re.match(r"(?P<stack>(?:[^.]+\.)*?)(?P<layer>\d+)\.(?P<rest>.+)", name, re.ASCII)
        if match is None:
            return names
        path = f"{match['stack']}*.{match['rest']}"
        layers_of.setdefault(name.rpartition(".")[2], {}).setdefault(path, set()).add(int(match["layer"]))
    stacks = [layers for paths in layers_of.values() for layers in paths.values()]
    regular = len(stacks) == len(layers_of) and all(layers == set(range(len(stacks[0]))) for layers in stacks)
    return sorted(layers_of) if regular else names


def _finite(tensor: Tensor) -> bool:
    # One pass and no copy: minimum and maximum carry a NaN through.
    return tensor.numel() == 0 or all(math.isfinite(bound.item()) for bound in torch.aminmax(tensor.detach()))


def _padded(factors: Factors, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    d_out, d_in = factors.shape
    A = torch.zeros(rank, d_in, dtype=dtype)
    B = torch.zeros(d_out, rank, dtype=dtype)
    A[: factors.rank] = factors.A.detach()
    B[:, : factors.rank] = (factors.B.detach().double() * factors.scale).to(dtype)
    return A, B


def _check_writable(adapter: Adapter, folder: Path, dtype: torch.dtype) -> None:
    if dtype not in DTYPES.values():
        raise AdapterError(f"an adapter cannot be written in {dtype}", fix="use float32, bfloat16 or float16")
    if not adapter.modules:
        raise AdapterError("an adapter without modules cannot be written", where=adapter.source)
    if folder.exists():
        raise AdapterError("the folder to write exists already", where=folder, fix="choose another or remove this one")
    for name, factors in adapter.modules.items():
        _check_name(name, adapter.source)
        _check_shapes(name, tuple(factors.A.shape), tuple(factors.B.shape), adapter.source)
        if not factors.is_finite():
            raise AdapterError(f"the factors of {name} are not finite", where=adapter.source)


def _real_file(folder: Path, name: str, root: Path) -> Path:
    """The real path of a plain file of the folder; links may not lead out of `root`."""
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


def _read_tensors(path: Path) -> tuple[dict[str, tuple[Tensor, Tensor]], frozenset[str]]:
    """Factors by module, and which modules are embeddings.

    Names, dtypes, shapes and sizes are checked on the header before any tensor is read.
    """
    try:
        _check_sizes(path)
        with safe_open(path, framework="pt") as stored:
            found: dict[str, dict[str, str]] = {}
            for key in stored.keys():  # noqa: SIM118  (safe_open is no mapping)
                match = _TENSOR.fullmatch(key)
                if match is None or bool(match["weight"]) == match["factor"].startswith("embedding_"):
                    fix = (
                        f"only {PREFIX}<module>.lora_A.weight, .lora_B.weight and .lora_embedding_A, _B are understood"
                    )
                    what = f"the tensor {key[:MAX_NAME]!r} is not a LoRA factor of a linear layer or an embedding"
                    raise AdapterError(what, where=path, fix=fix)
                found.setdefault(match["module"], {})[match["factor"]] = key
            if not 0 < len(found) <= MAX_MODULES:
                raise AdapterError(f"{len(found)} modules, where 1 to {MAX_MODULES} are read", where=path)
            for module, keys in found.items():
                _check_header(module, {factor: stored.get_slice(key) for factor, key in keys.items()}, path)
            tensors = {
                module: (stored.get_tensor(first), stored.get_tensor(second))
                for module, (first, second) in sorted((m, _in_order(keys)) for m, keys in found.items())
            }
    except (SafetensorError, OSError, ValueError, RuntimeError) as problem:
        raise AdapterError(f"not a readable safetensors file: {problem}", where=path, fix="fetch it again") from None
    for module, pair in tensors.items():
        if not all(map(_finite, pair)):
            raise AdapterError(f"the factors of {module} hold NaN or infinity", where=path, fix="retrain this adapter")
    return tensors, frozenset(module for module, keys in found.items() if "embedding_A" in keys)


def _in_order(keys: dict[str, str]) -> tuple[str, str]:
    """The keys of A and of B."""
    first, second = (key for _, key in sorted(keys.items()))
    return first, second


def _check_sizes(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as handle:
        start = handle.read(8)
    header = struct.unpack("<Q", start)[0] if len(start) == 8 else None
    if header is None or header > size:
        raise AdapterError("not a safetensors file, or only a part of one", where=path, fix="fetch it again")
    if header > MAX_HEADER_BYTES or size > MAX_WEIGHTS_BYTES:
        raise AdapterError(f"larger than any adapter should be ({size:,} bytes, header {header:,})", where=path)


def _check_header(module: str, slices: dict[str, Any], where: Path) -> None:
    _check_name(module, where)
    if set(slices) not in ({"A", "B"}, {"embedding_A", "embedding_B"}):
        found = " and ".join(f"lora_{factor}" for factor in sorted(slices))
        raise AdapterError(f"{module} has {found} without its partner", where=where)
    for factor, part in slices.items():
        if part.get_dtype() not in DTYPES:
            raise AdapterError(f"lora_{factor} of {module} is {part.get_dtype()}, not F32, F16 or BF16", where=where)
    A, B = (tuple(part.get_shape()) for _, part in sorted(slices.items()))
    _check_shapes(module, A, B, where)


def _check_name(module: str, where: str | Path) -> None:
    if len(module) > MAX_NAME or not _NAME.fullmatch(module):
        raise AdapterError(f"{module[:MAX_NAME]!r} is not a module path", where=where)


def _check_shapes(module: str, A: tuple[int, ...], B: tuple[int, ...], where: str | Path) -> None:
    shapes = f"A {list(A)} and B {list(B)}"
    if len(A) != 2 or len(B) != 2 or A[0] != B[1]:
        raise AdapterError(f"{module} has factors {shapes}, not [r, d_in] and [d_out, r]", where=where)
    if not (1 <= A[0] <= MAX_RANK and 1 <= A[1] <= MAX_WIDTH and 1 <= B[0] <= MAX_WIDTH):
        raise AdapterError(f"{module} has factors {shapes}, outside rank {MAX_RANK} or width {MAX_WIDTH}", where=where)
