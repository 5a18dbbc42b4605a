"""Merges of m of the M adapters: how accuracy and the distance from the merge of all depend on m."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from poc_lora import rng
from poc_lora.artifacts.results import SubsetPoint, VarianceLaw
from poc_lora.evaluation.answers import AnswerFile
from poc_lora.evaluation.statistics import is_right, macro_average, mean

DRAWS = 2  # random orders of the adapters, each cut into disjoint subsets of every size


def draw_subsets(M: int, seed: int) -> dict[int, list[tuple[int, ...]]]:
    """For m = 2, 4, ... below M the subsets of that size: each random order of the M cut into pieces of m.

    m = 1 and m = M are the adapters and their merge, which are scored anyway.
    """
    found: dict[int, list[tuple[int, ...]]] = {}
    m = 2
    while m < M:
        orders = [rng.permutation(M, rng.key(seed, 0, "subsets", draw, str(m))) for draw in range(DRAWS)]
        cut = {tuple(sorted(order[at : at + m])) for order in orders for at in range(0, M - m + 1, m)}
        found[m] = sorted(cut)
        m *= 2
    return found


def subset_points(files: Mapping[tuple[int, ...], AnswerFile], M: int) -> list[SubsetPoint]:
    """files: answers by the adapters merged, with all single ones and the one of all M among them."""
    sizes = sorted({len(members) for members in files})
    (whole,) = (file for members, file in files.items() if len(members) == M)
    points = []
    for m in sizes:
        chosen = [file for members, file in files.items() if len(members) == m]
        accuracies = torch.tensor([_accuracy(file) for file in chosen], dtype=torch.float64)
        error = float(accuracies.std()) / math.sqrt(len(chosen)) if len(chosen) > 1 else math.nan
        distances = [_distance(file, whole) for file in chosen]
        distance = None if m == M or math.isnan(distances[0]) else sum(distances) / len(distances)
        accuracy = float(accuracies.mean())
        points.append(SubsetPoint(m=m, subsets=len(chosen), accuracy=accuracy, error=error, distance=distance))
    return points


def variance_law(points: Sequence[SubsetPoint]) -> VarianceLaw | None:
    """The least-squares fit of distance = c (1/m − 1/M) + floor, and the share of the variance that it explains.

    If logits were linear in ΔW, subsets drawn from M independent adapters would be at distance c (1/m − 1/M) from the
    merge of all, c/m from the merge of ever more, and the floor zero: the 1/(M N) term of the paper's error bound.
    None with fewer than three sizes below M.
    """
    M = points[-1].m
    seen = [(1 / p.m - 1 / M, p.distance) for p in points if p.distance is not None]
    if len(seen) < 3:
        return None
    x, y = torch.tensor(seen, dtype=torch.float64).T
    slope, floor = torch.linalg.lstsq(torch.stack([x, torch.ones_like(x)], dim=1), y[:, None]).solution[:, 0].tolist()
    left, total = (y - slope * x - floor).square().sum(), (y - y.mean()).square().sum()
    return VarianceLaw(c=slope, floor=floor, explained=float(1 - left / total) if total > 0 else math.nan)


def _accuracy(file: AnswerFile) -> float:
    by_benchmark: dict[str, list[float]] = {}
    for item in file.items:
        if item.split == "test":
            by_benchmark.setdefault(item.benchmark, []).append(is_right(item, file.answers[item]))
    parts = {name: mean(torch.tensor(values, dtype=torch.float64)) for name, values in by_benchmark.items()}
    return macro_average(parts).value


def _distance(file: AnswerFile, whole: AnswerFile) -> float:
    distances = []
    for item in whole.items:  # single adapters have answered validation questions too
        ours, theirs = file.answers[item].log_probs, whole.answers[item].log_probs
        if ours is not None and theirs is not None:
            distances.append(float((_centred(ours) - _centred(theirs)).square().sum()))
    return sum(distances) / len(distances) if distances else math.nan


def _centred(log_probs: Sequence[float]) -> Tensor:
    values = torch.tensor(log_probs, dtype=torch.float64)
    return values - values.mean()
