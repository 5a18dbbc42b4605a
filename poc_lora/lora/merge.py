"""The average of adapters as one adapter, from their factors alone. Pure functions of tensors."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from poc_lora.errors import AdapterError
from poc_lora.lora import similarity
from poc_lora.lora.adapter import DTYPES, Adapter, Factors


@dataclass(frozen=True)
class ModuleReport:
    """One module of a merge: how many adapters have it, the rank kept, and what truncation cost."""

    members: int
    rank: int
    norm: float  # ‖ΔW‖ of the exact average
    error: float  # ‖ΔW − kept‖ / ‖ΔW‖


@dataclass(frozen=True)
class MergeReport:
    """What a merge did. Norms are Frobenius norms over all modules; None: not defined for one adapter."""

    weights: tuple[float, ...]
    rank: int  # the largest kept in any module
    norm: float
    error: float
    mean_cosine: float | None
    spread: float | None  # S²
    error_bar: float | None  # S² Σ w_j², S²/M for equal weights
    relative_error_bar: float | None  # its square root over the norm
    modules: dict[str, ModuleReport]


@dataclass(frozen=True)
class Merged:
    adapter: Adapter
    report: MergeReport


def merge(
    adapters: Sequence[Adapter],
    *,
    rank: int | None = None,
    weights: Sequence[float] | None = None,
    dtype: torch.dtype = torch.float32,
    allow_base_mismatch: bool = False,
) -> Merged:
    """The weighted average of M adapters' updates as one adapter.

        ΔW = Σ_j w_j s_j B_j A_j,   w_j = 1/M by default

    Averaging products instead of factors merges M mean-field networks of r neurons into one of M·r neurons
    (Nitanda et al., "Propagation of Chaos for Mean-Field Langevin Dynamics and its Application to Model
    Ensemble", ICML 2025). Without `rank` the factors are stacked: rank Σ r_j, and no error but rounding. With
    `rank` each module is the nearest matrix of at most that rank (Eckart and Young, 1936), found by QR of the
    stacked factors and an SVD of the small core. All in float64; one cast at the end, to `dtype`.

    A module that an adapter lacks counts as zero. `weights` must sum to 1. Adapters of differently named Hub
    models are refused unless `allow_base_mismatch`; shapes must agree always. Raises AdapterError.
    """
    used = _check(adapters, rank, weights, dtype, allow_base_mismatch)
    modules: dict[str, Factors] = {}
    reports: dict[str, ModuleReport] = {}
    inner = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.modules):
        members = [adapter.modules.get(name) for adapter in adapters]
        modules[name], reports[name], module_inner = _merge_module(name, members, used, rank, dtype)
        inner += module_inner.cpu()
    norm = math.hypot(*(report.norm for report in reports.values()))
    lost = math.hypot(*(report.norm * report.error for report in reports.values()))
    report = MergeReport(
        weights=used,
        rank=max(report.rank for report in reports.values()),
        norm=norm,
        error=lost / norm if norm else 0.0,
        **similarity.summary(inner, used),
        modules=reports,
    )
    bases = [adapter.base_model for adapter in adapters if adapter.base_model is not None]
    revisions = {adapter.revision for adapter in adapters}
    merged = Adapter(
        modules=modules,
        base_model=bases[0] if bases else None,
        revision=revisions.pop() if len(revisions) == 1 else None,
        source="merge",
    )
    return Merged(merged, report)


def _merge_module(
    name: str, members: Sequence[Factors | None], weights: Sequence[float], rank: int | None, dtype: torch.dtype
) -> tuple[Factors, ModuleReport, Tensor]:
    """One module's merged factors, its report, and its Gram matrix."""
    A, B, ranks = similarity.stack(members)
    weight = torch.repeat_interleave(torch.tensor(weights, dtype=A.dtype), torch.tensor(ranks)).to(A.device)  # [Σr]
    truncate = rank is not None and rank < sum(ranks)
    error = 0.0
    if truncate:
        # A = R_Aᵀ Q_Aᵀ and B = Q_B R_B: all that is left to decompose is the core R_B diag(w) R_Aᵀ.
        Q_A, R_A = torch.linalg.qr(A.T)
        Q_B, R_B = torch.linalg.qr(B)
        inner = similarity.gram_of_stack(R_A.T, R_B, ranks)
        core = (R_B * weight) @ R_A.T
        _check_finite(name, core)
        U, S, Vh = torch.linalg.svd(core, full_matrices=False)
        norm = float(torch.linalg.vector_norm(S))
        error = float(torch.linalg.vector_norm(S[rank:])) / norm if norm else 0.0
        root = S[:rank].sqrt()
        A = root[:, None] * (Vh[:rank] @ Q_A.T)
        B = (Q_B @ U[:, :rank]) * root
    else:
        inner = similarity.gram_of_stack(A, B, ranks)
        B = B * weight
        w = torch.tensor(weights, dtype=torch.float64).to(inner.device)
        norm = math.sqrt(max(0.0, float(w @ inner @ w)))
    factors = Factors(A.to(dtype), B.to(dtype))
    _check_finite(name, factors.A, factors.B, inner)
    present = sum(member is not None for member in members)
    return factors, ModuleReport(members=present, rank=factors.rank, norm=norm, error=error), inner


def _check_finite(name: str, *tensors: Tensor) -> None:
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise AdapterError(
            f"the merge of {name} overflows", where=name, fix="look for an adapter with huge factors, or use float32"
        )


def _check(
    adapters: Sequence[Adapter],
    rank: int | None,
    weights: Sequence[float] | None,
    dtype: torch.dtype,
    allow_base_mismatch: bool,
) -> tuple[float, ...]:
    """Refuse what cannot be merged; return the weights to use."""
    if not adapters:
        raise AdapterError("there are no adapters to merge", fix="give at least one")
    if rank is not None and rank < 1:
        raise AdapterError(f"the rank to keep is {rank}", fix="give a rank of at least 1")
    if dtype not in DTYPES.values():
        raise AdapterError(f"an adapter cannot be kept in {dtype}", fix="use float32, bfloat16 or float16")
    if not allow_base_mismatch:
        _check_bases(adapters)
    first_with: dict[str, Adapter] = {}
    for adapter in adapters:
        if not adapter.modules:
            raise AdapterError("the adapter has no modules", where=adapter.source)
        for name, factors in adapter.modules.items():
            other = first_with.setdefault(name, adapter)
            if factors.shape != other.modules[name].shape:
                raise AdapterError(
                    f"{name} is {_size(factors)} here, but {_size(other.modules[name])} in {other.source}",
                    where=adapter.source,
                    fix="merge only adapters of one base model",
                )
            if not factors.is_finite():
                raise AdapterError(
                    f"the factors of {name} hold NaN or infinity", where=adapter.source, fix="leave this adapter out"
                )
    return _check_weights(weights, len(adapters))


def _size(factors: Factors) -> str:
    return "×".join(map(str, factors.shape))


def _check_bases(adapters: Sequence[Adapter]) -> None:
    """Names are compared where both are Hub ids; two paths may hold the same model."""
    named = [a for a in adapters if a.base_model and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", a.base_model)]
    for adapter in named[1:]:
        if adapter.base_model != named[0].base_model:
            raise AdapterError(
                f"the base model is {adapter.base_model}, but {named[0].source} has {named[0].base_model}",
                where=adapter.source,
                fix="merge adapters of one base model; if both names mean the same weights, allow the mismatch "
                "(--allow-base-mismatch)",
            )


def _check_weights(weights: Sequence[float] | None, M: int) -> tuple[float, ...]:
    if weights is None:
        return (1 / M,) * M
    if len(weights) != M:
        raise AdapterError(f"{len(weights)} weights for {M} adapters", where="weights", fix="give one weight each")
    if not all(math.isfinite(weight) for weight in weights):
        raise AdapterError("a weight is not a finite number", where="weights")
    total = math.fsum(weights)
    if abs(total - 1) > 1e-6:
        raise AdapterError(
            f"the weights sum to {total:g}", where="weights", fix="divide each by that sum, so that they sum to 1"
        )
    return tuple(float(weight) for weight in weights)
