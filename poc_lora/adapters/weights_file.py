"""An adapter's safetensors file, untrusted: checked by its header alone, then read lazily, tensor by tensor."""

import re
import struct
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import safe_open
from torch import Tensor

from poc_lora.adapters.factors import DTYPES, MAX_NAME, MAX_WIDTH, Factors, check_name, check_shapes, is_finite
from poc_lora.errors import AdapterError
from poc_lora.files import open_safetensors, refusing_damage, require_plain

PREFIX = "base_model.model."  # PEFT's wrapper around the base model, in every tensor name
# Left in names by torch.compile, gradient checkpointing and FSDP.
WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")

MAX_HEADER_BYTES = 16 * 2**20
MAX_WEIGHTS_BYTES = 32 * 2**30

_FACTOR = re.compile(re.escape(PREFIX) + r"(?P<module>.+)\.lora_(?P<factor>(embedding_)?[AB])(?P<weight>\.weight)?")
# PEFT's wrapper around a module that is trained whole: the trained copy, and the base's own.
_WRAPPED = re.compile(re.escape(PREFIX) + r"(?P<module>.+)\.(?P<copy>modules_to_save|original_module)\.(?P<last>[^.]+)")
# The tables that PEFT saves, without naming them in its configuration, once the vocabulary was resized; base_layer
# where they have factors too.
_TABLES = "embed_tokens|lm_head|wte|word_embeddings|tok_embeddings|embeddings|embed_in|embed_out|output_layer|shared"
_TABLE = re.compile(re.escape(PREFIX) + rf"((.+\.)?({_TABLES}))\.weight")
_BASE = re.compile(re.escape(PREFIX) + r"(?P<module>.+)\.base_layer\.(?P<last>weight|bias)")


@dataclass(frozen=True)
class LayerWeights:
    """A module's factors in the file: the names and shapes of A and B."""

    key_A: str
    key_B: str
    shape_A: tuple[int, ...]
    shape_B: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """The contents of a weights file, once its header has passed the checks."""

    path: Path
    layers: Mapping[str, LayerWeights]  # by module, sorted
    embeddings: frozenset[str]  # the modules that are embeddings
    modules_to_save: Mapping[str, tuple[int, ...]]  # the shapes of their parameters, by path
    saved_keys: Mapping[str, tuple[str, ...]]  # their names in the file; two hold the same values


def read_header(path: Path, modules_to_save: Collection[str] = ()) -> Header:
    """Check the names, dtypes, shapes and sizes in a file's header, without reading a tensor.

    Args:
        path: The safetensors file.
        modules_to_save: PEFT's names (last parts of paths) of modules whose parameters are in the file.

    Raises:
        AdapterError: The file is damaged, too large, or has tensors other than LoRA factors and modules_to_save.
    """
    found: dict[str, dict[str, str]] = {}
    saved: dict[str, tuple[int, ...]] = {}
    saved_keys: dict[str, tuple[str, ...]] = {}
    in_file: dict[str, str] = {}
    based: dict[str, str] = {}
    _header_bytes(path)
    with open_safetensors(path, error=AdapterError) as stored:
        for key in stored.keys():  # noqa: SIM118  (safe_open is no mapping)
            plain = _unwrapped(key)
            if plain in in_file:
                what = f"{key[:MAX_NAME]!r} and {in_file[plain][:MAX_NAME]!r} are one tensor"
                raise AdapterError(what, where=path, fix="save the adapter again, from the model without wrappers")
            in_file[plain] = key
            if plain.startswith(PREFIX * 2):
                what = f"{key[:MAX_NAME]!r} was trained on a base that has an adapter already"
                raise AdapterError(what, where=path, fix="fold that adapter into the base before training on it")
            match = _FACTOR.fullmatch(plain)
            if match and bool(match["weight"]) != match["factor"].startswith("embedding_"):
                found.setdefault(match["module"], {})[match["factor"]] = key
            elif (wrapped := _WRAPPED.fullmatch(plain)) and _is_of(f"{wrapped['module']}.", modules_to_save):
                if wrapped["copy"] == "modules_to_save":
                    name = f"{wrapped['module']}.{wrapped['last']}"
                    _add_saved(name, key, stored.get_slice(key), path, saved, saved_keys)
            elif base := _BASE.fullmatch(plain):
                _add_saved(f"{base['module']}.{base['last']}", key, stored.get_slice(key), path, saved, saved_keys)
                based[base["module"]] = key
            elif (plain.startswith(PREFIX) and _is_of(plain.removeprefix(PREFIX), modules_to_save)) or (
                _TABLE.fullmatch(plain) and len(stored.get_slice(key).get_shape()) == 2
            ):
                _add_saved(plain.removeprefix(PREFIX), key, stored.get_slice(key), path, saved, saved_keys)
            else:
                _refuse(key, path)
        for module, key in based.items():  # that of another layer was changed, as by PiSSA, or PEFT would not save it
            factors = found.get(module, {})
            if not ("embedding_A" in factors or (factors and _TABLE.fullmatch(f"{PREFIX}{module}.weight"))):
                _refuse(key, path)
        if not found:
            raise AdapterError("there are no LoRA factors in the file", where=path)
        layers = {module: _check_layer(module, found[module], stored.get_slice, path) for module in sorted(found)}
    missing = [name for name in modules_to_save if not any(_is_of(key, [name]) for key in saved)]
    # PEFT lists both of these for every classifier, which has only one of them.
    if missing and (not saved or set(missing) - {"classifier", "score"}):
        what = f"modules_to_save names {missing[0][:MAX_NAME]!r}, which is not in the file"
        raise AdapterError(what, where=path, fix="save the adapter again, with PEFT's save_pretrained")
    embeddings = frozenset(module for module, keys in found.items() if "embedding_A" in keys)
    return Header(path, layers, embeddings, dict(sorted(saved.items())), saved_keys)


