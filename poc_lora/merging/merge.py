"""The average of adapters as one adapter, from their factors alone. Pure functions of tensors."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from poc_lora import rng
from poc_lora.adapters.adapter import Adapter
from poc_lora.adapters.factors import DTYPES, MAX_RANK, Factors, is_finite
from poc_lora.artifacts.merge_report import MergeStatistics, ModuleReport
from poc_lora.errors import AdapterError
from poc_lora.merging import gram as similarity
from poc_lora.merging import methods
from poc_lora.merging.compatible import check_compatible, checked_weights, is_hub_name
from poc_lora.merging.stacked import Stacked, stack

METHODS = ("average", "block", "random", "soup")


@dataclass(frozen=True)
class Merged:
    adapter: Adapter
    report: MergeStatistics


def merge(
    adapters: Sequence[Adapter],
    *,
    method: str = "average",
    rank: int | None = None,
    rank_sweep: Sequence[int] = (),
    weights: Sequence[float] | None = None,
    canonical: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    allow_base_mismatch: bool = False,
    on_module: Callable[[str], object] = lambda name: None,
) -> Merged:
    """The weighted average of M adapters' updates as one adapter.

        ΔW = Σ_j w_j s_j B_j A_j,   w_j = 1/M by default

    Averaging products instead of factors merges M mean-field networks of r neurons into one of M·r neurons
    (Nitanda et al., "Propagation of Chaos for Mean-Field Langevin Dynamics and its Application to Model
    Ensemble", ICML 2025). `method`:

    average  Without `rank` the factors are stacked: rank Σ r_j, and no error but rounding. With `rank` each module is
             the nearest matrix of at most that rank (Eckart and Young, 1936), found by QR of the stacked factors and
             an SVD of the small core.
    block    The first k_j components b_i a_iᵀ of every adapter, Σ k_j = `rank`, rescaled: Σ_j w_j s_j (r_j / k_j)
             Σ_{i ≤ k_j} b_i a_iᵀ. A pruned ensemble, as in the paper's appendix on LoRA.
    random   `rank` components drawn with replacement, adapter j's with probability w_j / r_j each, and averaged with
             weight s_j r_j: ΔW in expectation. The paper's remark prunes without replacement. Keyed by `seed`.
    soup     A and B averaged apart, (Σ_j w_j s_j B_j) (Σ_i w_i A_i): "model soups" (Wortsman et al., 2022) of the
             factors. It is not the average: it holds the cross terms B_j A_i of differing adapters.

    `block` and `random` take the components as they were trained, and those depend on the factorisation: `canonical`
    makes them each adapter's singular triples first, the largest first. All in float64; one cast at the end, to
    `dtype`. `rank_sweep`: ranks for which the report tells the error of truncation.

    A module that an adapter lacks counts as zero. `weights` must sum to 1. Adapters of differently named Hub
    models are refused unless `allow_base_mismatch`; shapes must agree always. Parameters saved whole (modules_to_save)
    must be the same in all. One module at a time is asked of the adapters; `on_module` is told each name when it is
    done. Raises AdapterError.
    """
    check_compatible(adapters, allow_base_mismatch=allow_base_mismatch)
    used = checked_weights(weights, len(adapters))
    _check_method(method, rank, rank_sweep, used, canonical, dtype)
    if method == "average" and rank is None:
        _check_total_rank(adapters)
    plan = _Plan(method, rank, tuple(rank_sweep), used, canonical, seed, dtype)
    modules: dict[str, Factors] = {}
    reports: dict[str, ModuleReport] = {}
    inner = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.modules):
        modules[name], reports[name], module_inner = _merge_module(name, adapters, plan)
        inner += module_inner.cpu()
        on_module(name)
    bases = [adapter.base_model for adapter in adapters if adapter.base_model is not None]
    bases.sort(key=lambda name: not is_hub_name(name))  # rather what others can fetch than a folder of this machine
    tasks = {adapter.task_type for adapter in adapters}
    revisions = {adapter.revision for adapter in adapters}
    merged = Adapter(
        modules=modules,
        base_model=bases[0] if bases else None,
        revision=revisions.pop() if len(revisions) == 1 else None,
        source="merge",
        embeddings=frozenset().union(*(adapter.embeddings for adapter in adapters)),
        fan_in_fan_out=any(adapter.fan_in_fan_out for adapter in adapters),
        whole=adapters[0].whole,
        task_type=tasks.pop() if len(tasks) == 1 else None,
        targets=frozenset().union(*(adapter.targets for adapter in adapters)),
    )
    return Merged(merged, _total_report(reports, inner, used))


@dataclass(frozen=True)
class _Plan:
    """What `merge` was asked for."""

    method: str
    rank: int | None
    rank_sweep: tuple[int, ...]
    weights: tuple[float, ...]
    canonical: bool
    seed: int
    dtype: torch.dtype


def _merge_module(name: str, adapters: Sequence[Adapter], plan: _Plan) -> tuple[Factors, ModuleReport, Tensor]:
    """One module's merged factors, its report, and its Gram matrix."""
    stacked = stack([adapter.modules.get(name) for adapter in adapters])
    inner = similarity.gram_of_stack(stacked)
    weights = torch.tensor(plan.weights, dtype=torch.float64, device=stacked.A.device)
    if not is_finite(inner):
        for adapter in adapters:
            if name in adapter.modules and not adapter.modules[name].is_finite():
                what = f"the factors of {name} hold NaN or infinity"
                raise AdapterError(what, where=adapter.source, fix="leave this adapter out")
        _refuse_overflow(name)
    norm = math.sqrt(max(0.0, float(weights @ inner @ weights)))
    total = len(stacked.A)
    truncate = plan.method == "average" and plan.rank is not None and plan.rank < total
    sweep = truncate or plan.rank_sweep
    triples = methods.decompose(stacked.A, stacked.B, weights[stacked.owner]) if sweep else None
    error = 0.0
    if triples and truncate and plan.rank is not None:
        A, B = triples.truncated(plan.rank)
        error = triples.error(plan.rank)
    elif plan.method == "average":
        A, B = methods.average(stacked, weights)
    else:
        A, B = _other_method(name, stacked, weights, plan)
        error = methods.distance(*methods.average(stacked, weights), A, B) / norm if norm else 0.0
    if not len(A):  # nothing was drawn of a module
        A, B = A.new_zeros(1, A.shape[1]), B.new_zeros(B.shape[0], 1)
    factors = Factors(A.to(plan.dtype), B.to(plan.dtype))
    if not factors.is_finite():
        _refuse_overflow(name)
    report = ModuleReport(
        absent=[j for j, adapter in enumerate(adapters) if name not in adapter.modules],
        rank=factors.rank,
        norm=norm,
        error=error,
        cast_error=methods.cast_distance(A, B, factors.A, factors.B) / norm if norm else 0.0,
        effective_rank=methods.effective_rank(stacked, weights),
        mean_cosine=similarity.mean_cosine(inner),
        pair_cosines=similarity.pair_cosines(inner),
        norms=similarity.norms(inner),
        spread=similarity.spread(inner),
        error_bar=similarity.error_bar(inner, plan.weights),
        sweep={rank: triples.error(rank) for rank in plan.rank_sweep} if triples else {},
    )
    return factors, report, inner


def _other_method(name: str, stacked: Stacked, weights: Tensor, plan: _Plan) -> tuple[Tensor, Tensor]:
    if plan.canonical:
        stacked = methods.canonical(stacked)
    if plan.method == "soup" or plan.rank is None:
        return methods.soup(stacked, weights)
    if plan.method == "block":
        return methods.block(stacked, weights, plan.rank)
    return methods.random(stacked, weights, plan.rank, rng.key(plan.seed, 0, "random merge", 0, name))


def _total_report(modules: dict[str, ModuleReport], inner: Tensor, weights: tuple[float, ...]) -> MergeStatistics:
    norm = math.hypot(*(report.norm for report in modules.values()))
    lost, cast = (
        math.hypot(*(report.norm * getattr(report, kind) for report in modules.values()))
        for kind in ("error", "cast_error")
    )
    return MergeStatistics(
        weights=weights,
        rank=max(report.rank for report in modules.values()),
        norm=norm,
        error=lost / norm if norm else 0.0,
        cast_error=cast / norm if norm else 0.0,
        effective_rank=_effective_rank(modules.values(), norm),
        **similarity.summary(inner, weights),
        next_move=similarity.next_move(inner),
        cosines=similarity.cosine(inner).tolist(),
        norms=similarity.norms(inner),
        modules=modules,
    )


def _effective_rank(modules: Iterable[ModuleReport], norm: float) -> float:
    """(Σσ²)² / Σσ⁴ over all modules, whose own Σσ² is ‖ΔW‖², and Σσ⁴ is ‖ΔW‖⁴ over its effective rank."""
    fourth = sum((module.norm / norm) ** 4 / module.effective_rank for module in modules if module.norm)
    return 1 / fourth if fourth else 0.0


def sweep_by_type(report: MergeStatistics) -> dict[str, dict[int, float]]:
    """The relative error of each rank of a sweep, over all modules of a type (`q_proj`, ...) and over `all`."""
    types: dict[str, list[ModuleReport]] = {"all": list(report.modules.values())}
    for name, module in report.modules.items():
        types.setdefault(name.rpartition(".")[2], []).append(module)
    table = {}
    for kind, modules in types.items():
        norm = math.hypot(*(module.norm for module in modules))
        table[kind] = {
            rank: math.hypot(*(module.norm * module.sweep[rank] for module in modules)) / norm if norm else 0.0
            for rank in modules[0].sweep
        }
    return table


def _check_total_rank(adapters: Sequence[Adapter]) -> None:
    """The exact average has the sum of the ranks, and that has a limit."""
    totals: Counter[str] = Counter()
    for adapter in adapters:
        totals.update({name: adapter.rank(name) for name in adapter.modules})
    name, total = max(totals.items(), key=lambda item: item[1])
    if total > MAX_RANK:
        what = f"the exact average of {name} has rank {total}, where up to {MAX_RANK} is written"
        raise AdapterError(what, where="rank", fix="give a rank (--rank), for the best approximation of that rank")


def _refuse_overflow(name: str) -> NoReturn:
    raise AdapterError(
        f"the merge of {name} overflows", where=name, fix="look for an adapter with huge factors, or use float32"
    )


def _check_method(
    method: str,
    rank: int | None,
    rank_sweep: Sequence[int],
    weights: tuple[float, ...],
    canonical: bool,
    dtype: torch.dtype,
) -> None:
    if any(not 1 <= r <= MAX_RANK for r in (*rank_sweep, 1 if rank is None else rank)):
        what = f"the ranks to keep are {', '.join(map(str, (*rank_sweep, *([] if rank is None else [rank]))))}"
        raise AdapterError(what[:200], where="rank", fix=f"give ranks from 1 to {MAX_RANK}")
    if dtype not in DTYPES.values():
        raise AdapterError(f"an adapter cannot be kept in {dtype}", fix="use float32, bfloat16 or float16")
    if method not in METHODS:
        raise AdapterError(f"there is no method '{method}'", where="method", fix=f"one of: {', '.join(METHODS)}")
    if method in ("block", "random") and rank is None:
        raise AdapterError(f"the method {method} needs to know how many components to keep", fix="give a rank")
    if method == "soup" and rank is not None:
        raise AdapterError("a soup has the rank of its adapters", fix="leave out the rank, or use average")
    if canonical and method not in ("block", "random"):
        raise AdapterError(f"{method} does not depend on components", fix="leave out canonical")
    if method == "random" and min(weights) < 0:
        raise AdapterError("a negative weight is no probability", where="weights", fix="use average")
    if method == "block" and rank is not None and rank < len(weights):
        what = f"rank {rank} leaves some of {len(weights)} adapters no component"
        raise AdapterError(what, where="rank", fix=f"give a rank of at least {len(weights)}, or use average")
