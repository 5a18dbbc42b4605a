"""The problems: shapes, laws and seeds."""

import math

import pytest
import torch

from poc_lora.errors import RequestError
from poc_lora.mfnn.model import LOGISTIC, MEAN_SQUARED_ERROR, SQUARED
from poc_lora.mfnn.problems import double_circle, linear, multi_index, sines


def test_double_circle_lies_on_two_circles_split_80_20():
    problem = double_circle(1000, noise=0.0)
    assert problem.loss is LOGISTIC
    assert (len(problem.inputs), len(problem.test_inputs)) == (800, 200)
    for points, labels in ((problem.inputs, problem.targets), (problem.test_inputs, problem.test_targets)):
        radius = points.norm(dim=1)
        assert set(labels.tolist()) == {-1.0, 1.0}
        assert torch.allclose(radius, torch.where(labels < 0, 1.0, 2.0))
    together = torch.cat([problem.inputs, problem.test_inputs])
    assert len(torch.unique(together, dim=0)) == 1000  # no point is in both
    assert torch.cat([problem.targets, problem.test_targets]).sum() == 0
    # angles are uniform: the mean of n unit vectors is within four standard errors, sqrt(1/(2n)) a coordinate
    units = together / together.norm(dim=1, keepdim=True)
    assert units.mean(0).abs().max() < 4 * math.sqrt(1 / 2000)


def test_the_noise_of_the_double_circle_is_on_each_coordinate():
    clean, noisy = double_circle(4000, noise=0.0), double_circle(4000, noise=0.3)
    off = noisy.inputs - clean.inputs
    assert off.std(0).tolist() == pytest.approx([0.3, 0.3], rel=4 * math.sqrt(1 / 6400))
    assert torch.equal(noisy.targets, clean.targets)


def in_the_ball(points, radius):
    """(|z|/r)^d is uniform in [0, 1], to four standard errors of its mean, and directions have mean 0."""
    inside = points.norm(dim=1) / radius
    assert inside.max() <= 1 + 1e-6
    assert abs((inside.double() ** points.shape[1]).mean() - 0.5) < 4 * math.sqrt(1 / 12 / len(points))
    mean = (points / points.norm(dim=1, keepdim=True)).mean(0)
    assert mean.abs().max() < 4.5 * math.sqrt(1 / points.shape[1] / len(points))


def test_multi_index_is_the_papers():
    problem = multi_index(5000, dim=20, directions=8, scale=12.0, radius=5.0)
    assert problem.loss is MEAN_SQUARED_ERROR
    assert (len(problem.inputs), len(problem.test_inputs)) == (4000, 1000)
    in_the_ball(torch.cat([problem.inputs, problem.test_inputs]), 5.0)
    for z, y in ((problem.inputs, problem.targets), (problem.test_inputs, problem.test_targets)):
        expected = [12.0 / 8 * sum(math.tanh(value) for value in row[:8]) for row in z[:50].tolist()]
        assert y[:50].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)
    with pytest.raises(RequestError, match="21 directions of 20"):
        multi_index(dim=20, directions=21)


def test_the_defaults_are_the_papers_values():
    circle, regression = double_circle(), multi_index()
    assert (len(circle.inputs), len(circle.test_inputs), circle.dim) == (160, 40, 2)
    assert (len(regression.inputs), len(regression.test_inputs), regression.dim) == (400, 100, 100)
    # y is a sum of 100 nearly independent tanh(z_j), z_j of variance 25/102
    assert regression.targets.std() == pytest.approx(math.sqrt(100 * 0.2), rel=0.15)


def test_sines_are_uniform_in_a_ball_and_targets_a_link_of_few_directions():
    problem = sines(4000, dim=5, directions=2, noise=0.0)
    assert problem.loss is SQUARED
    in_the_ball(problem.inputs, math.sqrt(7))
    assert abs(problem.inputs.var(0).mean() - 1) < 0.05
    # the targets vary in a plane only: their gradient, estimated linearly on small balls, has rank 2
    z = problem.inputs[:, None] - problem.inputs[None, :50]
    near = z.norm(dim=2).argsort(0)[1:40]
    slopes = []
    for j in range(50):
        a = torch.cat([problem.inputs[near[:, j]], torch.ones(39, 1)], 1)
        slopes.append(torch.linalg.lstsq(a, problem.targets[near[:, j]][:, None]).solution[:5, 0])
    values = torch.linalg.svdvals(torch.stack(slopes))
    assert values[1] > 4 * values[2]


def test_noise_is_in_the_training_targets_only():
    noisy, clean = sines(500, noise=0.3, seed=1), sines(500, noise=0.0, seed=1)
    assert torch.equal(noisy.test_targets, clean.test_targets)
    assert torch.equal(noisy.inputs, clean.inputs)
    assert (noisy.targets - clean.targets).std() == pytest.approx(0.3, rel=4 * math.sqrt(1 / 1000))


@pytest.mark.parametrize("make", [double_circle, multi_index, sines, lambda **k: linear(50, 3, **k)])
def test_problems_are_functions_of_their_seed(make):
    a, b, c = make(seed=1), make(seed=1), make(seed=2)
    assert torch.equal(a.inputs, b.inputs)
    assert torch.equal(a.targets, b.targets)
    assert not torch.equal(a.inputs, c.inputs)
    assert a.dim == a.inputs.shape[1]