class LazyFactors(Mapping[str, Factors]):
    """The factors in a file by module, read at each access and not kept, so that memory holds one module at a time.

    Access raises AdapterError for NaN or infinity, and if the file has changed since its header was read.
    """

    def __init__(self, header: Header, scales: Mapping[str, float]):
        self.header = header
        self.scales = scales
        self._tensors = _Tensors(header.path)

    def __getitem__(self, module: str) -> Factors:
        layer, path = self.header.layers[module], self.header.path
        A, B = self._tensors.read(layer.key_A, layer.key_B)
        if (tuple(A.shape), tuple(B.shape)) != (layer.shape_A, layer.shape_B):
            raise AdapterError("the file changed while it was being read", where=path)
        _refuse_not_finite(f"the factors of {module}", path, A, B)
        return Factors(A, B, self.scales[module])

    def __contains__(self, module: object) -> bool:
        return module in self.header.layers

    def __iter__(self) -> Iterator[str]:
        return iter(self.header.layers)

    def __len__(self) -> int:
        return len(self.header.layers)

    def rank(self, module: str) -> int:
        """The rank of a module's factors, from the header."""
        return self.header.layers[module].shape_A[0]

    def shape(self, module: str) -> tuple[int, int]:
        """The shape [d_out, d_in] of a module's ΔW, from the header."""
        layer = self.header.layers[module]
        return layer.shape_B[0], layer.shape_A[1]


class LazyModulesToSave(Mapping[str, Tensor]):
    """The parameters of modules_to_save in a file by path, read at each access and not kept."""

    def __init__(self, header: Header):
        self.header = header
        self._tensors = _Tensors(header.path)

    def __getitem__(self, name: str) -> Tensor:
        shape, path = self.header.modules_to_save[name], self.header.path
        tensor, *twins = self._tensors.read(*self.header.saved_keys[name])
        if any(not torch.equal(tensor, twin) for twin in twins):
            fix = "save the adapter again, with PEFT's save_pretrained"
            raise AdapterError(f"{name} is there twice, with different values", where=path, fix=fix)
        if tuple(tensor.shape) != shape:
            raise AdapterError("the file changed while it was being read", where=path)
        _refuse_not_finite(name, path, tensor)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self.header.modules_to_save

    def __iter__(self) -> Iterator[str]:
        return iter(self.header.modules_to_save)

    def __len__(self) -> int:
        return len(self.header.modules_to_save)


class _Tensors:
    """Reads tensors from a file, and opens it again once they are as large as its header.

    Pages that were read stay in memory for as long as the file is open, but every opening parses the whole header: of
    many small modules it would be parsed in a time quadratic in their number.
    """

    def __init__(self, path: Path):
        self._path = path
        self._stored: Any = None
        self._left = 0  # bytes to read before the file is opened again

    def read(self, *names: str) -> list[Tensor]:
        with refusing_damage(self._path, error=AdapterError):
            if self._left <= 0:
                self._stored = None
                self._left = _header_bytes(self._path)
                self._stored = safe_open(self._path, framework="pt")
            tensors = [self._stored.get_tensor(name) for name in names]
        self._left -= sum(tensor.nbytes for tensor in tensors)
        return tensors


