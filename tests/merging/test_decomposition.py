"""Decompositions of products of factors, against those of dense matrices in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from poc_lora.merging.decomposition import canonical_factors, decompose
from tests.merging.samples import RANKS, merged, product, stack_of, weights_of


@given(RANKS, st.integers(0, 2**20))
def test_a_decomposition_is_that_of_the_dense_product(ranks, seed):
    stacked, weights = stack_of(ranks, seed), weights_of(len(ranks), seed)
    exact = product(*merged("average", stacked, weights))
    expected = sum(w * product(*stacked.adapter(j)) for j, w in enumerate(weights))
    torch.testing.assert_close(exact, expected, rtol=1e-12, atol=1e-12)
    triples = decompose(*merged("average", stacked, weights))
    U, S, Vh = torch.linalg.svd(expected, full_matrices=False)
    for rank in range(1, sum(ranks) + 1):
        best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        torch.testing.assert_close(product(*triples.truncated(rank)), best, rtol=1e-9, atol=1e-9)
        assert triples.error(rank) == pytest.approx(float((expected - best).norm() / S.norm()), abs=1e-9)


@given(RANKS, st.integers(0, 2**20))
def test_canonical_components_are_each_adapters_singular_triples(ranks, seed):
    stacked = stack_of(ranks, seed)
    other = canonical_factors(stacked)
    for j in range(len(ranks)):
        (A, B), (A_j, B_j) = other.adapter(j), stacked.adapter(j)
        torch.testing.assert_close(product(A, B), product(A_j, B_j), rtol=1e-9, atol=1e-9)
        sizes = A.norm(dim=1) * B.norm(dim=0)
        expected = torch.linalg.svdvals(product(A_j, B_j))[: len(sizes)]
        torch.testing.assert_close(sizes, expected, rtol=1e-9, atol=1e-9)
