"""Merges of some of the adapters: which are drawn, and the law of their distance where it is known."""

import math

import pytest
import torch

from poc_lora.artifacts.results import SubsetPoint
from poc_lora.data.questions import Question
from poc_lora.evaluation.answers import Answer, Item
from poc_lora.evaluation.subsets import draw_subsets, subset_points, variance_law


def test_subsets_of_one_order_are_disjoint_and_depend_on_the_seed_alone():
    drawn = draw_subsets(8, seed=3)
    assert list(drawn) == [2, 4]
    assert 4 <= len(drawn[2]) <= 8
    assert 2 <= len(drawn[4]) <= 4
    assert all(len(set(members)) == m and max(members) < 8 for m, groups in drawn.items() for members in groups)
    assert sorted(slot for members in drawn[2] for slot in members) == sorted([*range(8)] * (len(drawn[2]) // 4))
    assert draw_subsets(8, seed=3) == drawn != draw_subsets(8, seed=4)
    assert draw_subsets(2, seed=0) == {}
    assert list(draw_subsets(5, seed=0)) == [2, 4]


def test_logits_that_are_linear_in_the_adapters_follow_the_variance_law():
    """z of adapter j = limit + noise of variance 1 per label; a subset's merge has the mean of its members' z."""
    M, labels, n = 8, ("a", "b", "c"), 2000
    items = [Item("piqa", "test", row, Question(f"{row}?", "", labels, "a")) for row in range(n)]
    z = torch.randn(M, n, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    groups = [(slot,) for slot in range(M)] + [g for gs in draw_subsets(M, 0).values() for g in gs] + [tuple(range(M))]
    answers = {
        group: {
            item: Answer(labels[int(row.argmax())], log_probs=tuple(row.tolist()))
            for item, row in zip(items, z[list(group)].mean(0), strict=True)
        }
        for group in groups
    }
    points = subset_points(answers, items)
    assert [point.m for point in points] == [1, 2, 4, 8]
    for point in points[:-1]:
        # Three labels less their mean: two degrees of freedom of variance 1 each. Relative standard error of a mean of
        # 2000 χ² with two degrees: 1/sqrt(2000) = 2.2 %, averaged over subsets; 4 of these.
        assert point.distance == pytest.approx(2 * (1 / point.m - 1 / M), rel=0.09)
    law = variance_law(points)
    assert law.c == pytest.approx(2, rel=0.09)
    assert abs(law.floor) < 0.05
    assert law.explained > 0.99
    assert points[0].accuracy == pytest.approx(1 / 3, abs=0.02)  # chance; 4 x sqrt(2/9 / 16,000)
    assert math.isnan(points[-1].error)


def test_two_sizes_are_too_few_for_a_fit():
    sizes = ((1, 0.3), (2, 0.1), (4, None))
    points = [SubsetPoint(m=m, subsets=4 // m, accuracy=0.5, error=0.1, distance=d) for m, d in sizes]
    assert variance_law(points) is None
