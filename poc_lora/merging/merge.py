"""Merge adapters into one adapter, from their factors alone. No input or output."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NoReturn

import torch
from torch import Tensor

from poc_lora import rng
from poc_lora.adapters.adapter import Adapter
from poc_lora.adapters.factors import Factors, check_dtype, is_finite
from poc_lora.artifacts.merge_report import MergeStatistics, ModuleReport
from poc_lora.config import MAX_RANK
from poc_lora.errors import AdapterError, RequestError
from poc_lora.hub_ids import is_base_model_id
from poc_lora.merging import gram, norms
from poc_lora.merging.compatible import check_compatible, checked_weights, same_parameter
from poc_lora.merging.decomposition import canonical_factors
from poc_lora.merging.methods import MergeMethod, ModuleToMerge, find_method
from poc_lora.merging.stacked import stack


@dataclass(frozen=True)
class Merged:
    """The result of a merge."""

    adapter: Adapter
    report: MergeStatistics
    averaged: list[str]  # the parameters of modules_to_save that differed


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
    modules_to_save: Literal["same", "mean"] = "same",
    on_module: Callable[[str], object] = lambda name: None,
) -> Merged:
    """Merge M adapters of one base model into one adapter, from their factors alone.

        ΔW = Σ_j w_j s_j B_j A_j,   w_j = 1/M by default

    Averaging products instead of factors merges M mean-field networks of r neurons into one of M·r neurons
    (Nitanda et al., "Propagation of Chaos for Mean-Field Langevin Dynamics and its Application to Model
    Ensemble", ICML 2025). Everything is computed in float64 and cast once, at the end. A module that an adapter lacks
    counts as zero. Tensors are read from the adapters one module at a time.

    Args:
        adapters: The adapters; shapes must agree, and so must parameters of modules_to_save.
        method: A name in `poc_lora.merging.methods.METHODS`; the formulas are in the docstrings there.
        rank: The rank to keep in each module, for the methods that use one.
        rank_sweep: Ranks for which the report gives the error of truncating the average.
        weights: One weight w_j for each adapter; they sum to 1.
        canonical: Replace each adapter's components by its singular triples, largest first, for the methods that
            depend on how an update is factored.
        seed: Keys the random draws of method `random`.
        dtype: The dtype of the merged factors.
        allow_base_mismatch: Accept adapters whose base models have different Hub ids.
        modules_to_save: `same` refuses parameters that differ. `mean` averages them, Σ_j w_j W_j. For classifiers all
            adapters must have the labels in the same order, which their files do not record.
        on_module: Called with each module's name once it is merged.

    Returns:
        The merged adapter and its report.

    Raises:
        AdapterError: An adapter is damaged, or does not fit the others.
        RequestError: The options do not go together, or not with these adapters.
    """
    check_compatible(adapters, allow_base_mismatch=allow_base_mismatch, modules_to_save=modules_to_save)
    used = checked_weights(weights, len(adapters))
    plan = _Plan(find_method(method), rank, tuple(rank_sweep), used, canonical, seed, dtype)
    _check_plan(method, plan, adapters)
    modules: dict[str, Factors] = {}
    reports: dict[str, ModuleReport] = {}
    inner = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.modules):
        modules[name], reports[name], module_inner = _merge_module(name, adapters, plan)
        inner += module_inner.cpu()
        on_module(name)
    bases = [adapter.base_model for adapter in adapters if adapter.base_model is not None]
    bases.sort(key=lambda name: not is_base_model_id(name))  # a Hub id, which others can fetch, before a local folder
    means = _mean_saved(adapters, used) if modules_to_save == "mean" else {}
    saved = adapters[0].modules_to_save
    tasks = {adapter.task_type for adapter in adapters}
    mappings = [adapter.auto_mapping for adapter in adapters]
    revisions = {adapter.revision for adapter in adapters}
    patterns = {adapter.pattern if adapter.modules.keys() == modules.keys() else None for adapter in adapters}
    merged = Adapter(
        modules=modules,
        base_model=bases[0] if bases else None,
        revision=revisions.pop() if len(revisions) == 1 else None,
        source="merge",
        embeddings=frozenset().union(*(adapter.embeddings for adapter in adapters)),
        fan_in_fan_out=any(adapter.fan_in_fan_out for adapter in adapters),
        modules_to_save={**saved, **means} if means else saved,
        task_type=tasks.pop() if len(tasks) == 1 else None,
        auto_mapping=mappings[0] if all(mapping == mappings[0] for mapping in mappings) else None,
        targets=frozenset().union(*(adapter.targets for adapter in adapters)),
        pattern=patterns.pop() if len(patterns) == 1 else None,
    )
    return Merged(merged, _total_report(reports, inner, used), sorted(means))


def _mean_saved(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, Tensor]:
    """The weighted means of the parameters of modules_to_save that differ, in their dtype."""
    means = {}
    for name, like in adapters[0].modules_to_save.items():
        if all(same_parameter(like, adapter.modules_to_save[name]) for adapter in adapters[1:]):
            continue
        total = torch.zeros(like.shape, dtype=torch.float64, device=like.device)
        for weight, adapter in zip(weights, adapters, strict=True):
            total += weight * adapter.modules_to_save[name].to(total)
        means[name] = total.to(like.dtype)
        if not is_finite(means[name]):
            _refuse_overflow(name)
    return means


@dataclass(frozen=True)
class _Plan:
    """The options of a merge."""

    method: MergeMethod
    rank: int | None
    rank_sweep: tuple[int, ...]
    weights: tuple[float, ...]
    canonical: bool
    seed: int
    dtype: torch.dtype


def _merge_module(name: str, adapters: Sequence[Adapter], plan: _Plan) -> tuple[Factors, ModuleReport, Tensor]:
    """One module's merged factors, its report, and its Gram matrix."""
    stacked = stack([adapter.modules.get(name) for adapter in adapters])
    inner = gram.gram(stacked)
    weights = torch.tensor(plan.weights, dtype=torch.float64, device=stacked.A.device)
    if not is_finite(inner):
        for adapter in adapters:
            if name in adapter.modules and not adapter.modules[name].is_finite():
                what = f"the factors of {name} hold NaN or infinity"
                raise AdapterError(what, where=adapter.source, fix="leave this adapter out")
        _refuse_overflow(name)
    norm = math.sqrt(max(0.0, float(weights @ inner @ weights)))
    exact = ModuleToMerge(stacked, weights, plan.rank, rng.key(plan.seed, 0, "random merge", 0, name))
    module = replace(exact, factors=canonical_factors(stacked)) if plan.canonical else exact
    A, B, error = plan.method.merge(module)
    if error is None:
        error = norms.distance(*exact.average, A, B) / norm if norm else 0.0
    if not len(A):  # a random merge may draw no component of a module
        A, B = A.new_zeros(1, A.shape[1]), B.new_zeros(B.shape[0], 1)
    factors = Factors(A.to(plan.dtype), B.to(plan.dtype))
    if not factors.is_finite():
        _refuse_overflow(name)
    report = ModuleReport(
        absent=[j for j, adapter in enumerate(adapters) if name not in adapter.modules],
        rank=factors.rank,
        norm=norm,
        error=error,
        cast_error=norms.cast_distance(A, B, factors.A, factors.B) / norm if norm else 0.0,
        effective_rank=norms.effective_rank(stacked, weights),
        mean_cosine=gram.mean_cosine(inner),
        pair_cosines=gram.pair_cosines(inner),
        norms=gram.norms(inner),
        variance=gram.variance(inner),
        merge_variance=gram.merge_variance(inner, plan.weights),
        sweep={rank: exact.decomposition.error(rank) for rank in plan.rank_sweep},
    )
    return factors, report, inner


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
        **gram.summary(inner, weights),
        next_move=gram.next_move(inner),
        cosines=gram.cosine(inner).tolist(),
        norms=gram.norms(inner),
        modules=modules,
    )


