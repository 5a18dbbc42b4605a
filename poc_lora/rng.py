"""Random streams keyed by what a draw is for, never by when or where it is made.

Every random number of a run is a function of `(seed, adapter, purpose, step, name)`. There is no random
state to carry, save or restore: packing, resuming and moving between processes cannot change a draw.

The numbers of a stream also depend on the kind of device that draws them, and normal and uniform numbers drawn on CUDA
on the GPU's number of multiprocessors as well. So a run's noise is bitwise the same on GPUs of one kind, and equal in
law on others; initial weights, orders and dropout are the same everywhere.
"""

import hashlib
import struct

import torch
from torch import Tensor

_MASK32 = (1 << 32) - 1


def key(seed: int, adapter: int, purpose: str, step: int = 0, name: str = "") -> int:
    """The stable 64-bit hash that names one stream. Same arguments, same key, on every machine."""
    parts = (str(seed), str(adapter), purpose, str(step), name)
    digest = hashlib.blake2b(digest_size=8, person=b"poc_lora-rng")
    for part in parts:
        encoded = part.encode()
        digest.update(struct.pack("<Q", len(encoded)) + encoded)
    return int.from_bytes(digest.digest(), "little")


def generator(stream_key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator at the start of the stream `stream_key`."""
    stream = torch.Generator(device=device)
    stream.manual_seed(stream_key)
    if stream.device.type == "cpu":
        # torch's CPU generator keeps only the low 32 bits of a seed: a long run would meet the same
        # stream twice. Twelve of the high bits choose an offset into it, so that two keys with equal
        # low bits (about seven pairs among the 250,000 draws of a long run) still give numbers that are not aligned.
        torch.rand(1 + (stream_key >> 52), generator=stream)
    return stream


def normal(shape: tuple[int, ...], stream_key: int, device: torch.device | str = "cpu") -> Tensor:
    """Standard normal float32 numbers of `shape` from the stream `stream_key`, drawn contiguously.

    On CUDA they depend on the number of multiprocessors: bitwise the same on GPUs of one kind, equal in law on others.
    """
    return torch.randn(shape, generator=generator(stream_key, device), device=device)


def uniform(shape: tuple[int, ...], stream_key: int, device: torch.device | str = "cpu") -> Tensor:
    """Float32 numbers uniform in [0, 1) of `shape` from the stream `stream_key`."""
    return torch.rand(shape, generator=generator(stream_key, device), device=device)


def permutation(n: int, stream_key: int) -> list[int]:
    """A uniformly random order of `range(n)`."""
    return torch.randperm(n, generator=generator(stream_key)).tolist()


def salt_words(salt: int, device: torch.device | str = "cpu") -> Tensor:
    """The low and the high half of a 64-bit key, as `elementwise_bits` takes them: int32 [2]."""
    return torch.tensor([_signed(salt & _MASK32), _signed(salt >> 32 & _MASK32)], dtype=torch.int32, device=device)


def elementwise_bits(row_keys: Tensor, salt: Tensor, length: int, width: int) -> Tensor:
    """24 random bits each, int32 [rows, length, width]: element (i, t, k) is a function of `row_keys[i]`, `salt`, t, k.

    A counter-based draw: a row's numbers stay the same whatever the other rows, the padding, or the
    number of rows, and recomputing them (gradient checkpointing) needs no saved state. `row_keys`: int64
    [rows]; `salt`: `salt_words` of the call site, whose `width` never changes. In 32-bit arithmetic, which
    wraps around: a GPU does it many times faster than 64-bit arithmetic.
    """
    position = torch.arange(length * width, device=row_keys.device, dtype=torch.int32)
    low = _mix32(row_keys.to(torch.int32) ^ salt[0])
    high = _mix32((row_keys >> 32).to(torch.int32) ^ salt[1])
    bits = _mix32(_mix32(position + low[:, None]).bitwise_xor_(high[:, None]))
    return _shifted(bits, 8).view(-1, length, width)


def _mix32(x: Tensor) -> Tensor:
    """A bijective 32-bit integer mixer (two multiply-xorshift rounds) on int32 tensors."""
    x = _shifted(x, 16).bitwise_xor_(x).mul_(0x7FEB352D)
    x = _shifted(x, 15).bitwise_xor_(x).mul_(_signed(0x846CA68B))
    return _shifted(x, 16).bitwise_xor_(x)


def _shifted(x: Tensor, by: int) -> Tensor:
    """x >> by of unsigned numbers, whose bits are in an int32 tensor."""
    return (x >> by).bitwise_and_(_MASK32 >> by)


def _signed(word: int) -> int:
    """The int32 with the bits of an unsigned 32-bit number."""
    return word - (1 << 32) if word >> 31 else word
