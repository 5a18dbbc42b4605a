"""Merges of m of the M adapters: how accuracy and the distance from the merge of all depend on m."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from poc_lora import rng
from poc_lora.artifacts.results import SubsetPoint, VarianceLaw
from poc_lora.evaluation.answers import Answer, Item
from poc_lora.evaluation.scores import correct_by_benchmark, macro_average, mean

DRAWS = 2  # random orders of the adapters, each cut into disjoint subsets of every size


def draw_subsets(M: int, seed: int) -> dict[int, list[tuple[int, ...]]]:
    """Draw subsets of 2, 4, ... adapters (fewer than M), by cutting random orders of all M into disjoint pieces.

    Returns:
        For each size the subsets, as sorted slots. Sizes 1 and M are left out: they are evaluated in any case.
    """
    found: dict[int, list[tuple[int, ...]]] = {}
    m = 2
    while m < M:
        orders = [rng.permutation(M, rng.key(seed, 0, "subsets", draw, str(m))) for draw in range(DRAWS)]
        found[m] = sorted({tuple(sorted(order[at : at + m])) for order in orders for at in range(0, M - m + 1, m)})
        m *= 2
    return found


def name_subsets(M: int, seed: int, *, whole: bool) -> dict[str, tuple[int, ...]]:
    """Name the subsets of `draw_subsets` as their answer files, such as subsets/2-00-03; `whole` adds that of all M."""
    groups = [group for drawn in draw_subsets(M, seed).values() for group in drawn]
    if whole:
        groups.append(tuple(range(M)))
    return {f"subsets/{len(group)}-{'-'.join(f'{slot:02d}' for slot in group)}": group for group in groups}


def subset_points(answers: Mapping[tuple[int, ...], Mapping[Item, Answer]], items: Sequence[Item]) -> list[SubsetPoint]:
    """Summarise the subsets of each size, in ascending order.

    Args:
        answers: For each subset (slots) the answers of its merge; single adapters and the merge of all are among them.
        items: The test questions.
    """
    whole = answers[max(answers, key=len)]
    M = max(map(len, answers))
    points = []
    for m in sorted({len(slots) for slots in answers}):
        chosen = [given for slots, given in answers.items() if len(slots) == m]
        accuracies = torch.tensor([_accuracy(items, given) for given in chosen], dtype=torch.float64)
        error = float(accuracies.std()) / math.sqrt(len(chosen)) if len(chosen) > 1 else math.nan
        distances = [_distance(items, given, whole) for given in chosen]
        distance = None if m == M or math.isnan(distances[0]) else sum(distances) / len(distances)
        accuracy = float(accuracies.mean())
        points.append(SubsetPoint(m=m, subsets=len(chosen), accuracy=accuracy, error=error, distance=distance))
    return points


def variance_law(points: Sequence[SubsetPoint]) -> VarianceLaw | None:
    """Fit distance = c (1/m − 1/M) + floor by least squares.

    If logits were linear in ΔW, merges of m out of M independent adapters would be at distance c (1/m − 1/M) from the
    merge of all and c/m from the limit of many adapters, with floor zero: the 1/(M N) term of the error bound in
    Nitanda et al., ICML 2025.

    Returns:
        `c`, `floor` and `explained`, the share of the variance that the fit explains; None with fewer than three sizes
        below M.
    """
    M = points[-1].m
    seen = [(1 / p.m - 1 / M, p.distance) for p in points if p.distance is not None]
    if len(seen) < 3:
        return None
    x, y = torch.tensor(seen, dtype=torch.float64).T
    slope, floor = torch.linalg.lstsq(torch.stack([x, torch.ones_like(x)], dim=1), y[:, None]).solution[:, 0].tolist()
    residual, total = (y - slope * x - floor).square().sum(), (y - y.mean()).square().sum()
    return VarianceLaw(c=slope, floor=floor, explained=float(1 - residual / total) if total > 0 else math.nan)


def _accuracy(items: Sequence[Item], answers: Mapping[Item, Answer]) -> float:
    return macro_average({b: mean(values) for b, values in correct_by_benchmark(items, answers).items()}).value


def _distance(items: Sequence[Item], answers: Mapping[Item, Answer], whole: Mapping[Item, Answer]) -> float:
    distances = []
    for item in items:
        ours, theirs = answers[item].log_probs, whole[item].log_probs
        if ours is not None and theirs is not None:
            distances.append(float((_centred(ours) - _centred(theirs)).square().sum()))
    return sum(distances) / len(distances) if distances else math.nan


def _centred(log_probs: Sequence[float]) -> Tensor:
    values = torch.tensor(log_probs, dtype=torch.float64)
    return values - values.mean()
