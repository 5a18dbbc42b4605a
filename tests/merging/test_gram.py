import math

import pytest
import torch

from poc_lora.adapters.adapter import Adapter
from poc_lora.adapters.factors import Factors
from poc_lora.merging import gram
from poc_lora.merging.stacked import stack

SHAPES = {"layers.0.q_proj": (12, 10), "layers.0.up_proj": (16, 10)}


def random_adapter(stream: torch.Generator, rank: int, scale: float = 1.0, without: str = "") -> Adapter:
    return Adapter(
        {
            name: Factors(torch.randn(rank, d_in, generator=stream), torch.randn(d_out, rank, generator=stream), scale)
            for name, (d_out, d_in) in SHAPES.items()
            if name != without
        }
    )


def dense(adapter: Adapter, name: str) -> torch.Tensor:
    if name not in adapter.modules:
        return torch.zeros(SHAPES[name], dtype=torch.float64)
    factors = adapter.modules[name]
    return factors.scale * factors.B.double() @ factors.A.double()


def flat(adapter: Adapter) -> torch.Tensor:
    return torch.cat([dense(adapter, name).flatten() for name in SHAPES])


def total_gram(adapters: list[Adapter]) -> torch.Tensor:
    return sum(gram.gram(stack([adapter.modules.get(name) for adapter in adapters])) for name in SHAPES)


@pytest.fixture
def adapters() -> list[Adapter]:
    stream = torch.Generator().manual_seed(5)
    return [
        random_adapter(stream, 2, 0.5),
        random_adapter(stream, 5, 2.0),
        random_adapter(stream, 3, 1.0, without="layers.0.up_proj"),
    ]


def test_gram_from_the_factors_is_the_gram_of_the_dense_updates(adapters):
    for name in SHAPES:
        found = gram.gram(stack([adapter.modules.get(name) for adapter in adapters]))
        rows = torch.stack([dense(adapter, name).flatten() for adapter in adapters])
        torch.testing.assert_close(found, rows @ rows.T, rtol=1e-12, atol=1e-12)
    rows = torch.stack([flat(adapter) for adapter in adapters])
    torch.testing.assert_close(total_gram(adapters), rows @ rows.T, rtol=1e-12, atol=1e-12)


def test_cosine_variance_and_merge_variance_are_those_of_the_dense_updates(adapters):
    total = total_gram(adapters)
    rows = torch.stack([flat(adapter) for adapter in adapters])
    units = rows / rows.norm(dim=1, keepdim=True)
    torch.testing.assert_close(gram.cosine(total), units @ units.T, rtol=1e-12, atol=1e-12)
    mean = rows.mean(0)
    S2 = float(((rows - mean) ** 2).sum()) / 2
    assert gram.variance(total) == pytest.approx(S2, rel=1e-10)
    assert gram.merge_variance(total) == pytest.approx(S2 / 3, rel=1e-10)
    assert gram.relative_standard_error(total) == pytest.approx(math.sqrt(S2 / 3) / float(mean.norm()), rel=1e-10)
    off_diagonal = (units @ units.T)[~torch.eye(3, dtype=torch.bool)]
    assert gram.mean_cosine(total) == pytest.approx(float(off_diagonal.mean()), rel=1e-10)


def test_the_merge_variance_estimates_the_squared_distance_of_the_merge_from_the_limit_of_many():
    # Adapters = a common part plus independent noise: the limit is known. The mean over 300 repetitions of a
    # chi-square-like ratio with some hundred degrees of freedom each lies within 10 % with a wide margin.
    stream = torch.Generator().manual_seed(11)
    common = random_adapter(stream, 2).modules
    estimates, distances = [], []
    for _ in range(300):
        members = []
        for _ in range(4):
            noise = random_adapter(stream, 3, 0.3).modules
            members.append(
                Adapter(
                    {
                        name: Factors(
                            torch.cat([common[name].A, noise[name].A]),
                            torch.cat([common[name].B, noise[name].B * 0.3], 1),
                        )
                        for name in SHAPES
                    }
                )
            )
        estimates.append(gram.merge_variance(total_gram(members)))
        mean = torch.stack([flat(member) for member in members]).mean(0)
        distances.append(float(((mean - flat(Adapter(common))) ** 2).sum()))
    assert sum(estimates) / sum(distances) == pytest.approx(1, abs=0.1)


def test_copies_have_cosine_one_and_no_variance(adapters):
    total = total_gram([adapters[0]] * 4)
    assert gram.mean_cosine(total) == pytest.approx(1)
    assert gram.variance(total) <= 1e-12 * float(total[0, 0])


def test_one_adapter_has_no_variance_and_a_zero_update_no_direction(adapters):
    assert set(gram.summary(total_gram(adapters[:1])).values()) == {None}
    zero = Adapter({name: Factors(f.A, torch.zeros_like(f.B)) for name, f in adapters[0].modules.items()})
    total = total_gram([zero, zero])
    assert gram.mean_cosine(total) == 0
    assert gram.relative_standard_error(total) is None


def test_the_merge_variance_of_unequal_weights_is_that_of_the_weighted_sum():
    inner = torch.diag(torch.tensor([2.0, 2.0, 2.0, 2.0], dtype=torch.float64))
    weights = [0.7, 0.1, 0.1, 0.1]
    assert gram.merge_variance(inner, weights) == pytest.approx(gram.variance(inner) * 0.52)
    assert gram.merge_variance(inner) == pytest.approx(gram.variance(inner) / 4)
