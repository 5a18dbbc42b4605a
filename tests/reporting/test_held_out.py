"""What the merge is worth on the held-out rows: read from metrics.jsonl, compared by rows, and said."""

import json
import shutil

import numpy as np
import pytest

from poc_lora.artifacts.row_losses import RowLosses
from poc_lora.reporting import held_out
from poc_lora.reporting.held_out import (
    paired_interval,
    read_held_out,
    rows_notes,
    rows_table,
    verdict,
)
from poc_lora.reporting.run_files import best_adapter, read_run
from poc_lora.reporting.screening import better_than_merge
from tests.reporting.run_folder import make_run, results

ROWS = 40


def write(folder, *packs, step=6, members=None):
    """metrics.jsonl with the last validation of packs: dicts of row losses by name; `base` and `merge` among them."""
    folder.mkdir(exist_ok=True)
    lines = []
    for pack in packs:
        together = members or [name for name in pack if isinstance(name, int)]
        for name, losses in pack.items():
            line = {"step": step, "adapter": name, "members": together, "row_losses": list(losses)}
            lines.append(line | ({"row_tokens": [2, 3] * (len(losses) // 2)} if name == "base" else {}))
    with (folder / "metrics.jsonl").open("a") as out:
        out.writelines(json.dumps(line) + "\n" for line in lines)
    return folder


def pack(seed=0, merge=0.0, base=9.0, members=(0, 1, 2)):
    """Losses of rows that all share, with `merge` added to the lowest adapter's, and a little noise."""
    draw = np.random.default_rng(seed)
    rows = draw.uniform(4, 8, ROWS)
    found = {"base": rows + base}
    found |= {adapter: rows + 0.2 * i + draw.normal(0, 0.05, ROWS) for i, adapter in enumerate(members)}
    return found | {"merge": rows + merge + draw.normal(0, 0.05, ROWS)}


@pytest.mark.parametrize(
    ("merge", "said", "better"),
    [
        (-0.3, "is better than every adapter", None),
        (0.0, "cannot be told apart from the best adapter", None),
        (0.3, "is worse than the best adapter", 0),
        (0.9, "is worse than every adapter", 0),
    ],
)
def test_the_merge_is_compared_with_the_best_adapter(tmp_path, merge, said, better):
    losses = pack(merge=merge)
    (found,) = read_held_out(write(tmp_path, losses))
    tokens = np.array([2, 3] * (ROWS // 2))
    assert found.adapters == {a: pytest.approx(losses[a].sum() / tokens.sum()) for a in range(3)}
    assert (found.rows, found.best) == (ROWS, min(found.adapters, key=found.adapters.get))
    value, low, high = found.over_best
    assert low < value < high
    assert value == pytest.approx(found.merge - found.adapters[found.best])
    assert said in verdict(found)
    assert f"{found.merge:.3f}" in verdict(found)
    assert better_than_merge(tmp_path) == better


def test_a_base_that_is_better_than_all_is_said(tmp_path):
    (found,) = read_held_out(write(tmp_path, pack(base=-2)))
    assert "the base has a lower loss than all" in verdict(found)
    assert better_than_merge(tmp_path) == "base"


def test_a_few_rows_tell_nothing():
    """Of five rows that all have the same sign a sign test has p = 0.06."""
    ones = np.ones(6)
    assert paired_interval(-ones[:1], ones[:1]) == (-1, -1, 0)
    assert paired_interval(-ones[:5], ones[:5]) == (-1, -1, 0)
    assert paired_interval(ones[:5], ones[:5]) == (1, 0, 1)
    assert paired_interval(-ones, ones) == (-1, -1, -1)
    one = RowLosses(
        **dict(base_model="org/base", prompt="clean", truncated=0, dropped=0, tokens=[3], base=[9.0], merged=[1.0]),
        merged_adapters=2,
        adapters={"00": [4.0], "01": [5.0]},
        ensemble=None,
    )
    assert rows_notes(one)[0].startswith("On 1 held-out row the merge of 2 adapters cannot be told apart")
    alone = one.model_copy(update={"adapters": {"00": [4.0]}, "merged": None})
    assert rows_notes(alone)[0].startswith("On 1 held-out row the adapter cannot be told apart from the base: 1.333")


def test_a_single_adapter_is_compared_with_the_base(tmp_path):
    (found,) = read_held_out(write(tmp_path, pack(members=(3,))))
    assert verdict(found).startswith(f"On {ROWS} held-out rows the adapter lowers the loss")
    assert better_than_merge(tmp_path) is None


def test_the_interval_is_that_of_resampling_rows_one_by_one():
    draw = np.random.default_rng(1)
    differences, tokens = draw.normal(0.1, 1, 30), draw.integers(1, 9, 30).astype(float)
    slow = []
    for _ in range(10_000):
        rows = draw.integers(0, 30, 30)
        slow.append(differences[rows].sum() / tokens[rows].sum())
    value, low, high = paired_interval(differences, tokens)
    assert value == pytest.approx(differences.sum() / tokens.sum())
    width = np.quantile(slow, 0.975) - np.quantile(slow, 0.025)
    assert (low, high) == pytest.approx(tuple(np.quantile(slow, (0.025, 0.975))), abs=0.05 * width)


def test_the_interval_of_many_rows_is_that_of_the_bootstrap_and_takes_little_memory(monkeypatch):
    draw = np.random.default_rng(2)
    differences, tokens = draw.normal(0.1, 1, 1001), draw.integers(1, 9, 1001).astype(float)
    normal = paired_interval(differences, tokens)
    monkeypatch.setattr("poc_lora.reporting.held_out.MAX_RESAMPLED", 1001)
    resampled = paired_interval(differences, tokens)
    assert normal != resampled
    assert normal == pytest.approx(resampled, abs=0.05 * (resampled[2] - resampled[1]))
    monkeypatch.undo()
    rows = 2_000_000  # of which the draws would take 160 GB
    assert paired_interval(draw.normal(0, 1, rows), np.ones(rows))[1] < 0.01


def test_each_pack_has_its_own_and_the_last_validation_counts(tmp_path):
    write(tmp_path, pack(merge=0.9), step=3)
    write(tmp_path, pack(merge=-0.3), pack(members=(3, 4), seed=2), step=6)
    first, second = read_held_out(tmp_path)
    assert (list(first.adapters), list(second.adapters)) == ([0, 1, 2], [3, 4])
    assert "better than every adapter" in verdict(first)


def test_an_adapter_that_diverged_is_left_out(tmp_path):
    write(tmp_path, pack(), step=3)
    write(tmp_path, pack(members=(0, 2)), step=6)
    assert [list(found.adapters) for found in read_held_out(tmp_path)] == [[0, 2]]


@pytest.mark.parametrize("damage", ["base", "merge", 1, "rows", "tokens", "no tokens", "nan"])
def test_validations_that_are_not_whole_are_passed_over(tmp_path, damage):
    losses = pack()
    if damage == "rows":
        losses[1] = losses[1][:-1]
    elif damage == "nan":
        losses[1][3] = np.nan
    elif damage not in ("tokens", "no tokens"):
        del losses[damage]
    folder = write(tmp_path, losses, members=[0, 1, 2])
    if damage == "tokens":
        (folder / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text().replace("row_tokens", "odd"))
    if damage == "no tokens":
        (folder / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text().replace("[2, 3", "[0, 3"))
    assert read_held_out(folder) == []


def test_a_run_without_held_out_rows_has_none(tmp_path):
    assert read_held_out(tmp_path) == []
    write(tmp_path, {0: [], 1: [], "base": [], "merge": []})
    assert read_held_out(tmp_path) == []


def scored_rows(adapters=3, **changes):
    """What `poc-lora eval --rows` found, of the losses of `pack`."""
    losses = {name: list(map(float, found)) for name, found in pack(members=tuple(range(adapters))).items()}
    named = {f"{i:02d}": losses[i] for i in range(adapters)}
    made = dict(base_model="org/base", prompt="clean", truncated=0, dropped=0, tokens=[2, 3] * (ROWS // 2))
    made |= dict(base=losses["base"], adapters=named, merged=losses["merge"], ensemble=losses["merge"])
    made |= dict(merged_adapters=adapters)
    return RowLosses(**made | changes)


def test_rows_of_a_file_get_the_verdict_that_a_runs_own_rows_get(tmp_path):
    found = scored_rows()
    (own,) = read_held_out(write(tmp_path, pack()))
    assert rows_notes(found) == [verdict(own)]
    table = rows_table(found)
    assert [row[0] for row in table.rows] == [
        "base",
        "LoRA 00",
        "LoRA 01",
        "LoRA 02",
        "PoC merge",
        "prediction ensemble",
    ]
    assert table.rows[1][1:] == [f"{own.adapters[0]:.3f}", f"{np.exp(own.adapters[0]):.4g}", ""]
    assert table.rows[4][3] == "{:+.3f} ({:+.3f} to {:+.3f})".format(*own.over_best)


def test_a_merge_of_some_of_the_adapters_is_called_one():
    said = {m: rows_notes(scored_rows(merged_adapters=m))[0] for m in (None, 1, 2, 3)}
    assert "rows the merge of 2 of the 3 adapters cannot be told apart" in said[2]
    assert "rows the merge of 1 of the 3 adapters cannot be told apart" in said[1]
    assert "rows the merge of 3 adapters cannot be told apart" in said[3]
    assert "rows the merge cannot be told apart" in said[None]  # of an older file


def test_what_was_left_out_or_trained_on_is_said():
    said = " ".join(rows_notes(scored_rows(truncated=3, dropped=2, trained_on=True, exact_average=True)))
    assert "3 rows were cut off" in said
    assert "2 rows were left out" in said
    assert "was trained on" in said
    assert "exact average" in said


def test_a_model_alone_and_one_adapter_have_tables_too():
    alone = scored_rows(0, merged=None, ensemble=None)
    assert [row[:2] for row in rows_table(alone).rows] == [["base", f"{sum(alone.base) / sum(alone.tokens):.3f}"]]
    assert rows_notes(alone) == []
    one = scored_rows(1, merged=None, ensemble=None)
    assert [row[0] for row in rows_table(one).rows] == ["base", "LoRA 00"]
    assert "lowers the loss" in rows_notes(one)[0]


def test_of_many_adapters_the_best_is_listed():
    assert [row[0] for row in rows_table(scored_rows(40)).rows] == [
        "base",
        "LoRA 00",
        "PoC merge",
        "prediction ensemble",
    ]


def test_of_many_rows_the_interval_is_the_normal_one_which_is_nearly_the_bootstraps(monkeypatch):
    draw = np.random.default_rng(0)
    tokens = draw.integers(1, 60, 900).astype(float)
    differences = 0.1 * tokens + draw.normal(0, 4, 900)
    bootstrap = paired_interval(differences, tokens)
    monkeypatch.setattr(held_out, "MAX_RESAMPLED", 100)
    # A quantile of 10,000 resamples has an error of 2.7 % of their standard error; the interval is 3.9 of those wide.
    width = bootstrap[2] - bootstrap[1]
    assert paired_interval(differences, tokens) == pytest.approx(bootstrap, abs=0.03 * width)


def test_the_best_adapter_is_that_of_rows_else_of_benchmarks_else_of_the_run(tmp_path):
    run = make_run(tmp_path / "run", found=results(best="01"))
    assert best_adapter(read_run(run)) == "01"
    (run / "eval-rows").mkdir()
    scored_rows().write(run / "eval-rows" / "rows.json")
    assert best_adapter(read_run(run)) == "00"
    shutil.rmtree(run / "eval-rows")
    shutil.rmtree(run / "eval")
    assert best_adapter(read_run(run)) is None
    (run / "metrics.jsonl").unlink()
    write(run, pack())
    assert best_adapter(read_run(run)) == "00"
