"""The problems: shapes, laws and seeds."""

import math

import pytest
import torch

from poc_lora.mfnn.model import LOGISTIC, SQUARED
from poc_lora.mfnn.problems import double_circle, linear, multi_index


def test_double_circle_lies_on_two_circles_split_80_20():
    problem = double_circle(1000, noise=0.0)
    assert problem.loss is LOGISTIC
    assert (len(problem.inputs), len(problem.test_inputs)) == (800, 200)
    for points, labels in ((problem.inputs, problem.targets), (problem.test_inputs, problem.test_targets)):
        radius = points.norm(dim=1)
        assert set(labels.tolist()) == {-1.0, 1.0}
        assert torch.allclose(radius, torch.where(labels > 0, 1.0, 2.0))
    together = torch.cat([problem.inputs, problem.test_inputs])
    assert len(torch.unique(together, dim=0)) == 1000  # no point is in both
    # angles are uniform: the mean of n unit vectors is within four standard errors, sqrt(1/(2n)) a coordinate
    units = together / together.norm(dim=1, keepdim=True)
    assert units.mean(0).abs().max() < 4 * math.sqrt(1 / 2000)


def test_multi_index_inputs_are_uniform_in_a_ball_and_targets_a_link_of_few_directions():
    problem = multi_index(4000, dim=5, directions=2, noise=0.0)
    assert problem.loss is SQUARED
    radius = problem.inputs.norm(dim=1) / math.sqrt(7)
    assert radius.max() <= 1
    # |z|^d / R^d is uniform in the ball: four standard errors of a uniform mean
    assert abs((radius**5).mean() - 0.5) < 4 * math.sqrt(1 / 12 / 4000)
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
    noisy, clean = multi_index(500, noise=0.3, seed=1), multi_index(500, noise=0.0, seed=1)
    assert torch.equal(noisy.test_targets, clean.test_targets)
    assert torch.equal(noisy.inputs, clean.inputs)
    assert (noisy.targets - clean.targets).std() == pytest.approx(0.3, rel=4 * math.sqrt(1 / 1000))


@pytest.mark.parametrize("make", [double_circle, multi_index, lambda **k: linear(50, 3, **k)])
def test_problems_are_functions_of_their_seed(make):
    a, b, c = make(seed=1), make(seed=1), make(seed=2)
    assert torch.equal(a.inputs, b.inputs)
    assert torch.equal(a.targets, b.targets)
    assert not torch.equal(a.inputs, c.inputs)
    assert a.dim == a.inputs.shape[1] == a.probe.shape[1]
