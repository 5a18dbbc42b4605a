"""Tables of what base, best adapter and merge write in place of answers."""

import pytest

from poc_lora.artifacts.row_losses import RowTexts
from poc_lora.reporting.row_texts import match_notes, match_table, texts_table


@pytest.fixture
def found():
    n = 12
    return RowTexts(
        match=r"#### (\d+)",
        prompts=["x" * 400, *(f"Sum {i}?" for i in range(1, n))],
        answers=[f"#### {i}" for i in range(n)],
        best="03",
        variants={
            "base": ["\x1b[2J", None, *["no"] * (n - 2)],
            "best": ["#### 0"] * n,
            "merged": [f"#### {i}" for i in range(n)],
        },
        right={"base": [False] * n, "best": [True, *[False] * (n - 1)], "merged": [True] * n},
    )


def test_exact_matches_have_their_errors_and_a_paired_difference(found):
    table = match_table(found)
    assert [row[0] for row in table.rows] == ["base", "LoRA 03", "PoC merge"]
    assert [row[1].value for row in table.rows] == [0, pytest.approx(1 / 12), 1]
    assert table.rows[1][1].error == pytest.approx((1 / 12 * 11 / 12 / 11) ** 0.5)
    difference, room = match_notes(found)
    assert "minus that of LoRA 03: +91.67 points (95 % interval +75.00 to +100.00" in difference
    assert "1 prompts leave no room" in room


def test_the_first_texts_stand_side_by_side_and_are_shown_safely(found):
    table = texts_table(found)
    assert table.columns == ["end of the prompt", "its answer", "base", "LoRA 03", "PoC merge"]
    assert len(table.rows) == 5
    assert table.rows[0][0].startswith("…xxx")
    assert "\x1b" not in table.rows[0][2]
    assert table.rows[1][2] == ""
    assert table.rows[3][1:] == ["#### 3", "no", "#### 0", "#### 3"]


def test_a_model_alone_has_no_difference(found):
    alone = RowTexts(
        match=None,
        prompts=["?"],
        answers=["!"],
        best="",
        variants={"base": ["!"]},
        right={"base": [True]},
    )
    assert match_notes(alone) == []
    assert match_table(alone).rows[0][1].value == 1
