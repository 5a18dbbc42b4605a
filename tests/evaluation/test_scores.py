"""Statistics against values computed by hand."""

import math

import numpy as np
import pytest
import torch

from poc_lora.data.questions import Question
from poc_lora.evaluation import scores
from poc_lora.evaluation.answers import Answer, Item
from poc_lora.evaluation.scores import (
    Estimate,
    agreement,
    correct_by_benchmark,
    ensemble,
    macro_average,
    mean,
    paired_difference,
    smallest_difference,
)


def items(n):
    return [Item("piqa", "test", row, Question(f"Which {row}?", "", ("a", "b"), "a")) for row in range(1, n + 1)]


def test_the_standard_error_is_that_of_a_sample_mean():
    # variance of (1, 1, 1, 0) with n - 1: 3 * (1/4)^2 + (3/4)^2 = 3/4, over 3 = 1/4; over n = 1/16
    assert mean(torch.tensor([1.0, 1, 1, 0])) == pytest.approx((0.75, 0.25))
    one = mean(torch.tensor([1.0]))
    assert one.value == 1
    assert math.isnan(one.error)


def test_the_macro_average_weighs_benchmarks_equally():
    parts = {"a": Estimate(0.5, 0.03), "b": Estimate(0.9, 0.04)}
    assert macro_average(parts) == pytest.approx((0.7, 0.025))


def test_answers_that_were_not_given_are_wrong():
    asked = items(4)
    answers = dict(zip(asked, [Answer("a"), Answer("b"), Answer(None), Answer(None, too_long=True)], strict=True))
    assert correct_by_benchmark(asked, answers)["piqa"].tolist() == [1, 0, 0, 0]


def test_the_ensemble_averages_probabilities_normalised_over_the_labels():
    (item,) = items(1)
    first = Answer("a", log_probs=(math.log(0.6), math.log(0.2)))  # normalised: 0.75, 0.25
    second = Answer("b", log_probs=(math.log(0.001), math.log(0.009)))  # normalised: 0.1, 0.9
    together = ensemble(item, [first, second])
    assert together.choice == "b"
    assert [math.exp(x) for x in together.log_probs] == pytest.approx([0.425, 0.575], abs=1e-5)
    assert ensemble(item, [Answer(None, too_long=True)] * 2) == Answer(None, too_long=True)


def test_agreement_counts_scored_questions_only():
    asked = items(3)
    long = Answer(None, too_long=True)
    ours = dict(zip(asked, [Answer("a"), Answer("a"), long], strict=True))
    theirs = dict(zip(asked, [Answer("a"), Answer("b"), long], strict=True))
    assert agreement(ours, theirs) == 0.5
    assert math.isnan(agreement(dict.fromkeys(asked, long), dict.fromkeys(asked, long)))


def test_the_paired_interval_is_that_of_the_normal_law_where_questions_are_many():
    ours = {"a": torch.tensor([1.0] * 600 + [0.0] * 400), "b": torch.tensor([1.0] * 300 + [0.0] * 700)}
    theirs = {"a": torch.tensor([0.0] * 100 + [1.0] * 400 + [0.0] * 500), "b": ours["b"].clone()}
    # a: 200 gains (the first 100 and another 100) of 1000 questions, b: none. Mean 0.2 / 2,
    # error of a = sqrt(0.2 * 0.8 / 1000), halved in the average. Tolerance: 10,000 resamples move a quantile by
    # about 3 % of the error.
    error = math.sqrt(0.2 * 0.8 / 1000) / 2
    difference = paired_difference(ours, theirs, seed=0)
    assert difference.value == pytest.approx(0.1)
    assert difference.low == pytest.approx(0.1 - 1.96 * error, abs=0.1 * error)
    assert difference.high == pytest.approx(0.1 + 1.96 * error, abs=0.1 * error)
    assert difference.p == pytest.approx(2 / 10_001)
    assert paired_difference(ours, theirs, seed=0) == difference
    assert paired_difference(ours, theirs, seed=1) != difference


