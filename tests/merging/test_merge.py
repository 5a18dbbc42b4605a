"""`merge` and its report, against dense matrices in float64."""

import pytest
import torch

from poc_lora.adapters.adapter import Adapter
from poc_lora.adapters.factors import Factors
from poc_lora.errors import AdapterError, RequestError
from poc_lora.merging.merge import merge, sweep_by_type
from tests.merging.samples import (
    D_IN,
    D_OUT,
    SHAPES,
    UP,
    Q,
    average,
    dense,
    random_adapter,
)


def test_exact_merge_is_the_average_of_the_products(mixed):
    merged = merge(mixed)
    for name in SHAPES:
        torch.testing.assert_close(dense(merged.adapter.modules[name]), average(mixed, name), rtol=1e-6, atol=1e-6)
        assert merged.adapter.modules[name].rank == 2 + 5 + 3
        assert merged.report.modules[name].norm == pytest.approx(float(average(mixed, name).norm()), rel=1e-10)
    assert merged.report.error == 0
    assert merged.report.rank == 10


def test_weights_are_used_as_given(mixed):
    weights = [0.5, 0.75, -0.25]
    merged = merge(mixed, weights=weights)
    for name in SHAPES:
        expected = average(mixed, name, weights)
        torch.testing.assert_close(dense(merged.adapter.modules[name]), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 4, 9])
@pytest.mark.parametrize("weights", [None, [0.2, 0.9, -0.1]])
def test_truncated_merge_is_the_best_approximation_of_that_rank(mixed, rank, weights):
    merged = merge(mixed, rank=rank, weights=weights)
    lost = whole = 0.0
    for name in SHAPES:
        U, S, Vh = torch.linalg.svd(average(mixed, name, weights), full_matrices=False)
        best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        torch.testing.assert_close(dense(merged.adapter.modules[name]), best, rtol=1e-5, atol=1e-5)
        report = merged.report.modules[name]
        assert report.error == pytest.approx(float(S[rank:].norm() / S.norm()), rel=1e-8, abs=1e-12)
        assert merged.adapter.modules[name].rank == report.rank == rank
        lost, whole = lost + float((S[rank:] ** 2).sum()), whole + float((S**2).sum())
    assert merged.report.error == pytest.approx((lost / whole) ** 0.5, rel=1e-8)


def test_merging_copies_gives_the_adapter_back():
    one = random_adapter(4, 3, 0.7)
    for merged in (merge([one] * 5), merge([one] * 5, rank=3), merge([one])):
        for name in SHAPES:
            torch.testing.assert_close(
                dense(merged.adapter.modules[name]), dense(one.modules[name]), rtol=1e-6, atol=1e-6
            )
    assert merge([one] * 5, rank=3).report.error < 1e-12


def test_a_module_that_an_adapter_lacks_counts_as_zero(mixed):
    mixed[1] = Adapter({Q: mixed[1].modules[Q]})
    for rank in (None, 2):
        merged = merge(mixed, rank=rank)
        expected = average(mixed, UP)
        if rank:
            U, S, Vh = torch.linalg.svd(expected)
            expected = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        torch.testing.assert_close(dense(merged.adapter.modules[UP]), expected, rtol=1e-5, atol=1e-5)
        assert merged.report.modules[Q].absent == []
        assert merged.report.modules[UP].absent == [j for j, adapter in enumerate(mixed) if UP not in adapter.modules]


def test_variance_is_the_same_exact_and_truncated(mixed):
    exact, truncated = merge(mixed).report, merge(mixed, rank=2).report
    rows = torch.stack([torch.cat([dense(a.modules[name]).flatten() for name in SHAPES]) for a in mixed])
    assert exact.variance == pytest.approx(float(((rows - rows.mean(0)) ** 2).sum()) / 2, rel=1e-10)
    assert exact.merge_variance == pytest.approx(exact.variance / 3)
    assert truncated.variance == pytest.approx(exact.variance, rel=1e-10)
    assert truncated.norm == pytest.approx(exact.norm, rel=1e-10)


def test_the_report_compares_the_adapters_module_by_module_and_as_a_whole(mixed):
    report = merge(mixed, rank=2).report
    values = []
    for name in SHAPES:
        rows = torch.stack([dense(adapter.modules[name]).flatten() for adapter in mixed])
        units = rows / rows.norm(dim=1, keepdim=True)
        module = report.modules[name]
        assert module.pair_cosines == pytest.approx([float(units[i] @ units[j]) for i, j in ((0, 1), (0, 2), (1, 2))])
        assert module.norms == pytest.approx(rows.norm(dim=1).tolist())
        assert module.variance == pytest.approx(float(((rows - rows.mean(0)) ** 2).sum()) / 2)
        values.append(torch.linalg.svdvals(average(mixed, name)))
    values = torch.cat(values)
    assert report.effective_rank == pytest.approx(float(values.square().sum() ** 2 / values.pow(4).sum()))


