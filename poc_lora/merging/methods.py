"""The merge methods, one function each.

To add a method, write a function of one module under `@merge_method`:

    @merge_method("the first adapter alone", rank="unused")
    def first(module: ModuleToMerge) -> MergedFactors:
        return MergedFactors(*module.factors.adapter(0))

Nothing else changes: `merge`, the command line's help and the error messages list what is in `METHODS`. All tensors
are float64 and the adapters' scales are in B. The command line reads this module for its help: import torch only within
functions.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple

from poc_lora.config import MAX_RANK
from poc_lora.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor

    from poc_lora.adapters.adapter import Adapter
    from poc_lora.merging.decomposition import Decomposition
    from poc_lora.merging.stacked import StackedFactors


@dataclass(frozen=True)
class ModuleToMerge:
    """One module of M adapters, and the options of the merge."""

    factors: "StackedFactors"
    weights: "Tensor"  # [M], sums to 1
    rank: int | None = None  # the rank to keep
    key: int = 0  # of the method's random draws, for `rng`

    @property
    def average(self) -> "tuple[Tensor, Tensor]":
        """ΔW = Σ_j w_j s_j B_j A_j, exactly: A stacked, and B with the weights in it."""
        return self.factors.A, self.factors.B * self.weights[self.factors.owner]

    @cached_property
    def decomposition(self) -> "Decomposition":
        """The singular value decomposition of the average."""
        from poc_lora.merging.decomposition import decompose

        return decompose(self.factors.A, self.factors.B, self.weights[self.factors.owner])


class MergedFactors(NamedTuple):
    """One module's merged update B A."""

    A: "Tensor"  # [r, d_in]
    B: "Tensor"  # [d_out, r]
    error: float | None = None  # ‖average − B A‖ / ‖average‖; None: `merge` computes it


Check = Callable[[Sequence["Adapter"], Sequence[float], int | None], None]


@dataclass(frozen=True)
class MergeMethod:
    """An entry of `METHODS`.

    Args:
        merge: Merges one module.
        summary: One line for the command line's help.
        rank: Whether the method uses a rank: `optional`, `required` or `unused`.
        by_component: Whether the result depends on how each B_j A_j is factored, so that `canonical` makes a
            difference.
        random: Whether the method draws random numbers, so that the seed makes a difference.
        check: Raises RequestError for adapters, weights and a rank that the method cannot merge.
    """

    merge: Callable[[ModuleToMerge], MergedFactors]
    summary: str
    rank: Literal["optional", "required", "unused"]
    by_component: bool
    random: bool
    check: Check


METHODS: dict[str, MergeMethod] = {}


def merge_method(
    summary: str,
    *,
    rank: Literal["optional", "required", "unused"],
    by_component: bool = False,
    random: bool = False,
    check: Check = lambda adapters, weights, rank: None,
) -> Callable[[Callable[[ModuleToMerge], MergedFactors]], Callable[[ModuleToMerge], MergedFactors]]:
    """Register a function as a merge method under its own name; see `MergeMethod` for the arguments."""

    def register(function: Callable[[ModuleToMerge], MergedFactors]) -> Callable[[ModuleToMerge], MergedFactors]:
        METHODS[function.__name__] = MergeMethod(function, summary, rank, by_component, random, check)
        return function

    return register


def find_method(name: str) -> MergeMethod:
    """Returns the method called `name`. Raises RequestError, which lists the methods, if there is none."""
    if name not in METHODS:
        raise RequestError(f"there is no method '{name}'", where="method", fix=f"one of: {', '.join(METHODS)}")
    return METHODS[name]


def _check_total_rank(adapters: Sequence["Adapter"], weights: Sequence[float], rank: int | None) -> None:
    """The rank of the exact average is the sum of the ranks, which must be one that can be written."""
    totals: Counter[str] = Counter()
    for adapter in adapters:
        totals.update({name: adapter.rank(name) for name in adapter.modules})
    name, total = max(totals.items(), key=lambda item: item[1])
    if rank is None and total > MAX_RANK:
        raise RequestError(
            f"the exact average of {name} has rank {total}, but an adapter's rank is at most {MAX_RANK}",
            where="rank",
            fix="give a rank (--rank) to get the best approximation of that rank",
        )


