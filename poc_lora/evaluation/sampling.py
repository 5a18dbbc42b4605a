"""Standard errors of sampling questions, one by one or in groups that share something, such as a passage."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from poc_lora.data.questions import Question


def group_numbers(questions: Sequence[Question]) -> Tensor | None:
    """Returns the number of each question's group [n], int64; None if no question names one.

    A question without a group is one of its own.
    """
    if not any(question.group for question in questions):
        return None
    numbers: dict[str | int, int] = {}
    return torch.tensor([numbers.setdefault(q.group or i, len(numbers)) for i, q in enumerate(questions)])


def standard_error(values: Tensor, groups: Tensor | None = None) -> float:
    """Returns the standard error of the mean of `values` [n]; NaN for a single value or group.

    sqrt(sample variance / n) without groups. With them the values of a group may depend on each other: the deviations
    from the mean are summed within each of the G groups, and the error is sqrt(G / (G − 1) Σ_g sum_g²) / n, the
    cluster-robust one (Liang and Zeger 1986). Groups of one value give the same as no groups.
    """
    deviations = values - values.mean()
    if groups is not None:
        count = int(groups.max()) + 1
        deviations = torch.zeros(count, dtype=values.dtype).index_add_(0, groups, deviations)
    G = len(deviations)
    if G < 2:
        return math.nan
    return math.sqrt(G / (G - 1) * deviations.square().sum().item()) / len(values)
