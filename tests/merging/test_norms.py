"""Norms of products of factors, against those of dense matrices in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from poc_lora.merging import norms
from poc_lora.merging.stacked import StackedFactors
from tests.merging.samples import RANKS, merged, product, stack_of, weights_of


@given(RANKS, st.integers(0, 2**20))
def test_norms_and_effective_rank_are_those_of_the_dense_product(ranks, seed):
    stacked, weights = stack_of(ranks, seed), weights_of(len(ranks))
    A, B = merged("average", stacked, weights)
    values = torch.linalg.svdvals(product(A, B))
    assert norms.product_norm(A, B) == pytest.approx(float(values.norm()), rel=1e-10)
    expected = float((values**2).sum() ** 2 / (values**4).sum())
    assert norms.effective_rank(stacked, weights) == pytest.approx(expected, rel=1e-10)
    cast = A.float(), B.float()
    expected = float((product(A, B) - product(cast[0].double(), cast[1].double())).norm())
    assert norms.cast_distance(A, B, *cast) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("size", [1e-45, 1e-20, 3e38])
def test_effective_rank_does_not_depend_on_the_size_of_the_factors(size):
    A, B = torch.eye(3, 5, dtype=torch.float64), torch.eye(4, 3, dtype=torch.float64)
    weights = weights_of(1)
    assert norms.effective_rank(StackedFactors(size * A, size * B, [3]), weights) == pytest.approx(3, rel=1e-10)
    assert norms.effective_rank(StackedFactors(0 * A, B, [3]), weights) == 0
