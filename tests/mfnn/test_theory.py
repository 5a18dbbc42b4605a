"""The bounds: their formulas, what they imply, and that they hold where the truth is known."""

import math

import pytest
import torch

from poc_lora.errors import RequestError
from poc_lora.mfnn import theory
from poc_lora.mfnn.model import LOGISTIC, SQUARED, Tanh


def test_the_curvature_constant_bounds_the_bregman_term_of_independent_neurons():
    """E B_F(ρ_X, μ) ≤ B/N for any law μ of bounded neurons; here one of seven atoms, with the exact mean over draws."""
    neuron, generator = Tanh(2, 3.0), torch.Generator().manual_seed(0)
    atoms, z = (torch.randn(n, k, generator=generator, dtype=torch.float64) for n, k in ((7, 3), (50, 2)))
    values = neuron.values(4 * atoms.t(), z)  # [50, 7]
    y = torch.randn(50, generator=generator, dtype=torch.float64).sign()
    limit = values.mean(1)
    for loss in (SQUARED, LOGISTIC):
        total = 0.0
        for i in range(7):
            for j in range(7):  # both neurons of a network with N = 2
                h = (values[:, i] + values[:, j]) / 2
                bregman = loss.value(h, y) - loss.value(limit, y) - loss.slope(limit, y) * (h - limit)
                total += bregman.mean().item() / 49
        assert 0 < total <= theory.curvature_constant(loss, 3.0) / 2


def test_constants():
    assert theory.curvature_constant(SQUARED, 3.0) == 4.5
    assert theory.curvature_constant(LOGISTIC, 4.0) == 2.0


def test_the_gap_bound_starts_at_the_initial_gap_and_ends_at_B_over_N():
    def bound(time):
        return theory.objective_gap_bound(4.5, 100, alpha=0.5, temperature=0.1, time=time, initial_gap=2.0)

    assert bound(0) == pytest.approx(0.045 + 2.0)
    assert bound(10) == pytest.approx(0.045 + 2.0 * math.exp(-1))
    assert bound(1e9) == 0.045


def test_after_training_the_kl_is_at_most_B_over_lambda():
    gap = theory.objective_gap_bound(4.5, 100, alpha=0.5, temperature=0.1, time=1e9, initial_gap=2.0)
    assert theory.kl_bound(gap, 100, 0.1) == pytest.approx(45.0)


def test_the_error_bound_is_the_sum_of_its_three_terms():
    assert theory.ensemble_error_bound(2.0, 1, 100, 4.0) == pytest.approx(16 / 100 + 32 * 0.2 + 8 * 0.04)
    assert theory.ensemble_error_bound(2.0, 8, 100, 4.0) == pytest.approx((16 / 100 + 32 * 0.2) / 8 + 8 * 0.04)
    assert theory.ensemble_error_bound(2.0, 8, 100, 0.0) == pytest.approx(16 / 800)  # independent neurons


def test_the_error_bound_holds_for_independent_neurons_and_is_near_its_first_term():
    """KL = 0: M·N independent neurons of the largest variance there is, R², have a quarter of the bound's error."""
    values = torch.tensor([-2.0, 2.0], dtype=torch.float64)
    assert values.var(correction=0) / (8 * 100) == pytest.approx(theory.ensemble_error_bound(2.0, 8, 100, 0.0) / 4)


def test_more_networks_help_up_to_saturation():
    neurons, kl = 1000, 5.0
    m = theory.ensemble_saturation(neurons, kl)
    at, twice = (theory.ensemble_error_bound(2.0, k, neurons, kl) for k in (round(m), 2 * round(m)))
    assert twice == pytest.approx(0.75 * at, rel=0.02)  # M is rounded
    floor = 2 * 2.0**2 * kl / neurons
    assert at == pytest.approx(2 * floor, rel=0.02)
    assert theory.ensemble_error_bound(2.0, 10**9, neurons, kl) == pytest.approx(floor, rel=1e-6)


@pytest.mark.parametrize(
    "call",
    [
        lambda: theory.curvature_constant(SQUARED, 0.0),
        lambda: theory.kl_bound(0.1, 0, 0.1),
        lambda: theory.kl_bound(0.1, 10, 0.0),
        lambda: theory.ensemble_error_bound(2.0, 0, 10, 1.0),
        lambda: theory.ensemble_saturation(10, 0.0),
        lambda: theory.objective_gap_bound(1.0, -1, alpha=1, temperature=1, time=1, initial_gap=1),
    ],
)
def test_arguments_without_meaning_are_refused(call):
    with pytest.raises(RequestError, match="must be positive"):
        call()
