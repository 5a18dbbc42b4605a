"""The sweep of a run: what its table, figure and sentence say of values whose adapters' losses are known."""

import pytest

from poc_lora.artifacts.run_folder import RunFolder
from poc_lora.config import load_config
from poc_lora.evaluation.intervals import welch_interval
from poc_lora.reporting.page import write_page
from poc_lora.reporting.sweep import sweep_outcome, varied_keys
from tests.reporting.html import Page
from tests.reporting.run_folder import make_run

TOKENS = [5, 3, 2]


def validation(losses, members=None):
    """The lines of a pack's last validation, in which every row has the given loss per token."""
    members = sorted(losses) if members is None else members
    named = {"base": 4.0, **{m: losses[m] for m in members}, "merge": 0.5}
    return [
        {"step": 40, "adapter": name, "validation_loss": loss, "members": members}
        | {"row_losses": [loss * n for n in TOKENS]}
        | ({"row_tokens": TOKENS} if name == "base" else {})
        for name, loss in named.items()
    ]


def swept(tmp_path, vary, losses, lines=None):
    lines = lines or validation(dict(enumerate(losses)))
    return make_run(tmp_path / "run", adapters={"count": len(losses), "vary": vary}, metrics=lines)


def test_a_table_has_every_value_with_its_adapters_and_the_merge(tmp_path):
    run = swept(tmp_path, {"optim.lr": [3e-4, 1e-4]}, [1.0, 2.0, 1.5, 2.5])
    page = Page(write_page(run).read_text(encoding="utf-8"))
    (table,) = [rows for name, rows in page.tables.items() if name.startswith("The adapters by their values")]
    assert table == [
        ["optim.lr", "adapters", "held-out loss", "accuracy (%)"],
        ["0.0001", "1, 3", "2.25 (2 to 2.5)", "73.8"],  # of adapters 00 to 02 the folder has accuracies
        ["0.0003", "0, 2", "1.25 (1 to 1.5)", "73.8 (73.5 to 74.1)"],
        ["PoC merge", "", "0.5", "78.67"],
    ]
    assert "Means: 0.0001: 2.25; 0.0003: 1.25; the merge: 0.5." in page.text
    assert sweep_outcome(run)[0] in page.text


def test_a_run_of_one_setting_has_no_sweep(tmp_path):
    for name, vary in {"a": {}, "b": {"optim.lr": [1e-4, 1e-4, 1e-4]}}.items():
        run = make_run(
            tmp_path / name, adapters={"count": 3, "vary": vary}, metrics=validation({0: 1.0, 1: 2.0, 2: 3.0})
        )
        assert sweep_outcome(run) == []
        assert "The adapters by their values" not in write_page(run).read_text()


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        # differences within 0.01, between values 1: no interval of that spread holds zero
        (
            [1.0, 3.0, 2.0, 1.01, 3.01, 2.01],
            "mean loss 1.005 of 2 adapters. By the spread between adapters of the same",
        ),
        ([1.0, 3.0, 2.0, 1.01, 3.01, 2.01], "(95 %), it is better than every other."),
        # those of the first and the third value overlap
        ([1.0, 3.0, 1.2, 1.4, 3.01, 1.1], "is optim.lr 0.0004: mean loss 1.150"),
        ([1.0, 3.0, 1.2, 1.4, 3.01, 1.1], "it cannot be told apart from optim.lr 0.0001."),
    ],
)
def test_the_best_value_is_named_with_those_it_cannot_be_told_apart_from(tmp_path, losses, said):
    run = swept(tmp_path, {"optim.lr": [1e-4, 2e-4, 4e-4]}, losses)
    assert said in sweep_outcome(run)[0]
    apart = welch_interval([losses[0], losses[3]], [losses[2], losses[5]])
    assert (abs(apart.mean) > apart.half_width) == ("better than every" in sweep_outcome(run)[0])


def test_a_value_at_the_end_of_those_tried_is_said_to_be(tmp_path):
    three = {"optim.lr": [1e-4, 2e-4, 4e-4]}
    assert sweep_outcome(swept(tmp_path / "a", three, [1.0, 2.0, 3.0]))[0].endswith(
        "smallest that was tried: try smaller ones."
    )
    assert sweep_outcome(swept(tmp_path / "b", three, [3.0, 2.0, 1.0]))[0].endswith(
        "largest that was tried: try larger ones."
    )
    assert "that was tried" not in sweep_outcome(swept(tmp_path / "c", three, [3.0, 1.0, 2.0]))[0]
    none = {"optim.temperature": [0.0, 1e-5, 1e-4]}
    assert "that was tried" not in sweep_outcome(swept(tmp_path / "d", none, [1.0, 2.0, 3.0]))[0]  # below 0 is nothing