@pytest.mark.parametrize(("differing", "p"), [(1, 1), (2, 0.5), (5, 0.0625), (6, 0.03125), (40, 2 / 10_001)])
def test_p_is_never_below_that_of_a_sign_test(differing, p):
    """One question of one, or five of five, that the merge alone answers: all resamples are above zero."""
    found = paired_difference({"quiz": torch.ones(differing)}, {"quiz": torch.zeros(differing)}, seed=0)
    assert (found.value, found.high, found.p) == (1, 1, pytest.approx(p))
    assert found.low == (0 if p > 0.05 else 1)
    halves = [torch.ones((differing + 1) // 2), torch.ones(differing // 2 or 1)]
    found = paired_difference(
        {"a": halves[0], "b": halves[1]}, {"a": halves[0] * 0, "b": halves[1] * (differing == 1)}, seed=0
    )
    assert found.p == pytest.approx(p)


def test_many_differing_values_are_resampled_in_parts(monkeypatch):
    draws = torch.Generator().manual_seed(0)
    ours, theirs = ({"quiz": torch.rand(300, generator=draws)} for _ in range(2))
    whole = paired_difference(ours, theirs, seed=0)
    monkeypatch.setattr(scores, "MAX_DRAWN", 10_000)
    parts = paired_difference(ours, theirs, seed=0)
    assert parts.to_json() == pytest.approx(whole.to_json(), rel=1e-9)


def test_no_difference_has_p_one():
    same = {"a": torch.tensor([1.0, 0.0, 1.0])}
    difference = paired_difference(same, same, seed=0)
    assert (difference.value, difference.low, difference.high, difference.p) == (0, 0, 0, 1)


def test_the_smallest_difference_is_shown_in_four_evaluations_of_five():
    """Variants that differ on a question in five, the one better by what is said to be the least that shows."""
    n, runs, draws = 1200, 2000, np.random.default_rng(0)
    least = smallest_difference({"quiz": n})
    assert smallest_difference({"a": n, "b": n}) == pytest.approx(least / math.sqrt(2))
    wins = draws.multinomial(n, [0.1 + least / 2, 0.1 - least / 2, 0.8], size=runs)
    difference = (wins[:, 0] - wins[:, 1]) / n
    error = np.sqrt((wins[:, 0] + wins[:, 1]) / n - difference**2) / math.sqrt(n)
    assert np.mean(difference > 1.96 * error) == pytest.approx(0.8, abs=0.03)  # three errors of a share of 2000


def test_a_comparison_says_what_would_show():
    draws = np.random.default_rng(1)
    ours, theirs = (torch.from_numpy(draws.integers(2, size=400).astype(float)) for _ in range(2))
    found = paired_difference({"quiz": ours}, {"quiz": theirs}, seed=0)
    assert found.detectable == pytest.approx(2.802 * (ours - theirs).std().item() / 20, rel=0.03)  # of 10,000 resamples
    assert paired_difference({"quiz": ours}, {"quiz": ours}, seed=0).detectable is None


def test_questions_asked_twice_tell_no_more_if_they_are_a_group():
    draws = torch.Generator().manual_seed(0)
    ours, theirs = ((torch.rand(40, generator=draws) < 0.6).double() for _ in range(2))
    twice = torch.arange(40).repeat_interleave(2)
    for values in (ours, theirs):
        once, again = mean(values), mean(values.repeat_interleave(2), twice)
        assert again.value == once.value
        assert again.error == pytest.approx(once.error, rel=1e-12)
        assert mean(values, torch.arange(40)).error == pytest.approx(once.error, rel=1e-12)
    plain = paired_difference({"quiz": ours}, {"quiz": theirs}, seed=3)
    pairs = ({"quiz": x.repeat_interleave(2)} for x in (ours, theirs))
    grouped = paired_difference(*pairs, seed=3, groups={"quiz": twice})
    for one, other in zip(vars(grouped).values(), vars(plain).values(), strict=True):
        assert one == pytest.approx(other, rel=1e-12)


def test_the_error_over_groups_is_the_sum_over_pairs_that_share_one():
    draws = torch.Generator().manual_seed(1)
    values = torch.rand(30, generator=draws, dtype=torch.float64)
    groups = torch.randint(0, 9, (30,), generator=draws)
    groups = groups.unique(return_inverse=True)[1]
    G, centred = int(groups.max()) + 1, (values - values.mean()).tolist()
    pairs = sum(centred[i] * centred[j] for i in range(30) for j in range(30) if groups[i] == groups[j])
    assert mean(values, groups).error == pytest.approx((G / (G - 1) * pairs) ** 0.5 / 30, rel=1e-12)
    assert math.isnan(mean(values, torch.zeros(30, dtype=torch.int64)).error)


def test_a_few_groups_that_differ_tell_no_difference():
    groups = torch.arange(5).repeat_interleave(20)
    found = paired_difference({"quiz": torch.ones(100)}, {"quiz": torch.zeros(100)}, seed=0, groups={"quiz": groups})
    assert found.p == 0.0625
    assert found.low <= 0 <= found.high
