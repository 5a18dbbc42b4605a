"""Intervals over training runs: Student's t for one group of runs, Welch's for the difference of two groups.

They say what other seeds would give, with the test questions fixed. `scores.py` has the opposite: errors of sampling
the questions, with the adapters fixed.
"""

import math
from collections.abc import Sequence
from statistics import fmean, variance
from typing import NamedTuple

import numpy as np

NODES, WEIGHTS = np.polynomial.legendre.leggauss(64)  # on [-1, 1]


class Interval(NamedTuple):
    """A mean over runs and the half-width of its 95 % interval, NaN where one run is too few to tell."""

    mean: float
    half_width: float


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean and t · sqrt(sample variance / n), t the 0.975 quantile of Student's law of n − 1 degrees of freedom.

    For differences that are taken within each run this is the paired interval.

    Args:
        values: One of each run [n].
    """
    n = len(values)
    if n < 2:
        return Interval(fmean(values), math.nan)
    return Interval(fmean(values), student_quantile(n - 1) * math.sqrt(variance(values) / n))


def welch_interval(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """The mean of `ours` minus that of `theirs`, of independent runs whose variances may differ (Welch 1947).

    With a = variance / n of the one and b of the other, the half-width is t · sqrt(a + b) of Student's law of
    (a + b)² / (a² / (n − 1) + b² / (m − 1)) degrees of freedom.

    Args:
        ours: One of each run [n].
        theirs: One of each other run [m].
    """
    difference = fmean(ours) - fmean(theirs)
    if min(len(ours), len(theirs)) < 2:
        return Interval(difference, math.nan)
    a, b = (variance(values) / len(values) for values in (ours, theirs))
    if a + b == 0:
        return Interval(difference, 0.0)
    degrees = (a + b) ** 2 / (a**2 / (len(ours) - 1) + b**2 / (len(theirs) - 1))
    return Interval(difference, student_quantile(degrees) * math.sqrt(a + b))


def student_quantile(degrees: float) -> float:
    """The 0.975 quantile of Student's t, by bisection of its distribution function.

    With t = sqrt(ν) tan θ, P(|T| ≤ t) is Γ((ν+1)/2) / (sqrt(π) Γ(ν/2)) · 2 ∫ cos(x)^(ν−1) dx from 0 to θ, a smooth
    integral that 64 Gauss-Legendre nodes give to more digits than are used.

    Args:
        degrees: The degrees of freedom ν, 1 or more; they need not be whole.
    """
    factor = 2 / math.sqrt(math.pi) * math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2))
    low, high = 1.9, 13.0  # between the quantiles of the normal law and of one degree of freedom
    for _ in range(50):
        t = (low + high) / 2
        half = math.atan(t / math.sqrt(degrees)) / 2
        inside = factor * half * float(WEIGHTS @ np.cos(half * (NODES + 1)) ** (degrees - 1))
        low, high = (t, high) if inside < 0.95 else (low, t)
    return (low + high) / 2