def _unwrapped(key: str) -> str:
    """A tensor's name without the names of wrappers, which PEFT would not find in the base model."""
    key = WRAPPERS.sub("", key).removeprefix("module.")  # module: DistributedDataParallel's
    return PREFIX + key.removeprefix(PREFIX).removeprefix("module.") if key.startswith(PREFIX) else key


def _refuse(key: str, where: Path) -> NoReturn:
    fix = f"only {PREFIX}<module>.lora_A.weight, .lora_B.weight and .lora_embedding_A, _B are understood"
    if ".base_layer." in key:
        fix = "it is the base's own: save the adapter again, with PEFT's save_pretrained"
    what = f"the tensor {key[:MAX_NAME]!r} is not a LoRA factor of a linear layer or an embedding"
    raise AdapterError(what, where=where, fix=fix)


def _refuse_not_finite(what: str, path: Path, *tensors: Tensor) -> None:
    if not all(map(is_finite, tensors)):
        raise AdapterError(f"NaN or infinity in {what}", where=path, fix="leave this adapter out, or retrain it")


def _is_of(parameter: str, modules: Collection[str]) -> bool:
    """Whether a parameter belongs to one of the modules, which PEFT names by how their paths end: norm, layernorm."""
    return any(f"{name}." in parameter for name in modules)


def _header_bytes(path: Path) -> int:
    """The length of a file's header; raises AdapterError if it or the file is too large."""
    with refusing_damage(path, error=AdapterError):
        require_plain(path, error=AdapterError)
        size = path.stat().st_size
        with path.open("rb") as handle:
            start = handle.read(8)
    header: int = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
    if not 0 <= header <= size:
        raise AdapterError("not a safetensors file, or only a part of one", where=path, fix="fetch it again")
    if header > MAX_HEADER_BYTES or size > MAX_WEIGHTS_BYTES:
        raise AdapterError(f"larger than any adapter should be ({size:,} bytes, header {header:,})", where=path)
    return header


def _check_layer(module: str, keys: dict[str, str], slice_of: Callable[[str], Any], where: Path) -> LayerWeights:
    check_name(module, where)
    if set(keys) not in ({"A", "B"}, {"embedding_A", "embedding_B"}):
        found = " and ".join(f"lora_{factor}" for factor in sorted(keys))
        raise AdapterError(f"{module} has {found} without its partner", where=where)
    parts = {factor: slice_of(key) for factor, key in keys.items()}
    for factor, part in parts.items():
        _check_dtype(f"lora_{factor} of {module}", part, where)
    (factor_A, A), (factor_B, B) = ((factor, tuple(part.get_shape())) for factor, part in sorted(parts.items()))
    check_shapes(module, A, B, where)
    return LayerWeights(keys[factor_A], keys[factor_B], A, B)


def _add_saved(
    name: str,
    key: str,
    part: Any,
    where: Path,
    saved: dict[str, tuple[int, ...]],
    keys: dict[str, tuple[str, ...]],
) -> None:
    shape = _check_saved(key, part, where)
    if saved.setdefault(name, shape) != shape:
        raise AdapterError(f"{name} is there twice, with different shapes", where=where)
    keys[name] = (*keys.get(name, ()), key)


def _check_saved(key: str, part: Any, where: Path) -> tuple[int, ...]:
    check_name(key.removeprefix(PREFIX), where)
    _check_dtype(key, part, where)
    shape = tuple(part.get_shape())
    if not 1 <= len(shape) <= 4 or not all(1 <= width <= MAX_WIDTH for width in shape):
        raise AdapterError(f"{key} has the shape {list(shape)}, outside width {MAX_WIDTH}", where=where)
    return shape


def _check_dtype(what: str, part: Any, where: Path) -> None:
    if part.get_dtype() not in DTYPES:
        fix = "save the adapter in float32, float16 or bfloat16"
        raise AdapterError(f"{what} is {part.get_dtype()}, not F32, F16 or BF16", where=where, fix=fix)
