"""An adapter's file of tensors, from a stranger: judged by its header alone, then read tensor by tensor when asked."""

import contextlib
import re
import struct
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from poc_lora.adapters.factors import DTYPES, MAX_NAME, MAX_WIDTH, Factors, check_name, check_shapes, is_finite
from poc_lora.errors import AdapterError

PREFIX = "base_model.model."  # PEFT's wrapper around the base model, in every tensor name

MAX_HEADER_BYTES = 16 * 2**20
MAX_WEIGHTS_BYTES = 32 * 2**30
MAX_MODULES = 2**14

_FACTOR = re.compile(re.escape(PREFIX) + r"(?P<module>.+)\.lora_(?P<factor>(embedding_)?[AB])(?P<weight>\.weight)?")


@dataclass(frozen=True)
class Pair:
    """Where a module's factors are in the file: the names of A and B, and their shapes."""

    key_A: str
    key_B: str
    shape_A: tuple[int, ...]
    shape_B: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """What a file of tensors holds, found to be plain LoRA within the limits."""

    path: Path
    pairs: Mapping[str, Pair]  # by module, in order of name
    embeddings: frozenset[str]  # the modules that are embeddings
    whole: Mapping[str, tuple[int, ...]]  # shapes of the tensors of modules saved whole, by parameter path


def read_header(path: Path, modules_to_save: Collection[str] = ()) -> Header:
    """Check names, dtypes, shapes and sizes on the header, and read no tensor.

    modules_to_save: the modules that may be there whole, by their last parts, as in PEFT.
    Raises AdapterError for whatever is damaged, too large, or not understood.
    """
    found: dict[str, dict[str, str]] = {}
    whole: dict[str, tuple[int, ...]] = {}
    with _opened(path) as stored:
        for key in stored.keys():  # noqa: SIM118  (safe_open is no mapping)
            match = _FACTOR.fullmatch(key)
            if match and bool(match["weight"]) != match["factor"].startswith("embedding_"):
                found.setdefault(match["module"], {})[match["factor"]] = key
            elif key.startswith(PREFIX) and _is_of(key.removeprefix(PREFIX), modules_to_save):
                whole[key.removeprefix(PREFIX)] = _check_whole(key, stored.get_slice(key), path)
            else:
                fix = f"only {PREFIX}<module>.lora_A.weight, .lora_B.weight and .lora_embedding_A, _B are understood"
                if key.endswith(".base_layer.weight"):
                    fix = "it is the base's own: save without it, save_pretrained(DIR, save_embedding_layers=False)"
                what = f"the tensor {key[:MAX_NAME]!r} is not a LoRA factor of a linear layer or an embedding"
                raise AdapterError(what, where=path, fix=fix)
        if not 0 < len(found) <= MAX_MODULES or len(whole) > MAX_MODULES:
            raise AdapterError(f"{len(found)} modules, where 1 to {MAX_MODULES} are read", where=path)
        pairs = {module: _check_pair(module, found[module], stored.get_slice, path) for module in sorted(found)}
    missing = [name for name in modules_to_save if not any(_is_of(key, [name]) for key in whole)]
    # PEFT names both of these for every classifier, which has one of them.
    if missing and (not whole or set(missing) - {"classifier", "score"}):
        what = f"modules_to_save names {missing[0][:MAX_NAME]!r}, which is not in the file"
        raise AdapterError(what, where=path, fix="save the adapter again, with PEFT's save_pretrained")
    embeddings = frozenset(module for module, keys in found.items() if "embedding_A" in keys)
    return Header(path, pairs, embeddings, dict(sorted(whole.items())))


