"""Merging, pruning and distances."""

import math

import pytest
import torch

from poc_lora.errors import RequestError
from poc_lora.mfnn.ensemble import (
    log_slope,
    mean_and_error,
    merge,
    merged_outputs,
    prune,
    random_merges,
    squared_l2,
    sup_norm,
)
from poc_lora.mfnn.model import Tanh, outputs

NEURON = Tanh(3, 2.0)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_merged_network_outputs_the_mean():
    x, z = draw(5, 7, 4), draw(11, 3, seed=1)
    merged = merge(x)
    assert merged.shape == (35, 4)
    h = outputs(NEURON, x, z)
    assert torch.allclose(outputs(NEURON, merged, z), h.mean(0))
    assert torch.allclose(merged_outputs(h, 5)[0], h.mean(0))


def test_merges_of_groups_are_disjoint():
    h = draw(7, 11)
    found = merged_outputs(h, 3)
    assert torch.allclose(found, torch.stack([h[:3].mean(0), h[3:6].mean(0)]))
    assert torch.equal(merged_outputs(h, 1), h)


def test_random_merges_are_means_of_subsets_drawn_anew():
    h = 2.0 ** torch.arange(6)[:, None].double()  # a sum names its subset
    found = random_merges(h, 3, 200, seed=0)[:, 0] * 3
    subsets = {tuple(bool(int(total) & 2**j) for j in range(6)) for total in found.round().tolist()}
    assert all(sum(subset) == 3 for subset in subsets)
    assert len(subsets) == 20  # each of the 6 choose 3: one is missed in 20 (19/20)^200 = 0.07 % of seeds
    assert torch.equal(random_merges(h, 3, 5, seed=0), random_merges(h, 3, 200, seed=0)[:5])
    assert not torch.equal(random_merges(h, 3, 5, seed=1), random_merges(h, 3, 5, seed=0))
    assert torch.allclose(random_merges(h, 6, 2, seed=0), h.mean(0).expand(2, 1))


def test_pruning_keeps_random_neurons_without_repeating_one():
    x = draw(50, 4)
    kept = prune(x, 20, seed=1)
    assert kept.shape == (20, 4)
    found = (kept[:, None] == x).all(2).nonzero()[:, 1]
    assert len(set(found.tolist())) == 20
    assert torch.equal(kept, prune(x, 20, seed=1))
    assert not torch.equal(kept, prune(x, 20, seed=2))
    assert torch.equal(prune(x, 50, seed=3).sort(0).values, x.sort(0).values)


def test_a_pruned_network_is_off_by_the_variance_of_a_sample_without_replacement():
    x, z, keep = draw(60, 4), draw(1, 3, seed=1), 15
    values = NEURON.values(x.t(), z)[0]
    runs = 4000
    errors = torch.stack([outputs(NEURON, prune(x, keep, seed=s), z)[0] - values.mean() for s in range(runs)])
    expected = values.var() / keep * (1 - keep / 60)
    assert abs(errors.mean()) < 4 * math.sqrt(expected / runs)
    # a variance of nearly normal numbers, four standard errors
    assert errors.square().mean() == pytest.approx(expected.item(), rel=4 * math.sqrt(2 / runs))


def test_distances():
    h, reference = torch.tensor([[1.0, 2.0, 5.0], [0.0, 0.0, 0.0]]), torch.tensor([1.0, 4.0, 4.0])
    assert sup_norm(h, reference).tolist() == [2.0, 4.0]
    assert squared_l2(h, reference).tolist() == pytest.approx([5 / 3, 33 / 3])


def test_summaries():
    mean, error = mean_and_error(torch.tensor([1.0, 2.0, 3.0]))
    assert (mean, error) == pytest.approx((2.0, 1 / math.sqrt(3)))
    assert math.isnan(mean_and_error(torch.tensor([1.0]))[1])
    n = torch.tensor([1.0, 2.0, 4.0])
    assert log_slope(n, 3 * n**-0.5) == pytest.approx(-0.5)


@pytest.mark.parametrize("keep", [0, 51])
def test_a_number_of_neurons_that_is_not_there_is_refused(keep):
    with pytest.raises(RequestError, match=f"cannot keep {keep} of 50"):
        prune(draw(50, 4), keep, seed=0)


@pytest.mark.parametrize("members", [0, 8])
def test_a_number_of_networks_that_is_not_there_is_refused(members):
    with pytest.raises(RequestError, match=f"cannot merge {members} of 7"):
        merged_outputs(draw(7, 11), members)
    with pytest.raises(RequestError, match=f"cannot merge {members} of 7"):
        random_merges(draw(7, 11), members, 2, seed=0)
