"""Which adapters are left out of a merge, by the lines of their last validation."""

import json

import numpy as np
import pytest

from poc_lora.reporting.page import render_page
from poc_lora.reporting.run_files import read_run
from poc_lora.reporting.screening import better_than_merge, outcome, screen
from tests.reporting.html import Page
from tests.reporting.run_folder import make_run

ROWS, TOKENS = 40, 2
BASE, LEARNT = 10.0, 4.0  # the losses of a row under the base and under a typical adapter


def write(folder, *packs, base=BASE, rows=ROWS, noise=0.3, merge=LEARNT, best=None, merge_of_best=LEARNT):
    """metrics.jsonl with the last validation of packs of adapters, given by their mean losses of a row.

    Without `best`, the adapters whose merge was measured too, it is that of an earlier version.
    """
    draw = np.random.default_rng(0)
    hard = draw.normal(0, 1, rows)  # rows are hard for all alike
    lines = []
    for pack in packs:
        means = {"base": base, **pack, "merge": merge} | ({"merge_of_best": merge_of_best} if best else {})
        for name, mean in means.items():
            losses = mean + hard + draw.normal(0, noise, rows)
            line = {"step": 6, "adapter": name, "members": list(pack), "row_losses": losses.tolist()}
            more = {"base": {"row_tokens": [TOKENS] * rows}, "merge_of_best": {"merges": best}}
            lines.append(json.dumps(line | more.get(name, {})))
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    return folder


def alike(*numbers, **others):
    return {number: LEARNT + 0.05 * number for number in numbers} | {int(n[1:]): loss for n, loss in others.items()}


def test_two_of_eight_that_collapsed_are_left_out(tmp_path):
    found = screen(write(tmp_path, alike(0, 1, 3, 4, 6, 7, _2=7.5, _5=12.0)))
    assert found.left_out == [2, 5]
    assert [found.losses[number] for number in (2, 5)] == pytest.approx([7.5 / TOKENS, 12.0 / TOKENS], abs=0.2)
    said = str(found)
    assert said.startswith(
        f"Adapters 02 ({found.losses[2]:.3f}), 05 ({found.losses[5]:.3f}) learnt less than three quarters"
    )
    assert f"the loss of the median adapter is {found.median:.3f}, the base's {found.base:.3f}, that of" in said
    assert said.endswith("--keep-all.")  # what the others are worth was not measured


def test_adapters_that_learnt_about_the_same_are_kept(tmp_path):
    assert screen(write(tmp_path, alike(0, 1, 2, 3, 4, 5, 6, _7=5.0))).left_out == []


def test_the_limit_is_three_quarters_of_the_median_adapters_gain(tmp_path):
    for loss, left_out in ((5.3, []), (5.7, [2])):
        found = screen(write(tmp_path, {0: LEARNT, 1: LEARNT, 2: loss}, noise=0))
        assert found.left_out == left_out


def test_where_training_did_not_help_none_is_left_out(tmp_path):
    assert screen(write(tmp_path, alike(0, 1, 2, _3=15.0), base=3.0)).left_out == []


def test_a_difference_that_few_rows_cannot_show_leaves_none_out(tmp_path):
    pack = {0: LEARNT, 1: LEARNT, 2: np.array([LEARNT] * 7 + [50.0])}  # one row of eight is to blame
    assert screen(write(tmp_path, pack, rows=8, noise=0)).left_out == []
    assert screen(write(tmp_path, pack | {2: 10.5}, rows=8, noise=0)).left_out == [2]


def test_adapters_of_several_packs_are_compared_together(tmp_path):
    found = screen(write(tmp_path, {0: LEARNT, 1: 12.0}, {2: LEARNT, 3: LEARNT}))
    assert found.left_out == [1]
    assert "the merge of all" not in str(found)


def test_two_adapters_or_no_rows_held_out_are_not_screened(tmp_path):
    assert screen(tmp_path) is None
    assert screen(write(tmp_path, {0: LEARNT, 1: 12.0})) is None


