"""The bounds: their formulas, what they imply, and that they hold where the truth is known."""

import math

import pytest
import torch

from poc_lora.errors import RequestError
from poc_lora.mfnn import theory
from poc_lora.mfnn.model import LOGISTIC, MEAN_SQUARED_ERROR, SQUARED, Tanh


def test_the_curvature_constant_bounds_the_bregman_term_of_independent_neurons():
    """E B_F(ρ_X, μ) ≤ B/N for any law μ of bounded neurons; here one of seven atoms, with the exact mean over draws."""
    neuron, generator = Tanh(2, 3.0), torch.Generator().manual_seed(0)
    atoms, z = (torch.randn(n, k, generator=generator, dtype=torch.float64) for n, k in ((7, 3), (50, 2)))
    values = neuron.values(4 * atoms.t(), z)  # [50, 7]
    y = torch.randn(50, generator=generator, dtype=torch.float64).sign()
    limit = values.mean(1)
    for loss in (SQUARED, MEAN_SQUARED_ERROR, LOGISTIC):
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
    assert theory.curvature_constant(MEAN_SQUARED_ERROR, 3.0) == 9.0


def test_the_gap_bound_starts_at_the_initial_gap_and_ends_at_B_over_N():
    def bound(time):
        return theory.objective_gap_bound(4.5, 100, alpha=0.5, temperature=0.1, time=time, initial_gap=2.0)

    assert bound(0) == pytest.approx(0.045 + 2.0)
    assert bound(10) == pytest.approx(0.045 + 2.0 * math.exp(-1))
    assert bound(1e9) == 0.045


def test_after_training_the_kl_is_at_most_B_over_lambda():
    gap = theory.objective_gap_bound(4.5, 100, alpha=0.5, temperature=0.1, time=1e9, initial_gap=2.0)
    assert 100 * theory.kl_per_neuron_bound(gap, 0.1) == pytest.approx(45.0)


def test_alpha_is_that_of_example_1():
    lam, reg, slope = 0.5, 0.2, 0.3
    alpha = (2 * reg / lam) * math.exp(-(slope**2) / (2 * lam * reg) - 4 * slope / math.sqrt(2 * lam * reg))
    assert math.exp(theory.log_alpha(lam, reg, slope)) == pytest.approx(alpha)
    # neurons that do not depend on the data: the Gaussian with variance λ/(2λ'), whose constant is 2λ'/λ
    assert math.exp(theory.log_alpha(lam, reg, 1e-12)) == pytest.approx(2 * reg / lam)


def test_alpha_is_a_log_sobolev_constant_where_it_can_be_computed():
    """α is at most the constant of the law exp(−(R' x + λ'x²)/λ), Gaussian with the constant 2λ'/λ, for any R'."""
    for slope in (0.01, 1.0, 30.0):
        assert theory.log_alpha(0.5, 0.2, slope) < math.log(2 * 0.2 / 0.5)


def delta(lr, **changed):
    values = {"temperature": 0.3, "regularization": 0.2, "gradient_bound": 2.0, "lipschitz": 3.0, "dim": 4}
    return theory.discretization_error(lr, **{**values, "second_moment": 5.0, **changed})


def test_the_discretization_error_is_theorem_1s():
    first = 8 * 0.1 * (9 + 0.04) * (0.1 * 4 + 0.3 * 4)
    second = 32 * 0.01 * 0.04 * (9 + 0.04) * (5 + (1 / 0.2) * (4 / (4 * 0.2) + 0.3 * 4))
    assert delta(0.1) == pytest.approx(first + second)
    assert delta(1e-6) / delta(1e-7) == pytest.approx(10, rel=1e-3)  # of first order in η
    for more in ({"second_moment": 6.0}, {"dim": 5}, {"lipschitz": 4.0}, {"gradient_bound": 3.0}, {"temperature": 0.4}):
        assert delta(0.1, **more) > delta(0.1)
    with pytest.raises(RequestError, match="is 1/2 or more"):
        delta(2.5)


def test_discrete_time_becomes_continuous_time_as_steps_shrink_with_half_its_rate():
    def gap(lr):
        return theory.objective_gap_bound_discrete(
            4.5,
            100,
            alpha=0.5,
            temperature=0.3,
            lr=lr,
            steps=round(7 / lr),
            discretization=delta(lr),
            initial_gap=2.0,
        )

    continuous = theory.objective_gap_bound(4.5, 100, alpha=0.5, temperature=0.3, time=7 / 2, initial_gap=2.0)
    assert gap(1e-8) == pytest.approx(continuous, rel=1e-4)
    assert gap(0.1) == pytest.approx(0.045 + delta(0.1) / 0.15 + math.exp(-0.5 * 0.3 * 7) * 2)


def test_k_is_that_of_theorems_2_and_3():
    lam, alpha, lr, steps = 0.3, 0.5, 0.01, 100
    gap = theory.objective_gap_bound_discrete(
        4.5, 100, alpha=alpha, temperature=lam, lr=lr, steps=steps, discretization=0.7, initial_gap=2.0
    )
    k = 4.5 / (lam * 100) + 0.7 / (alpha * lam**2) + math.exp(-alpha * lam * lr * steps) * 2.0 / lam
    assert theory.kl_per_neuron_bound(gap, lam) == pytest.approx(k)


