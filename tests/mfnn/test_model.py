"""Networks, their objective and its gradient: closed forms against plain formulas and autograd."""

import pytest
import torch

from poc_lora.errors import RequestError
from poc_lora.mfnn import model
from poc_lora.mfnn.model import LOGISTIC, MEAN_SQUARED_ERROR, SQUARED, Linear, Objective, Tanh, TanhProduct, outputs

NEURONS = [Tanh(3, 2.0), TanhProduct(3, 2.0), Linear(3)]
LOSSES = [SQUARED, MEAN_SQUARED_ERROR, LOGISTIC]


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make(neuron, loss=SQUARED, samples=23, regularization=0.03, dtype=torch.float64):
    inputs = draw(samples, neuron.dim, seed=1, dtype=dtype)
    targets = draw(samples, seed=2, dtype=dtype).sign()
    return Objective(neuron, loss, inputs, targets, regularization)


def plain_objective(objective, particles):
    """F(ρ_X) as it is written in the docstring, summed over networks."""
    total = 0.0
    for x in particles:
        h = objective.neuron.values(x.t(), objective.inputs).mean(1)
        fit = objective.loss.value(h, objective.targets).mean()
        total = total + fit + objective.regularization * x.square().sum(1).mean()
    return total


def test_values_are_the_neurons_of_the_paper():
    x, z = draw(5, 5), draw(4, 3, seed=3)
    w, b, a = x[:, :3], x[:, 3], x[:, 4]
    tanh = torch.tanh(z @ w.t() + b)
    assert torch.allclose(Tanh(3, 2.0).values(x[:, :4].t(), z), 2 * tanh)
    assert torch.allclose(TanhProduct(3, 2.0).values(x.t(), z), 2 * torch.tanh(a) * tanh)
    assert torch.allclose(Linear(3).values(w.t(), z), z @ w.t())


@pytest.mark.parametrize("neuron", [Tanh(3, 2.0), TanhProduct(3, 2.0)], ids=["tanh", "tanh_product"])
def test_bounded_neurons_are_bounded_by_R(neuron):
    values = neuron.values(30 * draw(100, neuron.size).t(), 30 * draw(50, 3))
    assert values.abs().max() <= 2.0
    assert values.abs().max() > 1.9


@pytest.mark.parametrize("neuron", NEURONS, ids=lambda n: type(n).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_are_the_mean_over_neurons(neuron, dtype):
    x, z = draw(2, 3, 7, neuron.size, dtype=dtype), draw(11, 3, seed=3, dtype=dtype)
    expected = torch.stack([torch.stack([neuron.values(n.t(), z).mean(1) for n in row]) for row in x])
    found = outputs(neuron, x, z)
    assert found.dtype == dtype
    assert found.shape == (2, 3, 11)
    # a few roundings of numbers up to 2, in float32
    assert torch.allclose(found, expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
@pytest.mark.parametrize("neuron", NEURONS, ids=lambda n: type(n).__name__)
def test_the_gradient_is_that_of_autograd(neuron, loss):
    objective, x = make(neuron, loss), draw(4, 7, neuron.size).requires_grad_()
    value = plain_objective(objective, x)
    (gradient,) = torch.autograd.grad(7 * value, x)
    assert torch.allclose(objective.gradient(x.detach()), gradient, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_slope_and_smoothness_are_the_first_and_second_derivative(loss):
    h = torch.linspace(-4, 4, 201, dtype=torch.float64, requires_grad=True)
    for y in (-1.0, 1.0):
        target = torch.full_like(h, y)
        (slope,) = torch.autograd.grad(loss.value(h, target).sum(), h, create_graph=True)
        assert torch.allclose(slope, loss.slope(h, target))
        (curvature,) = torch.autograd.grad(loss.slope(h, target).sum(), h)
        assert curvature.max() == pytest.approx(loss.smoothness, rel=1e-9)  # attained, at h = 0 for logistic


@pytest.mark.parametrize("neuron", NEURONS, ids=lambda n: type(n).__name__)
def test_slices_of_the_samples_change_nothing_but_rounding(neuron, monkeypatch):
    objective, x = make(neuron), draw(2, 9, neuron.size)
    whole = objective.gradient(x), outputs(neuron, x, objective.inputs)
    monkeypatch.setitem(model.SLICE, "cpu", 5 * 9)  # five samples at a time
    monkeypatch.setattr(model, "FEWEST_SAMPLES", 1)
    assert len(objective.slices(9)) == 5
    assert objective.workspace(9).numel() == 5 * 9
    sliced = objective.gradient(x), outputs(neuron, x, objective.inputs)
    for a, b in zip(whole, sliced, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-13)


def test_the_workspace_is_bounded_whatever_the_number_of_samples():
    objective = Objective(Tanh(2), SQUARED, draw(100_000, 2), draw(100_000), 0.0)
    assert objective.workspace(1000).numel() <= model.SLICE["cpu"]
    # very wide networks: as many numbers as a few networks have themselves
    assert objective.workspace(10**6).numel() == model.FEWEST_SAMPLES * 10**6


@pytest.mark.parametrize("neuron", [Tanh(3, 5.0), TanhProduct(3, 5.0)], ids=["tanh", "tanh_product"])
def test_the_float32_gradient_is_that_of_float64_up_to_rounding(neuron):
    double, single = (make(neuron, samples=200, dtype=dtype) for dtype in (torch.float64, torch.float32))
    x = 3 * draw(2, 50, neuron.size)
    error = (single.gradient(x.float()).double() - double.gradient(x)).abs().max()
    assert error < 20 * torch.finfo(torch.float32).eps * 5  # some roundings of sums of terms up to R


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"inputs": draw(5, 2)}, "do not fit neurons of dimension 3"),
        ({"targets": draw(4)}, "do not fit neurons of dimension 3"),
        ({"targets": draw(5).float()}, "both float32, or both float64"),
        ({"regularization": -1.0}, "must be at least 0"),
        ({"regularization": float("nan")}, "must be at least 0"),
    ],
)
def test_samples_that_do_not_fit_are_refused(change, expected):
    given = {"inputs": draw(5, 3), "targets": draw(5), "regularization": 0.1} | change
    with pytest.raises(RequestError, match=expected):
        Objective(Tanh(3), SQUARED, **given)


def test_particles_that_do_not_fit_are_refused():
    objective = make(Tanh(3))
    with pytest.raises(RequestError, match="do not fit"):
        objective.gradient(draw(2, 7, 3))
    with pytest.raises(RequestError, match="do not fit"):
        outputs(Tanh(3), draw(0, 4), draw(5, 3))
    with pytest.raises(RequestError, match="same dtype"):
        objective.gradient(draw(2, 7, 4).float())