class StoredFactors(Mapping[str, Factors]):
    """A file's factors by module. Each is read when it is asked for, and not kept: one module is in memory at a time.

    Asking raises AdapterError where the factors hold NaN or infinity, or the file has changed since its header was
    read.
    """

    def __init__(self, header: Header, scales: Mapping[str, float]):
        self.header = header
        self.scales = scales

    def __getitem__(self, module: str) -> Factors:
        pair, path = self.header.pairs[module], self.header.path
        # Opened anew for every module: what was read of a file stays in memory for as long as it is open.
        with _opened(path) as stored:
            A, B = stored.get_tensor(pair.key_A), stored.get_tensor(pair.key_B)
        if (tuple(A.shape), tuple(B.shape)) != (pair.shape_A, pair.shape_B):
            raise AdapterError("the file has changed while it was read", where=path)
        _refuse_not_finite(f"the factors of {module}", path, A, B)
        return Factors(A, B, self.scales[module])

    def __contains__(self, module: object) -> bool:
        return module in self.header.pairs

    def __iter__(self) -> Iterator[str]:
        return iter(self.header.pairs)

    def __len__(self) -> int:
        return len(self.header.pairs)

    def rank(self, module: str) -> int:
        """The rank of a module's factors, from the header."""
        return self.header.pairs[module].shape_A[0]

    def shape(self, module: str) -> tuple[int, int]:
        """The shape [d_out, d_in] of a module's ΔW, from the header."""
        pair = self.header.pairs[module]
        return pair.shape_B[0], pair.shape_A[1]


class StoredWhole(Mapping[str, Tensor]):
    """The parameters of a file's modules that were saved whole, by path; read when they are asked for, and not kept."""

    def __init__(self, header: Header):
        self.header = header

    def __getitem__(self, name: str) -> Tensor:
        shape, path = self.header.whole[name], self.header.path
        with _opened(path) as stored:
            tensor: Tensor = stored.get_tensor(PREFIX + name)
        if tuple(tensor.shape) != shape:
            raise AdapterError("the file has changed while it was read", where=path)
        _refuse_not_finite(name, path, tensor)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self.header.whole

    def __iter__(self) -> Iterator[str]:
        return iter(self.header.whole)

    def __len__(self) -> int:
        return len(self.header.whole)


def _refuse_not_finite(what: str, path: Path, *tensors: Tensor) -> None:
    if not all(map(is_finite, tensors)):
        raise AdapterError(f"NaN or infinity in {what}", where=path, fix="leave this adapter out, or retrain it")


def _is_of(parameter: str, modules: Collection[str]) -> bool:
    """Whether a parameter is inside one of the modules, which are named by their last parts."""
    return any(f".{name}." in f".{parameter}" for name in modules)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        _check_sizes(path)
        with safe_open(path, framework="pt") as stored:
            yield stored
    except AdapterError:  # a ValueError too
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError) as problem:
        raise AdapterError(f"not a readable safetensors file: {problem}", where=path, fix="fetch it again") from problem


def _check_sizes(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as handle:
        start = handle.read(8)
    header = struct.unpack("<Q", start)[0] if len(start) == 8 else None
    if header is None or header > size:
        raise AdapterError("not a safetensors file, or only a part of one", where=path, fix="fetch it again")
    if header > MAX_HEADER_BYTES or size > MAX_WEIGHTS_BYTES:
        raise AdapterError(f"larger than any adapter should be ({size:,} bytes, header {header:,})", where=path)


def _check_pair(module: str, keys: dict[str, str], slice_of: Callable[[str], Any], where: Path) -> Pair:
    check_name(module, where)
    if set(keys) not in ({"A", "B"}, {"embedding_A", "embedding_B"}):
        found = " and ".join(f"lora_{factor}" for factor in sorted(keys))
        raise AdapterError(f"{module} has {found} without its partner", where=where)
    parts = {factor: slice_of(key) for factor, key in keys.items()}
    for factor, part in parts.items():
        _check_dtype(f"lora_{factor} of {module}", part, where)
    (factor_A, A), (factor_B, B) = ((factor, tuple(part.get_shape())) for factor, part in sorted(parts.items()))
    check_shapes(module, A, B, where)
    return Pair(keys[factor_A], keys[factor_B], A, B)


def _check_whole(key: str, part: Any, where: Path) -> tuple[int, ...]:
    check_name(key.removeprefix(PREFIX), where)
    _check_dtype(key, part, where)
    shape = tuple(part.get_shape())
    if not 1 <= len(shape) <= 4 or not all(1 <= width <= MAX_WIDTH for width in shape):
        raise AdapterError(f"{key} has the shape {list(shape)}, outside width {MAX_WIDTH}", where=where)
    return shape


def _check_dtype(what: str, part: Any, where: Path) -> None:
    if part.get_dtype() not in DTYPES:
        raise AdapterError(f"{what} is {part.get_dtype()}, not F32, F16 or BF16", where=where)