def test_single_adapters_say_nothing_of_chance(tmp_path):
    (said,) = sweep_outcome(swept(tmp_path, {"optim.lr": [1e-4, 2e-4]}, [1.0, 2.0]))
    assert said.startswith("On 3 held-out rows the best is optim.lr 0.0001: loss 1.000 of one adapter.")
    assert "it is not known how much of a difference is chance" in said


def test_a_value_of_two_adapters_is_not_said_to_have_one(tmp_path):
    run = swept(tmp_path, {"optim.lr": [1e-4, 2e-4]}, [0.0] * 4, validation({0: 1.0, 1: 2.0, 2: 1.1}))  # 3 diverged
    (said,) = sweep_outcome(run)
    assert said.endswith(
        "mean loss 1.050 of 2 adapters. Every other value has a single adapter with a loss, so it is not known how much"
        " of a difference is chance."
    )
    run = swept(tmp_path / "other", {"optim.lr": [1e-4, 2e-4]}, [0.0] * 4, validation({0: 3.0, 1: 2.0, 2: 3.1}))
    assert "of one adapter. It has a single adapter with a loss, so" in sweep_outcome(run)[0]


def test_two_keys_are_settings_together_and_a_figure_each(tmp_path):
    vary = {"optim.lr": [1e-4, 1e-4, 2e-4, 2e-4], "lora.alpha": [8.0, 16.0]}
    run = swept(tmp_path, vary, [4.0, 1.0, 3.0, 2.0])
    assert "the best is optim.lr 0.0001 with lora.alpha 16: loss 1.000" in sweep_outcome(run)[0]
    page = Page(write_page(run).read_text(encoding="utf-8"))
    assert "Held-out loss by optim.lr" in page.text
    assert "Held-out loss by lora.alpha" in page.text
    (table,) = [rows for name, rows in page.tables.items() if name.startswith("The adapters by their values")]
    assert [row[:3] for row in table[1:-1]] == [
        ["0.0001", "8", "0"],
        ["0.0001", "16", "1"],
        ["0.0002", "8", "2"],
        ["0.0002", "16", "3"],
    ]


def test_adapters_of_several_packs_and_diverged_ones(tmp_path):
    losses = {0: 1.0, 1: 2.0, 2: 1.1, 3: 2.1}
    lines = [*validation(losses, [0, 1]), *validation(losses, [2])]  # adapter 3 diverged
    run = swept(tmp_path, {"optim.lr": [1e-4, 2e-4]}, [0.0] * 4, lines)
    page = Page(write_page(run).read_text(encoding="utf-8"))
    (table,) = [rows for name, rows in page.tables.items() if name.startswith("The adapters by their values")]
    assert [row[2] for row in table[1:]] == ["1.05 (1 to 1.1)", "2", ""]  # no merge is of all packs
    run = swept(tmp_path / "gone", {"optim.lr": [1e-4, 2e-4]}, [0.0] * 2, validation(losses, [0]))
    page = Page(write_page(run).read_text(encoding="utf-8"))
    (table,) = [rows for name, rows in page.tables.items() if name.startswith("The adapters by their values")]
    assert table[2][2] == "not known"
    assert sweep_outcome(run) == ["On 3 held-out rows the best is optim.lr 0.0001: loss 1.000 of one adapter."]


def test_a_run_without_held_out_rows_has_its_accuracies(tmp_path):
    lines = [{"step": 1, "adapter": 0, "loss": 1.0}]
    run = swept(tmp_path, {"optim.lr": [1e-4, 2e-4, 3e-4]}, [0.0] * 3, lines)
    text = Page(write_page(run).read_text(encoding="utf-8")).text
    assert "No losses on held-out rows are known" in text
    assert "Accuracy (%) by optim.lr" in text
    assert sweep_outcome(run) == []


def test_keys_that_vary_are_those_of_more_than_one_value(tmp_path):
    run = swept(tmp_path, {"optim.lr": [1e-4, 1e-4], "lora.alpha": [8.0, 16.0]}, [1.0, 2.0])
    assert varied_keys(load_config(RunFolder(run).config)) == ["lora.alpha"]
    assert varied_keys(None) == []