def test_adapters_without_which_the_merge_is_better_are_left_out(tmp_path):
    """As in a sweep of learning rates: some collapsed, and yet gained most of what there was to gain over the base."""
    pack = {0: 3.0, 1: 1.1, 2: 1.0, 3: 1.2, 4: 2.8, 5: 3.1}
    found = screen(write(tmp_path, pack, base=30.0, merge=4.0, best=[1, 2, 3], merge_of_best=0.8))
    assert found.left_out == [0, 4, 5]
    assert found.merge - found.others.merge == pytest.approx(-found.gain[0])
    assert found.gain[1] < found.gain[0] < found.gain[2] < 0
    said = str(found)
    assert f"05 ({found.losses[5]:.3f}) would spoil the merge: on {ROWS} held-out rows" in said
    assert f"that of the merge of all adapters {found.merge:.3f}, without them {found.others.merge:.3f} (" in said
    assert said.endswith("the merge of 3 adapters is better than every adapter" + said.rpartition("every adapter")[2])
    assert "Use the merge." in said


@pytest.mark.parametrize(
    ("merge", "merge_of_best"),
    [
        (4.0, 3.99),  # no better by more than chance
        (0.9, 0.5),  # better, but the merge of all is better than its adapters already
    ],
)
def test_a_merge_that_is_not_spoilt_is_of_all(tmp_path, merge, merge_of_best):
    pack = {0: 5.0, 1: 1.1, 2: 1.0, 3: 1.2}
    found = screen(write(tmp_path, pack, base=30.0, merge=merge, best=[1, 2, 3], merge_of_best=merge_of_best))
    assert found.left_out == []


def test_adapters_that_learnt_too_little_and_others_that_spoil_the_merge_are_left_out(tmp_path):
    pack = {0: 5.0, 1: 1.1, 2: 1.0, 3: 25.0, 4: 1.2}
    how = dict(base=30.0, merge=6.0, merge_of_best=0.8)
    assert screen(write(tmp_path, pack, **how, best=[1, 2, 4])).left_out == [0, 3]
    collapsed = screen(write(tmp_path, pack, **how, best=[0, 1, 2, 4]))
    assert collapsed.left_out == [3]
    assert "learnt less than three quarters" in str(collapsed)
    assert f"without it {collapsed.others.merge:.3f} (" in str(collapsed)
    assert screen(write(tmp_path, pack, **how, best=[2, 3])).left_out == [3]  # a file that does not fit together


@pytest.mark.parametrize(("merge_of_best", "left_out"), [(6.0, []), (LEARNT, [0]), (2.0, [0])])
def test_adapters_without_which_the_merge_is_measured_to_be_worse_are_kept(tmp_path, merge_of_best, left_out):
    """As where another adapter is far larger: one that learnt little tempers it."""
    pack = {0: 8.5, 1: LEARNT, 2: LEARNT + 1}
    run = write(tmp_path, pack, best=[1, 2], merge_of_best=merge_of_best)
    found = screen(run)
    assert found.left_out == left_out
    assert (found.others is not None) == bool(left_out)
    if not left_out:
        assert outcome(run)[0].startswith(f"On {ROWS} held-out rows the merge of 3 adapters ")


@pytest.mark.parametrize("best", [[0, 1, 2, 3], [1, 9]])
def test_a_merge_of_other_adapters_than_the_packs_is_ignored(tmp_path, best):
    found = screen(write(tmp_path, alike(0, 1, 2, _3=12.0), best=best, merge_of_best=0.1))
    assert found.left_out == [3]  # by its loss alone
    assert found.others is None


def test_what_is_said_in_the_terminal_and_on_the_page_is_of_the_merge_without_them(tmp_path):
    (make_run(tmp_path) / "eval" / "results.json").unlink()
    pack = {0: 3.0, 1: 1.1, 2: 1.0, 3: 1.2}
    write(tmp_path, pack, base=30.0, merge=4.0, best=[1, 2, 3], merge_of_best=1.5)
    found = screen(tmp_path)
    assert outcome(tmp_path) == [str(found)]
    assert better_than_merge(tmp_path) == 2  # the best of those that are kept
    text = Page(render_page(read_run(tmp_path))).text
    assert "would spoil the merge" in text
    assert f"{found.others.merge:.3f}" in text
    assert "the merge of 4 adapters" not in text
