"""Intervals over runs against tables, the density integrated step by step, and simulated groups of runs."""

import math

import numpy as np
import pytest

from poc_lora.evaluation.intervals import mean_interval, student_quantile, welch_interval


@pytest.mark.parametrize(
    ("degrees", "expected"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423)]
)
def test_the_quantile_is_that_of_the_tables(degrees, expected):
    assert student_quantile(degrees) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("degrees", [1.0, 1.37, 2.5, 4.0, 11.8, 250.0, 1e5])
def test_as_much_of_the_density_lies_within_the_quantile(degrees):
    x = np.linspace(0, student_quantile(degrees), 200_001)
    log_density = -(degrees + 1) / 2 * np.log1p(x**2 / degrees)
    log_density += math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - math.log(degrees * math.pi) / 2
    assert 2 * np.trapezoid(np.exp(log_density), x) == pytest.approx(0.95, abs=1e-8)


def test_an_interval_by_hand():
    mean, half = mean_interval([1.0, 2.0, 6.0])
    assert mean == 3
    assert half == pytest.approx(4.3027 * math.sqrt(7 / 3), rel=1e-4)  # the sample variance is (4 + 1 + 9) / 2
    assert math.isnan(mean_interval([3.0]).half_width)
    assert mean_interval([3.0, 3.0]).half_width == 0


def test_welch_by_hand():
    """The sample variances are 7 of three runs and 5/3 of four."""
    mean, half = welch_interval([1.0, 2.0, 6.0], [0.0, 2.0, 1.0, 3.0])
    a, b = 7 / 3, 5 / 3 / 4
    degrees = (a + b) ** 2 / (a**2 / 2 + b**2 / 3)
    assert mean == pytest.approx(1.5)
    assert half == pytest.approx(student_quantile(degrees) * math.sqrt(a + b))
    assert math.isnan(welch_interval([1.0], [1.0, 2.0]).half_width)
    assert welch_interval([1.0, 1.0], [2.0, 2.0]) == (-1.0, 0.0)


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Of 2,000 draws; four standard errors are 2 points. Welch's law is an approximation, by less than 1 more here."""
    draws = np.random.default_rng(0)
    groups = draws.normal(5, 2, size=(2000, 3))
    others = draws.normal(4, 0.5, size=(2000, 5))
    held = [abs(mean - 5) <= half for mean, half in map(mean_interval, groups.tolist())]
    assert np.mean(held) == pytest.approx(0.95, abs=0.02)
    pairs = zip(groups.tolist(), others.tolist(), strict=True)
    held = [abs(mean - 1) <= half for mean, half in (welch_interval(*pair) for pair in pairs)]
    assert np.mean(held) == pytest.approx(0.95, abs=0.03)
