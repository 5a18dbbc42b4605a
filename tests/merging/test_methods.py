"""The ways to merge one module, against dense matrices in float64 and brute force over components."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from poc_lora import rng
from poc_lora.errors import RequestError
from poc_lora.merging import methods
from poc_lora.merging.decomposition import canonical_factors
from poc_lora.merging.merge import merge
from poc_lora.merging.methods import METHODS
from poc_lora.merging.stacked import StackedFactors
from tests.merging.samples import (
    D_IN,
    D_OUT,
    RANKS,
    SHAPES,
    dense,
    merged,
    product,
    random_adapter,
    stack_of,
    weights_of,
)


@given(RANKS, st.integers(1, 12), st.integers(0, 2**20))
def test_block_keeps_the_first_components_of_each_rescaled(ranks, rank, seed):
    stacked, weights = stack_of(ranks, seed), weights_of(len(ranks), seed)
    A, B = merged("block", stacked, weights, rank)
    expected = torch.zeros(D_OUT, D_IN, dtype=torch.float64)
    kept = 0
    turns = [j for turn in range(max(ranks)) for j, r in enumerate(ranks) if turn < r][:rank]
    for j, r in enumerate(ranks):
        k = turns.count(j)
        A_j, B_j = stacked.adapter(j)
        for i in range(k):
            expected += weights[j] * r / k * torch.outer(B_j[:, i], A_j[i])
        kept += k
    torch.testing.assert_close(product(A, B), expected, rtol=1e-12, atol=1e-12)
    assert len(A) == kept == min(rank, sum(ranks))


def test_block_of_everything_is_the_average():
    stacked, weights = stack_of([3, 3]), weights_of(2)
    torch.testing.assert_close(
        product(*merged("block", stacked, weights, 6)), product(*merged("average", stacked, weights))
    )


@pytest.mark.parametrize("ranks", [[3, 3], [1, 4, 2], [2, 0, 3]])
def test_random_draws_are_the_average_in_the_mean(ranks):
    stacked, weights = stack_of(ranks), weights_of(len(ranks))
    expected = product(*merged("average", stacked, weights))
    draws = 20_000
    A, B = merged("random", stacked, weights, draws, key=rng.key(7, 0, "test"))
    found = product(A, B)
    # Each draw is s_j r_j b aᵀ with probability w_j / r_j: the variance of a mean of draws, entry by entry.
    second = torch.zeros_like(expected)
    for j, r in enumerate(ranks):
        A_j, B_j = stacked.adapter(j)
        for i in range(r):
            second += weights[j] / r * (r * torch.outer(B_j[:, i], A_j[i])) ** 2
    deviation = ((second - expected**2) / draws).sqrt()
    assert ((found - expected).abs() < 5 * deviation).all()  # 63 entries at five deviations: once in 30,000 seeds


def test_random_draws_are_those_of_their_key_alone_and_components_as_they_are():
    stacked, weights = stack_of([2, 3]), weights_of(2)
    A, B = merged("random", stacked, weights, 5, key=rng.key(3, 0, "test"))
    again = merged("random", stacked, weights, 5, key=rng.key(3, 0, "test"))
    assert torch.equal(A, again[0])
    assert torch.equal(B, again[1])
    assert not torch.equal(A, merged("random", stacked, weights, 5, key=rng.key(4, 0, "test"))[0])
    for a, b in zip(A, B.T, strict=True):
        (i,) = [i for i in range(5) if torch.equal(stacked.A[i], a)]
        torch.testing.assert_close(b, stacked.B[:, i] * (2 if i < 2 else 3) / 5)


@given(RANKS, st.integers(0, 2**20))
def test_soup_is_the_product_of_the_averages_cross_terms_included(ranks, seed):
    stacked, weights = stack_of(ranks, seed), weights_of(len(ranks), seed)
    expected = torch.zeros(D_OUT, D_IN, dtype=torch.float64)
    for (i, w_i), (j, w_j) in itertools.product(enumerate(weights), repeat=2):
        r = min(ranks[i], ranks[j])
        expected += w_i * w_j * stacked.adapter(i)[1][:, :r] @ stacked.adapter(j)[0][:r]
    torch.testing.assert_close(product(*merged("soup", stacked, weights)), expected, rtol=1e-10, atol=1e-10)


def test_canonical_makes_block_independent_of_the_factorisation():
    stacked, weights = stack_of([3, 3]), weights_of(2)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    other = StackedFactors(
        torch.cat([turn.T @ stacked.A[:3], stacked.A[3:]]),
        torch.cat([stacked.B[:, :3] @ turn, stacked.B[:, 3:]], 1),
        [3, 3],
    )
    plain = [product(*merged("block", s, weights, 2)) for s in (stacked, other)]
    assert not torch.allclose(*plain)
    torch.testing.assert_close(*(product(*merged("block", canonical_factors(s), weights, 2)) for s in (stacked, other)))


def test_a_new_method_is_one_entry(monkeypatch):
    monkeypatch.setattr(methods, "METHODS", dict(METHODS))

    @methods.merge_method("the first adapter alone", rank="unused")
    def first(module):
        return methods.MergedFactors(*module.factors.adapter(0))

    members = [random_adapter(0, 3), random_adapter(1, 3)]
    result = merge(members, method="first")
    for name in SHAPES:
        torch.testing.assert_close(dense(result.adapter.modules[name]), dense(members[0].modules[name]))
    assert result.report.error > 0.1
    with pytest.raises(RequestError, match=r"no method(.|\n)*soup, first"):
        merge(members, method="last")
