"""The ways to merge one module, against dense matrices in float64 and brute force over components."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from poc_lora import rng
from poc_lora.adapters.adapter import Adapter
from poc_lora.adapters.factors import Factors
from poc_lora.errors import AdapterError
from poc_lora.merging import methods, norms
from poc_lora.merging.decomposition import canonical, decompose
from poc_lora.merging.merge import merge, sweep_by_type
from poc_lora.merging.methods import METHODS, ModuleToMerge
from poc_lora.merging.stacked import StackedFactors

D_OUT, D_IN = 9, 7


def stack_of(ranks, seed=0):
    stream = torch.Generator().manual_seed(seed)
    A = torch.randn(sum(ranks), D_IN, generator=stream, dtype=torch.float64)
    B = torch.randn(D_OUT, sum(ranks), generator=stream, dtype=torch.float64)
    return StackedFactors(A, B, list(ranks))


def merged(method, stacked, weights, rank=None, key=0):
    A, B, _ = METHODS[method].merge(ModuleToMerge(stacked, weights, rank, key))
    return A, B


def dense(A, B):
    return B @ A


def weights_of(M, seed=0):
    weights = torch.rand(M, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    return weights / weights.sum()


RANKS = st.lists(st.integers(0, 4), min_size=1, max_size=5).filter(any)


@given(RANKS, st.integers(0, 2**20))
def test_a_decomposition_is_that_of_the_dense_product(ranks, seed):
    stacked, weights = stack_of(ranks, seed), weights_of(len(ranks), seed)
    exact = dense(*merged("average", stacked, weights))
    expected = sum(w * dense(*stacked.adapter(j)) for j, w in enumerate(weights))
    torch.testing.assert_close(exact, expected, rtol=1e-12, atol=1e-12)
    triples = decompose(*merged("average", stacked, weights))
    U, S, Vh = torch.linalg.svd(expected, full_matrices=False)
    for rank in range(1, sum(ranks) + 1):
        best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        torch.testing.assert_close(dense(*triples.truncated(rank)), best, rtol=1e-9, atol=1e-9)
        assert triples.error(rank) == pytest.approx(float((expected - best).norm() / S.norm()), abs=1e-9)


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
    torch.testing.assert_close(dense(A, B), expected, rtol=1e-12, atol=1e-12)
    assert len(A) == kept == min(rank, sum(ranks))


def test_block_of_everything_is_the_average():
    stacked, weights = stack_of([3, 3]), weights_of(2)
    torch.testing.assert_close(
        dense(*merged("block", stacked, weights, 6)), dense(*merged("average", stacked, weights))
    )


@pytest.mark.parametrize("ranks", [[3, 3], [1, 4, 2], [2, 0, 3]])
def test_random_draws_are_the_average_in_the_mean(ranks):
    stacked, weights = stack_of(ranks), weights_of(len(ranks))
    expected = dense(*merged("average", stacked, weights))
    draws = 20_000
    A, B = merged("random", stacked, weights, draws, key=rng.key(7, 0, "test"))
    found = dense(A, B)
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
    torch.testing.assert_close(dense(*merged("soup", stacked, weights)), expected, rtol=1e-10, atol=1e-10)


@given(RANKS, st.integers(0, 2**20))
def test_canonical_components_are_each_adapters_singular_triples(ranks, seed):
    stacked = stack_of(ranks, seed)
    other = canonical(stacked)
    for j in range(len(ranks)):
        (A, B), (A_j, B_j) = other.adapter(j), stacked.adapter(j)
        torch.testing.assert_close(dense(A, B), dense(A_j, B_j), rtol=1e-9, atol=1e-9)
        sizes = A.norm(dim=1) * B.norm(dim=0)
        expected = torch.linalg.svdvals(dense(A_j, B_j))[: len(sizes)]
        torch.testing.assert_close(sizes, expected, rtol=1e-9, atol=1e-9)


def test_canonical_makes_block_independent_of_the_factorisation():
    stacked, weights = stack_of([3, 3]), weights_of(2)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    other = StackedFactors(
        torch.cat([turn.T @ stacked.A[:3], stacked.A[3:]]),
        torch.cat([stacked.B[:, :3] @ turn, stacked.B[:, 3:]], 1),
        [3, 3],
    )
    plain = [dense(*merged("block", s, weights, 2)) for s in (stacked, other)]
    assert not torch.allclose(*plain)
    torch.testing.assert_close(*(dense(*merged("block", canonical(s), weights, 2)) for s in (stacked, other)))


@given(RANKS, st.integers(0, 2**20))
def test_norms_and_effective_rank_are_those_of_the_dense_product(ranks, seed):
    stacked, weights = stack_of(ranks, seed), weights_of(len(ranks))
    A, B = merged("average", stacked, weights)
    values = torch.linalg.svdvals(dense(A, B))
    assert norms.product_norm(A, B) == pytest.approx(float(values.norm()), rel=1e-10)
    expected = float((values**2).sum() ** 2 / (values**4).sum())
    assert norms.effective_rank(stacked, weights) == pytest.approx(expected, rel=1e-10)
    cast = A.float(), B.float()
    expected = float((dense(A, B) - dense(cast[0].double(), cast[1].double())).norm())
    assert norms.cast_distance(A, B, *cast) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("size", [1e-45, 1e-20, 3e38])
def test_effective_rank_does_not_depend_on_the_size_of_the_factors(size):
    A, B = torch.eye(3, 5, dtype=torch.float64), torch.eye(4, 3, dtype=torch.float64)
    weights = weights_of(1)
    assert norms.effective_rank(StackedFactors(size * A, size * B, [3]), weights) == pytest.approx(3, rel=1e-10)
    assert norms.effective_rank(StackedFactors(0 * A, B, [3]), weights) == 0


NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj")


def adapter(seed, rank=3):
    stream = torch.Generator().manual_seed(seed)
    return Adapter(
        {
            n: Factors(torch.randn(rank, D_IN, generator=stream), torch.randn(D_OUT, rank, generator=stream), 0.5)
            for n in NAMES
        }
    )


def matrix(factors):
    return factors.scale * factors.B.double() @ factors.A.double()


def test_every_method_reports_its_distance_from_the_average():
    members = [adapter(seed) for seed in range(3)]
    exact = merge(members)
    for method, rank in (("block", 6), ("random", 5), ("soup", None)):
        result = merge(members, method=method, rank=rank)
        lost = whole = 0.0
        for name in NAMES:
            mean = matrix(exact.adapter.modules[name])
            found = matrix(result.adapter.modules[name])
            module = result.report.modules[name]
            assert module.error == pytest.approx(float((found - mean).norm() / mean.norm()), rel=1e-5)
            lost, whole = lost + (module.error * module.norm) ** 2, whole + module.norm**2
        assert result.report.error == pytest.approx((lost / whole) ** 0.5)
        assert result.report.spread == pytest.approx(exact.report.spread)


def test_truncation_and_rounding_are_told_apart():
    members = [adapter(seed) for seed in range(3)]
    for dtype, least, most in ((torch.float32, 1e-9, 1e-6), (torch.bfloat16, 1e-4, 1e-2)):
        report = merge(members, rank=4, dtype=dtype).report
        assert report.error == pytest.approx(merge(members, rank=4).report.error, rel=1e-12)
        assert least < report.cast_error < most


def test_a_rank_sweep_tells_what_each_rank_would_cost():
    members = [adapter(seed) for seed in range(3)]
    sweep = sweep_by_type(merge(members, rank_sweep=[1, 4, 9]).report)
    assert list(sweep) == ["all", "q_proj", "up_proj"]
    for rank in (1, 4, 9):
        assert sweep["all"][rank] == pytest.approx(merge(members, rank=rank).report.error, abs=1e-9)
        only = [Adapter({NAMES[2]: m.modules[NAMES[2]]}) for m in members]
        assert sweep["up_proj"][rank] == pytest.approx(merge(only, rank=rank).report.error, abs=1e-9)


def test_one_more_adapter_moves_the_merge_about_as_far_as_foretold():
    # Adapters around a common mean: over many of them the root mean square of the moves agrees.
    common = adapter(99).modules
    stream = torch.Generator().manual_seed(1)
    members = [
        Adapter({n: Factors(f.A + torch.randn(f.A.shape, generator=stream), f.B, 1.0) for n, f in common.items()})
        for _ in range(60)
    ]
    foretold = merge(members[:4]).report.next_move
    before = {n: matrix(f) for n, f in merge(members[:4]).adapter.modules.items()}
    norm = sum(m.norm() ** 2 for m in before.values()) ** 0.5
    moves = []
    for extra in members[4:]:
        after = merge([*members[:4], extra]).adapter.modules
        moves.append(sum((matrix(after[n]) - before[n]).norm() ** 2 for n in NAMES) / norm**2)
    # S² from four adapters of some 60 free directions is good to a few parts in ten.
    assert float(torch.stack(moves).mean() ** 0.5) == pytest.approx(foretold, rel=0.3)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"method": "linear"}, r"no method 'linear'(.|\n)*average, block, random, soup"),
        ({"method": "block"}, "number of components"),
        ({"method": "random"}, "number of components"),
        ({"method": "soup", "rank": 4}, "no rank to choose"),
        ({"canonical": True}, "does not depend on components"),
        ({"method": "random", "rank": 4, "weights": [1.5, -0.5]}, "not a probability"),
        ({"rank_sweep": [0]}, "ranks to keep are 0"),
    ],
)
def test_what_makes_no_sense_together_is_refused(asked, words):
    with pytest.raises(AdapterError, match=words):
        merge([adapter(0), adapter(1)], **asked)


def test_a_new_method_is_one_entry(monkeypatch):
    monkeypatch.setattr(methods, "METHODS", dict(METHODS))

    @methods.merge_method("the first adapter alone", rank="unused")
    def first(module):
        return methods.MergedFactors(*module.factors.adapter(0))

    members = [adapter(0), adapter(1)]
    result = merge(members, method="first")
    for name in NAMES:
        torch.testing.assert_close(matrix(result.adapter.modules[name]), matrix(members[0].modules[name]))
    assert result.report.error > 0.1
    with pytest.raises(AdapterError, match=r"no method(.|\n)*soup, first"):
        merge(members, method="last")