@merge_method(
    "the average of the products B·A, exact or, with a rank, its best approximation",
    rank="optional",
    check=_check_total_rank,
)
def average(module: ModuleToMerge) -> MergedFactors:
    """ΔW = Σ_j w_j s_j B_j A_j, or the nearest matrix of rank at most `rank` (Eckart and Young, 1936).

    Without a rank the factors are stacked: rank Σ_j r_j, and no error but rounding. With one, the approximation is
    computed by QR of the stacked factors and an SVD of the small core.
    """
    if module.rank is None or module.rank >= len(module.factors.A):
        return MergedFactors(*module.average, error=0.0)
    return MergedFactors(*module.decomposition.truncated(module.rank), error=module.decomposition.error(module.rank))


def _check_block_rank(adapters: Sequence["Adapter"], weights: Sequence[float], rank: int | None) -> None:
    M = len(adapters)
    if rank is not None and rank < M:
        what = f"rank {rank} leaves some of {M} adapters no component"
        raise RequestError(what, where="rank", fix=f"give a rank of at least {M}, or use average")


@merge_method(
    "the first components of each adapter, rescaled", rank="required", by_component=True, check=_check_block_rank
)
def block(module: ModuleToMerge) -> MergedFactors:
    """ΔW = Σ_j w_j (r_j / k_j) Σ_{i ≤ k_j} s_j b_i a_iᵀ: each adapter's first components, rescaled.

    The k_j are as equal as possible, with k_j ≤ r_j and Σ_j k_j = min(rank, Σ_j r_j). This is the pruned ensemble of
    the paper's appendix on LoRA.
    """
    factors, ranks, rank = module.factors, module.factors.ranks, module.rank or 0
    kept = [0] * len(ranks)
    for _ in range(min(rank, sum(ranks))):
        unfilled = [j for j, r in enumerate(ranks) if kept[j] < r]
        kept[min(unfilled, key=lambda j: kept[j])] += 1
    owner = [j for j, k in enumerate(kept) for _ in range(k)]
    chosen = [sum(ranks[:j]) + i for j, k in enumerate(kept) for i in range(k)]
    r, k = (module.weights.new_tensor([counts[j] for j in owner]) for counts in (ranks, kept))
    return MergedFactors(factors.A[chosen], factors.B[:, chosen] * (module.weights[owner] * r / k))


def _check_probabilities(adapters: Sequence["Adapter"], weights: Sequence[float], rank: int | None) -> None:
    if min(weights) < 0:
        raise RequestError("a negative weight is not a probability", where="weights", fix="use average")


@merge_method(
    "components drawn at random with replacement, averaged",
    rank="required",
    by_component=True,
    random=True,
    check=_check_probabilities,
)
def random(module: ModuleToMerge) -> MergedFactors:
    """ΔW = (1 / rank) Σ_t s_j r_j b_i a_iᵀ over `rank` draws (j, i), each with probability w_j / r_j.

    The expectation is the average. A draw from an adapter that lacks the module counts as zero. The paper's remark on
    pruning, by contrast, draws without replacement.
    """
    from poc_lora import rng

    factors, weights, rank = module.factors, module.weights, module.rank or 0
    ranks = factors.rank_tensor
    draws = rng.uniform((2, rank), module.key).to(weights)
    below = weights.cumsum(0)[:, None] <= draws[0] * weights.sum()
    j = below.sum(0).clamp(max=len(ranks) - 1)
    j = j[ranks[j] > 0]
    i = (draws[1, : len(j)] * ranks[j]).long()
    chosen = (ranks.cumsum(0) - ranks)[j] + i
    return MergedFactors(factors.A[chosen], factors.B[:, chosen] * (ranks[j] / rank))


@merge_method("A and B averaged separately, a model soup of the factors", rank="unused")
def soup(module: ModuleToMerge) -> MergedFactors:
    """ΔW = (Σ_j w_j s_j B_j) (Σ_i w_i A_i), smaller ranks padded with zeros (Wortsman et al., 2022).

    This is not the average: it also has the cross terms B_j A_i, i ≠ j.
    """
    factors, r = module.factors, max(module.factors.ranks)
    A = factors.A.new_zeros(r, factors.A.shape[1])
    B = factors.B.new_zeros(factors.B.shape[0], r)
    for j, own in enumerate(factors.ranks):
        A_j, B_j = factors.adapter(j)
        A[:own] += module.weights[j] * A_j
        B[:, :own] += module.weights[j] * B_j
    return MergedFactors(A, B)