def test_the_error_bounds_are_the_sums_of_their_terms():
    assert theory.network_error_bound(2.0, 100, 0.04) == pytest.approx(16 / 100 + 32 * 0.2)
    assert theory.ensemble_error_bound(2.0, 8, 100, 0.04) == pytest.approx((16 / 100 + 32 * 0.2) / 8 + 8 * 0.04)
    assert theory.ensemble_error_bound(2.0, 8, 100, 0.0) == pytest.approx(16 / 800)  # independent neurons
    assert theory.pruned_error_bound(2.0, 20, 0.04) == pytest.approx(16 / 20 + 32 * 0.2)


def test_the_error_bound_holds_for_independent_neurons_and_is_near_its_first_term():
    """K = 0: M·N independent neurons of the largest variance there is, R², have a quarter of the bound's error."""
    values = torch.tensor([-2.0, 2.0], dtype=torch.float64)
    assert values.var(correction=0) / (8 * 100) == pytest.approx(theory.ensemble_error_bound(2.0, 8, 100, 0.0) / 4)


def test_more_networks_help_up_to_saturation():
    neurons, kl = 1000, 0.005
    m = theory.ensemble_saturation(neurons, kl)
    at, twice = (theory.ensemble_error_bound(2.0, k, neurons, kl) for k in (round(m), 2 * round(m)))
    assert twice == pytest.approx(0.75 * at, rel=0.02)  # M is rounded
    floor = 2 * 2.0**2 * kl
    assert at == pytest.approx(2 * floor, rel=0.02)
    assert theory.ensemble_error_bound(2.0, 10**9, neurons, kl) == pytest.approx(floor, rel=1e-6)


def sup(networks=3, neurons=50, remainder=0.0, **changed):
    values = {"bound": 2.0, "constant": 4.5, "temperature": 0.3, "uniform": 1.5, "covering": 7.0}
    return theory.sup_norm_bound(networks, neurons, 6, remainder=remainder, **{**values, **changed})


def test_the_sup_norm_bound_is_theorem_4s():
    """The three terms again, by γ: with w = λ + MB, γ = sqrt(MN/d · w/λ)/(CR), and K = B/(λN) + remainder."""
    networks, neurons, dim, constant, lam, c, covering, bound, remainder = 3, 50, 6, 4.5, 0.3, 1.5, 7.0, 2.0, 0.2
    gamma = math.sqrt(networks * neurons / dim * (1 + networks * constant / lam)) / (c * bound)
    near = 1.25 * c * bound * math.sqrt(dim / (networks * neurons) + dim * constant / (lam * neurons))
    cover = math.log(covering * math.sqrt((lam + networks * constant) * math.pi / lam)) / gamma
    rest = networks * neurons / gamma * remainder
    assert sup(remainder=remainder) == pytest.approx(near + cover + rest)


def test_the_sup_norm_bound_without_a_remainder_falls_with_m_to_a_floor_and_with_n_to_nothing():
    assert sup(networks=6) < sup(networks=3)
    assert sup(networks=10**9) == pytest.approx(1.25 * 3 * math.sqrt(6 * 4.5 / (0.3 * 50)), rel=1e-3)
    assert sup(neurons=200) == pytest.approx(sup(neurons=50) / 2)
    assert sup(remainder=0.1) > sup()


def test_what_the_bounds_say_at_the_experiments_values_is_what_the_docs_say():
    """docs/theory.md, "Which bounds say something": |h − h'| ≤ 2R makes every bound above (2R)² empty."""
    empty = 400.0
    circle, regression = theory.curvature_constant(LOGISTIC, 10.0), theory.curvature_constant(MEAN_SQUARED_ERROR, 10.0)
    assert (circle, regression) == (12.5, 100.0)

    def errors(constant, lam, neurons):
        kl = theory.kl_per_neuron_bound(constant / neurons, lam)
        return kl, theory.network_error_bound(10.0, neurons, kl), theory.ensemble_error_bound(10.0, 20, neurons, kl)

    assert errors(circle, 0.01, 500) == pytest.approx((2.5, 1266, 563), rel=1e-3)
    assert errors(regression, 0.01, 500) == pytest.approx((20, 3579, 4179), rel=1e-3)
    assert errors(regression, 0.1, 800) == pytest.approx((1.25, 895, 295), rel=2e-3)
    assert errors(regression, 1e-4, 800) == pytest.approx((1250, 28285, 251414), rel=1e-3)
    # Theorem 2 is empty until about this N
    for constant, neurons in ((circle, 5000), (regression, 40000)):
        assert errors(constant, 0.01, 0.99 * neurons)[1] > empty > errors(constant, 0.01, 1.02 * neurons)[1]
    # the largest |z| of the circle's samples is about 2.3, so |∇h| ≤ R sqrt(|z|² + 1) is about 25
    assert theory.log_alpha(0.01, 0.1, 25.0) == pytest.approx(-314_733, rel=1e-4)


@pytest.mark.parametrize(
    "call",
    [
        lambda: theory.curvature_constant(SQUARED, 0.0),
        lambda: theory.network_error_bound(2.0, 0, 0.1),
        lambda: theory.kl_per_neuron_bound(0.1, 0.0),
        lambda: theory.ensemble_error_bound(2.0, 0, 10, 1.0),
        lambda: theory.ensemble_saturation(10, 0.0),
        lambda: theory.log_alpha(0.1, 0.1, -1.0),
        lambda: sup(uniform=0.0),
        lambda: theory.objective_gap_bound(1.0, -1, alpha=1, temperature=1, time=1, initial_gap=1),
    ],
)
def test_arguments_without_meaning_are_refused(call):
    with pytest.raises(RequestError, match="must be positive"):
        call()