def test_low_precision_factors_are_merged_in_float64():
    adapters = [random_adapter(seed, 2) for seed in (1, 2)]
    half = [
        Adapter({name: Factors(f.A.bfloat16(), f.B.half(), f.scale) for name, f in a.modules.items()}) for a in adapters
    ]
    for name in SHAPES:
        found = dense(merge(half).adapter.modules[name])
        torch.testing.assert_close(found, average(half, name), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"adapters": []}, "no adapters"),
        ({"rank": 0}, "ranks to keep are 0"),
        ({"rank": 2**70}, "ranks to keep"),
        ({"rank_sweep": [4, 10**20]}, "ranks to keep"),
        ({"method": "block", "rank": 2}, "leaves some of 3 adapters no component"),
        ({"weights": [0.5, 0.5]}, "2 weights for 3"),
        ({"weights": [float("nan"), 0.5, 0.5]}, "not a finite"),
        ({"weights": [1.0, 1.0, 1.0]}, "sum to 3"),
        ({"dtype": torch.int8}, "int8"),
        ({"method": "random", "rank": 3, "seed": 10**400}, "seed"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(mixed, change, words):
    arguments = {"adapters": mixed, **change}
    with pytest.raises(RequestError, match=words) as problem:
        merge(arguments.pop("adapters"), **arguments)
    assert type(problem.value) is RequestError  # no adapter is to blame


def test_disagreeing_shapes_name_the_module(mixed):
    mixed[2].modules[UP] = Factors(torch.ones(1, 10), torch.ones(17, 1))
    with pytest.raises(AdapterError, match=rf"{UP} is 17×10 here, but 16×10"):
        merge(mixed)


def test_factors_that_are_not_finite_or_overflow_are_refused(mixed):
    huge = Adapter({Q: Factors(torch.full((1, 10), 1e30), torch.full((12, 1), 1e30), 1e300)})
    for rank in (None, 1):
        with pytest.raises(AdapterError, match="overflows"):
            merge([huge, random_adapter(1, 2)], rank=rank)
    mixed[0].modules[Q].A[0, 0] = float("inf")
    with pytest.raises(AdapterError, match="NaN or infinity"):
        merge(mixed)


def test_differently_named_hub_bases_are_refused_unless_allowed():
    one, two = random_adapter(1, 2, base_model="org/one"), random_adapter(2, 2, base_model="org/two")
    with pytest.raises(AdapterError, match=r"org/two.*org/one"):
        merge([one, two])
    assert merge([one, two], allow_base_mismatch=True).adapter.base_model == "org/one"
    for elsewhere in (None, "/models/one", "./one"):
        assert merge([one, random_adapter(2, 2, base_model=elsewhere)]).adapter.base_model == "org/one"


def test_a_rank_that_cannot_be_written_is_refused_before_the_work(monkeypatch):
    wide = [random_adapter(seed, 8) for seed in range(3)]
    monkeypatch.setattr("poc_lora.merging.methods.MAX_RANK", 23)
    with pytest.raises(RequestError, match=r"has rank 24(.*)at most 23") as problem:
        merge(wide)
    assert "--rank" in problem.value.fix
    assert merge(wide, rank=5).report.rank == 5


def test_a_base_that_others_can_name_is_preferred():
    adapters = [random_adapter(1, 2, base_model="/home/me/llama"), random_adapter(2, 2, base_model="org/llama")]
    assert merge(adapters).adapter.base_model == "org/llama"


NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj")


def adapter(seed, rank=3):
    stream = torch.Generator().manual_seed(seed)
    return Adapter(
        {
            n: Factors(torch.randn(rank, D_IN, generator=stream), torch.randn(D_OUT, rank, generator=stream), 0.5)
            for n in NAMES
        }
    )


def test_every_method_reports_its_distance_from_the_average():
    members = [adapter(seed) for seed in range(3)]
    exact = merge(members)
    for method, rank in (("block", 6), ("random", 5), ("soup", None)):
        result = merge(members, method=method, rank=rank)
        lost = whole = 0.0
        for name in NAMES:
            mean = dense(exact.adapter.modules[name])
            found = dense(result.adapter.modules[name])
            module = result.report.modules[name]
            assert module.error == pytest.approx(float((found - mean).norm() / mean.norm()), rel=1e-5)
            lost, whole = lost + (module.error * module.norm) ** 2, whole + module.norm**2
        assert result.report.error == pytest.approx((lost / whole) ** 0.5)
        assert result.report.variance == pytest.approx(exact.report.variance)


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
    before = {n: dense(f) for n, f in merge(members[:4]).adapter.modules.items()}
    norm = sum(m.norm() ** 2 for m in before.values()) ** 0.5
    moves = []
    for extra in members[4:]:
        after = merge([*members[:4], extra]).adapter.modules
        moves.append(sum((dense(after[n]) - before[n]).norm() ** 2 for n in NAMES) / norm**2)
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
    with pytest.raises(RequestError, match=words) as problem:
        merge([adapter(0), adapter(1)], **asked)
    assert type(problem.value) is RequestError
