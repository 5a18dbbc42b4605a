"""What the tests of merging share: random adapters, and stacks of factors, as dense matrices in float64."""

from pathlib import Path

import torch
from hypothesis import strategies as st

from poc_lora.adapters.adapter import Adapter, write_adapter
from poc_lora.adapters.factors import Factors
from poc_lora.merging.methods import METHODS, ModuleToMerge
from poc_lora.merging.stacked import StackedFactors

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"
SHAPES = {Q: (12, 10), UP: (16, 10)}
D_OUT, D_IN = 9, 7
RANKS = st.lists(st.integers(0, 4), min_size=1, max_size=5).filter(any)


def random_adapter(seed: int, rank: int, scale: float = 1.0, **fields: object) -> Adapter:
    stream = torch.Generator().manual_seed(seed)
    modules = {
        name: Factors(torch.randn(rank, d_in, generator=stream), torch.randn(d_out, rank, generator=stream), scale)
        for name, (d_out, d_in) in SHAPES.items()
    }
    return Adapter(modules, **fields)


def dense(factors: Factors) -> torch.Tensor:
    return factors.scale * factors.B.double() @ factors.A.double()


def average(adapters: list[Adapter], name: str, weights: list[float] | None = None) -> torch.Tensor:
    weights = weights or [1 / len(adapters)] * len(adapters)
    return sum(w * dense(a.modules[name]) for w, a in zip(weights, adapters, strict=True) if name in a.modules)


def write_members(root: Path, adapters: list[Adapter]) -> list[Path]:
    for index, adapter in enumerate(adapters):
        write_adapter(adapter, root / f"{index:02d}")
    return [root / f"{index:02d}" for index in range(len(adapters))]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def stack_of(ranks, seed=0):
    stream = torch.Generator().manual_seed(seed)
    A = torch.randn(sum(ranks), D_IN, generator=stream, dtype=torch.float64)
    B = torch.randn(D_OUT, sum(ranks), generator=stream, dtype=torch.float64)
    return StackedFactors(A, B, list(ranks))


def merged(method, stacked, weights, rank=None, key=0):
    A, B, _ = METHODS[method].merge(ModuleToMerge(stacked, weights, rank, key))
    return A, B


def product(A, B):
    return B @ A


def weights_of(M, seed=0):
    weights = torch.rand(M, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    return weights / weights.sum()
