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


def elementwise_uniform(row_keys: Tensor, salt: int, length: int, width: int) -> Tensor:
    """Uniform numbers [rows, length, width] whose element (i, t, k) is a function of `row_keys[i]`, `salt`, t and k.

    A counter-based draw: a row's numbers stay the same whatever the other rows, the padding, or the
    number of rows, and recomputing them (gradient checkpointing) needs no saved state. `row_keys`: int64
    [rows]; `salt`: 64-bit key of the call site, whose `width` never changes.
    """
    device = row_keys.device
    position = torch.arange(length * width, device=device, dtype=torch.int64)
    low = _mix(row_keys & _MASK32, salt & _MASK32)
    high = _mix((row_keys >> 32) & _MASK32, (salt >> 32) & _MASK32)
    bits = _mix32(_mix32(position + low[:, None]) ^ high[:, None])
    return (bits >> 8).to(torch.float32).mul_(2.0**-24).view(-1, length, width)


def _mix(values: Tensor, salt: int) -> Tensor:
    return _mix32(values ^ salt)


def _mix32(x: Tensor) -> Tensor:
    """A bijective 32-bit integer mixer (two multiply-xorshift rounds) on int64 tensors."""
    x = x & _MASK32
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK32
    return x ^ (x >> 16)
