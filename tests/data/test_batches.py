"""The order of rows for each adapter, and their packing into tensors."""

import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poc_lora.data.batches import PAD, BatchOrder, cut_rows, micro_batches, supervised_tokens
from poc_lora.data.prompts import Example


def lengths(n, seed=0):
    draw = random.Random(seed)
    return [min(256, 8 + int(draw.lognormvariate(4, 0.6))) for _ in range(n)]


def order(n=331, batch_size=8, seed=0, group_by_length=True):
    return BatchOrder(lengths(n), batch_size, seed, group_by_length=group_by_length)


def epoch(batches, adapter, number=0):
    steps = batches.steps_per_epoch
    return [batches.rows(adapter, step) for step in range(number * steps, (number + 1) * steps)]


@pytest.mark.parametrize("group_by_length", [True, False])
@pytest.mark.parametrize("n", [1, 7, 8, 128, 331])
def test_every_adapter_sees_every_row_once_an_epoch(n, group_by_length):
    batches = order(n, group_by_length=group_by_length)
    for adapter in (0, 5):
        for number in (0, 1, 3):
            rows = [row for batch in epoch(batches, adapter, number) for row in batch]
            assert sorted(rows) == list(range(n))
    assert batches.steps_per_epoch == -(-n // 8)


@pytest.mark.parametrize("group_by_length", [True, False])
def test_adapters_epochs_and_seeds_differ(group_by_length):
    batches = order(group_by_length=group_by_length)
    assert epoch(batches, 0) != epoch(batches, 1)
    assert epoch(batches, 0) != epoch(batches, 0, 1)
    assert epoch(batches, 0) != epoch(order(seed=1, group_by_length=group_by_length), 0)


@pytest.mark.parametrize("group_by_length", [True, False])
def test_an_adapters_order_does_not_depend_on_what_was_asked_before(group_by_length):
    asked = order(group_by_length=group_by_length)
    steps = 3 * asked.steps_per_epoch
    expected = {(a, s): order(group_by_length=group_by_length).rows(a, s) for a in (0, 7, 100) for s in (0, 50, steps)}
    for (adapter, step), rows in random.Random(0).sample(sorted(expected.items()), len(expected)):
        for other in range(3):
            asked.rows(other, step)
        assert asked.rows(adapter, step) == rows


def test_adapters_have_equally_many_rows_of_like_length_at_each_step():
    batches, sizes = order(), lengths(331)
    longest = sorted(sizes)
    for step in range(batches.steps_per_epoch):
        rows = [batches.rows(adapter, step) for adapter in range(8)]
        assert len({len(r) for r in rows}) == 1
        ranks = [longest.index(sizes[i]) for r in rows for i in r]
        assert max(ranks) - min(ranks) < 16 * 8  # all of one bucket


def test_grouping_by_length_leaves_little_padding():
    sizes = lengths(2000)
    shares = {}
    for grouped in (True, False):
        batches = BatchOrder(sizes, 8, 0, group_by_length=grouped)
        real = computed = 0
        for step in range(batches.steps_per_epoch):
            step_sizes = [sizes[i] for adapter in range(8) for i in batches.rows(adapter, step)]
            real += sum(step_sizes)
            computed += max(step_sizes) * len(step_sizes)
        shares[grouped] = real / computed
    assert shares[True] > 0.85
    assert shares[False] < 0.6


def test_short_and_long_batches_come_in_random_order():
    batches, sizes = order(2000), lengths(2000)
    means = torch.tensor([sum(sizes[i] for i in b) / len(b) for b in epoch(batches, 0)])
    trend = torch.corrcoef(torch.stack([means, torch.arange(len(means)).float()]))[0, 1]
    assert abs(trend) < 5 / len(means) ** 0.5  # five standard errors; sorted batches would give about 0.8


def examples(n, seed=0):
    """Rows of differing tokens (never PAD) and boundaries."""
    draw = random.Random(seed)
    rows = []
    for _ in range(n):
        length = draw.randint(2, 40)
        ends = sorted(draw.sample(range(1, length + 1), 2 * draw.randint(1, length // 2)))
        spans = tuple(zip(ends[::2], ends[1::2], strict=True))
        rows.append(Example(tuple(draw.randint(1, 99) for _ in range(length)), spans))
    return rows


def pack(rows, per_slot, tokens):
    device = torch.device("cpu")
    return list(micro_batches(rows, per_slot, tokens=tokens, device=device))


def predictions(batches):
    """(slot, context, target) of every position that carries a loss, read off the tensors."""
    found = Counter()
    for batch in batches:
        for row, column, target, slot in zip(batch.row, batch.column, batch.target, batch.slot, strict=True):
            found[int(slot), tuple(batch.input_ids[row, : column + 1].tolist()), int(target)] += 1
    return found


@given(
    adapters=st.integers(1, 4),
    per_adapter=st.integers(1, 9),
    tokens=st.integers(1, 2000),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_any_token_budget_predicts_what_a_plain_loop_over_rows_would(adapters, per_adapter, tokens, seed):
    rows = examples(30, seed)
    draw = random.Random(seed)
    per_slot = [draw.sample(range(30), per_adapter) for _ in range(adapters)]
    batches = pack(rows, per_slot, tokens)

    expected = Counter()
    for slot, chosen in enumerate(per_slot):
        for i in chosen:
            ids = rows[i].ids
            for t in (t for span in rows[i].supervised for t in range(*span)):
                expected[slot, ids[:t], ids[t]] += 1
    assert predictions(batches) == expected
    for slot, chosen in enumerate(per_slot):
        count = sum(supervised_tokens(rows[i]) for i in chosen)
        assert count == sum(n for (s, _, _), n in expected.items() if s == slot)


@given(tokens=st.integers(1, 3000), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_micro_batches_are_adapter_major_and_part_the_rows_within_the_budget(tokens, seed):
    rows = examples(24, seed)
    per_slot = [list(range(12)), list(range(12, 24))]
    seen = [[], []]
    for batch in pack(rows, per_slot, tokens):
        each = len(batch.examples) // 2
        assert batch.input_ids.shape[0] == len(batch.examples) == 2 * each
        seen[0] += batch.examples[:each]
        seen[1] += batch.examples[each:]
        for row, i in enumerate(batch.examples):
            ids = rows[i].ids
            assert batch.input_ids[row].tolist() == [*ids, *[PAD] * (batch.input_ids.shape[1] - len(ids))]
            assert (batch.slot[batch.row == row] == row // each).all()
        assert batch.input_ids.numel() <= tokens or each == 1
        assert batch.tokens == sum(len(rows[i].ids) for i in batch.examples)
    assert [sorted(s) for s in seen] == per_slot


def test_a_large_budget_takes_the_step_in_one_pack():
    rows = examples(16)
    assert len(pack(rows, [range(8), range(8, 16)], 10**6)) == 1


def test_an_empty_step_has_no_packs():
    assert pack(examples(4), [[]], 100) == []


@given(st.integers(1, 200), st.integers(1, 9), st.integers(0, 2**32))
def test_rows_can_be_cut_into_more_parts_than_the_budget_asks_for(tokens, at_least, seed):
    rows = examples(24, seed)
    per_slot = [list(range(8)), list(range(8, 16))]
    fewest = cut_rows(rows, per_slot, tokens=tokens)
    parts = cut_rows(rows, per_slot, tokens=tokens, at_least=at_least)
    assert len(parts) == max(len(fewest), min(at_least, 8))
    for slot, chosen in enumerate(per_slot):
        assert sorted(i for part in parts for i in part[slot]) == chosen
    assert all(len(part[0]) == len(part[1]) > 0 for part in parts)