def _effective_rank(modules: Iterable[ModuleReport], norm: float) -> float:
    """(Σσ²)² / Σσ⁴ over all modules, whose own Σσ² is ‖ΔW‖², and Σσ⁴ is ‖ΔW‖⁴ over its effective rank."""
    fourth = sum((module.norm / norm) ** 4 / module.effective_rank for module in modules if module.norm)
    return 1 / fourth if fourth else 0.0


def sweep_by_type(report: MergeStatistics) -> dict[str, dict[int, float]]:
    """Returns the relative error at each rank of a sweep, by type of module (`q_proj`, ...) and over `all` modules."""
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


def _refuse_overflow(name: str) -> NoReturn:
    raise AdapterError(
        f"the merge of {name} overflows", where=name, fix="look for an adapter with huge factors, or use float32"
    )


def _check_plan(name: str, plan: _Plan, adapters: Sequence[Adapter]) -> None:
    """Raises RequestError for options that do not go together."""
    ranks = [*plan.rank_sweep, *([] if plan.rank is None else [plan.rank])]
    if any(not 1 <= rank <= MAX_RANK for rank in ranks):
        what = f"the ranks to keep are {', '.join(map(str, ranks))}"
        raise RequestError(what[:200], where="rank", fix=f"give ranks from 1 to {MAX_RANK}")
    if not -(2**63) <= plan.seed < 2**63:
        raise RequestError("the seed is no integer of 64 bits", where="seed")
    check_dtype(plan.dtype)
    if plan.method.rank == "required" and plan.rank is None:
        raise RequestError(f"the method {name} needs the number of components to keep", fix="give a rank")
    if plan.method.rank == "unused" and plan.rank is not None:
        raise RequestError(f"the method {name} has no rank to choose", fix="leave out the rank, or use average")
    if plan.canonical and not plan.method.by_component:
        raise RequestError(f"the method {name} does not depend on components", fix="leave out canonical")
    plan.method.check(adapters, plan.weights, plan.rank)
