"""Which rank trains what: everything once, evenly, and as before where a run goes on."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poc_lora.training.placement import Placement, Progress, place

STEPS = 100


def fresh(count):
    return {adapter: Progress(0) for adapter in range(count)}


def packs(placement):
    return [pack for packs in placement.rounds for pack in packs if pack]


@pytest.mark.parametrize(
    ("count", "ranks", "per_device", "expected"),
    [
        (8, 1, 8, [[[0, 1, 2, 3, 4, 5, 6, 7]]]),
        (8, 2, 8, [[[0, 1, 2, 3], [4, 5, 6, 7]]]),
        (5, 2, 8, [[[0, 1, 2], [3, 4]]]),
        (5, 1, 2, [[[0, 1]], [[2, 3]], [[4]]]),
        (5, 2, 2, [[[0, 1], [3, 4]], [[2], []]]),
        (3, 3, 1, [[[0], [1], [2]]]),
    ],
)
def test_a_new_run_is_shared_out_evenly(count, ranks, per_device, expected):
    assert place(fresh(count), STEPS, ranks=ranks, per_device=per_device).rounds == expected


states = st.builds(
    Progress, st.sampled_from([0, 30, 60]), st.sampled_from(["training", "training", "finished", "diverged"])
)


@given(st.lists(states, min_size=1, max_size=20), st.integers(1, 5), st.integers(1, 6))
def test_all_adapters_in_training_are_placed_once_in_packs_of_one_step(states, ranks, per_device):
    progress = dict(enumerate(states))
    placement = place(progress, STEPS, ranks=ranks, per_device=per_device)
    placed = [adapter for pack in packs(placement) for adapter in pack]
    assert sorted(placed) == [a for a, state in progress.items() if state.status == "training"]
    for pack in packs(placement):
        assert len(pack) <= per_device
        assert len({progress[a].step for a in pack}) == 1
    work = [sum(STEPS - progress[a].step for p in placement.rounds for a in p[rank]) for rank in range(ranks)]
    assert max(work) - min(work) <= STEPS
    for ranks_packs in placement.rounds:
        assert len(ranks_packs) == ranks
        assert len({progress[a].step for pack in ranks_packs for a in pack}) == 1


@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 4), st.data())
def test_a_run_that_goes_on_as_it_was_keeps_its_packs_slot_by_slot(count, ranks, per_device, data):
    before = place(fresh(count), STEPS, ranks=ranks, per_device=per_device)
    done = data.draw(st.integers(0, len(before.rounds) - 1))  # rounds that are finished
    progress = fresh(count)
    for number, round_ in enumerate(before.rounds[: done + 1]):
        state = Progress(STEPS, "finished") if number < done else Progress(30)
        progress |= {a: state for pack in round_ for a in pack}
    diverged = data.draw(st.sampled_from([a for pack in before.rounds[done] for a in pack]))
    progress[diverged] = Progress(12, "diverged")
    after = place(progress, STEPS, ranks=ranks, per_device=per_device, before=before)
    for was, now in zip(
        [r for r in before.rounds[done:] if any(progress[a].status == "training" for p in r for a in p)],
        after.rounds,
        strict=True,
    ):
        for pack_before, pack_now in zip(was, now, strict=True):
            assert pack_now == (pack_before if any(progress[a].status == "training" for a in pack_before) else [])


def test_packs_under_way_stay_when_adapters_are_added_and_the_least_loaded_rank_gets_them():
    before = Placement([[[0, 1, 2], [3, 4]]], per_device=4)
    progress = {a: Progress(50) for a in range(5)} | {a: Progress(0) for a in range(5, 8)}
    after = place(progress, STEPS, ranks=2, per_device=4, before=before)
    assert after.rounds == [[[0, 1, 2], [3, 4]], [[5], [6, 7]]]


def test_other_ranks_or_smaller_packs_mean_new_places():
    before = Placement([[[0, 1, 2], [3, 4]]], per_device=4)
    progress = {a: Progress(50) for a in range(5)} | {2: Progress(7, "diverged")}
    assert place(progress, STEPS, ranks=1, per_device=4, before=before).rounds == [[[0, 1, 3, 4]]]
    assert place(progress, STEPS, ranks=2, per_device=2, before=before).rounds == [[[0, 1], [3, 4]]]
    assert place(progress, STEPS, ranks=2, per_device=5, before=before).rounds == before.rounds


def test_a_finished_run_has_no_work():
    progress = {0: Progress(STEPS, "finished"), 1: Progress(4, "diverged")}
    before = Placement([[[0], [1]]], per_device=4)
    assert place(progress, STEPS, ranks=2, per_device=4, before=before).rounds == []
