"""The layout of the table, and what stands under it."""

import io
import re

import pytest
from rich.console import Console

from poc_lora.artifacts.results import Calibration, Difference, Estimate, Measure, Results, Scored
from poc_lora.reporting.results_tables import (
    accuracy_table,
    calibration_table,
    notes,
    paired_table,
    power_note,
    results_markdown,
    results_summary,
    table_rows,
    write_report,
)
from tests.reporting.run_folder import truncated

FOLDERS = "social_i_qa piqa winogrande openbookqa ARC-Challenge ARC-Easy boolq hellaswag".split()


def scored(value, error=0.0089):
    return Scored(benchmarks={b: Estimate(value, error) for b in FOLDERS}, average=Estimate(value, error))


@pytest.fixture
def results():
    return Results(
        base_model="org/base",
        prompt="clean",
        limit=None,
        questions=dict.fromkeys(FOLDERS, 100),
        too_long=dict.fromkeys(FOLDERS, 0) | {"boolq": 7},
        chance=dict.fromkeys(FOLDERS, 0.25),
        base=scored(0.3),
        adapters={"00": scored(0.70), "01": scored(0.72)},
        best="01",
        average=scored(0.71),
        merged=scored(0.8117),
        ensemble=scored(0.80),
        comparisons={
            "best": Difference(value=0.0917, low=0.05, high=0.13, p=0.0002),
            "average": Difference(value=0.1017, low=0.06, high=0.14, p=0.0002),
        },
        agreement=0.975,
    )


def printed(results, width=80):
    out = io.StringIO()
    Console(file=out, width=width).print(results_summary(results)[0])
    return out.getvalue()


def test_markdown_has_the_papers_rows_and_columns(results):
    lines = results_markdown(results).splitlines()
    assert "|  | SIQA | PIQA | WinoGrande | OBQA | ARC-c | ARC-e | BoolQ | HellaSwag | average |" in lines
    first = [line.split(" | ")[0].strip("| ") for line in lines if line.startswith("| ")]
    assert first[2:9] == [
        "questions",
        "chance level",
        "base",
        "LoRA (best)",
        "LoRA (average)",
        "PoC merge",
        "prediction ensemble",
    ]
    assert any(line.startswith("| PoC merge | **81.17 ± 0.89** |") for line in lines)
    assert all(line.count(" | ") == 9 for line in lines if line.startswith("| ") and "---" not in line)


def test_the_terminal_table_fits_80_columns_uncut(results):
    text = printed(results)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for word in ("SIQA", "ARC-c", "BoolQ", "81.17", "±0.89", "PoC merge", "chance level"):
        assert word in text


def test_the_merge_at_smaller_ranks_fits_80_columns_and_is_in_the_markdown(results):
    small = results.model_copy(
        update=dict(truncated=[truncated(16, -0.0025, -0.0099, 0.004)], merged_rank=1024, merged_bytes=10**10)
    )
    out = io.StringIO()
    Console(file=out, width=80).print(*results_summary(small)[:2])
    assert max(map(len, out.getvalue().splitlines())) <= 80
    assert "…" not in out.getvalue()
    assert "-0.25 (-0.99 to +0.40)" in out.getvalue()
    said = results_markdown(small)
    assert "## The merge at smaller ranks" in said
    assert "Serve the merge at rank 16" in said
    assert "## The merge at smaller ranks" not in results_markdown(results)


def test_notes_say_what_was_chosen_how_and_what_does_not_fit(results):
    said = "\n".join(notes(results))
    assert "adapter 01 of 2, chosen by its average on the test questions themselves" in said
    assert "PoC merge minus LoRA (best): +9.17 points on average (95 % interval +5.00 to +13.00, p ≤ 0.0002" in said
    assert "97.50 % of questions" in said
    assert "BoolQ: 7 of 100 questions do not fit" in said
    assert "first" not in said
    assert "Only the first 9 questions" in "\n".join(notes(results.model_copy(update=dict(limit=9))))


def test_bold_is_the_best_of_a_column_and_what_cannot_be_told_from_it(results):
    def bold(**changes):
        cells = accuracy_table(results.model_copy(update=changes)).bold
        return {name for name, title in cells if title == "average"}

    # the error of a difference is 0.0089 · sqrt(2), so 1.96 of it are 0.0247
    assert bold() == {"PoC merge", "prediction ensemble"}
    assert bold(ensemble=scored(0.7869)) == {"PoC merge"}
    assert bold(ensemble=scored(0.7871)) == {"PoC merge", "prediction ensemble"}
    assert bold(ensemble=scored(0.9)) == {"prediction ensemble"}
    assert any("too close to tell apart" in note for note in notes(results))


def test_of_calibration_the_smallest_is_bold(results):
    def found(value):
        return Calibration(nll=Measure(value, 0.01), brier=Measure(0.2, 0.01), ece=Measure(value, 0.01))

    table = calibration_table(results.model_copy(update={"calibration": {"base": found(0.5), "merged": found(0.3)}}))
    assert table.bold == {
        ("PoC merge", "log loss"),
        ("PoC merge", "expected calibration error"),
        ("base", "Brier score"),
        ("PoC merge", "Brier score"),
    }


def test_one_adapter_without_a_merge_stands_for_itself(results):
    single = results.model_copy(
        update=dict(adapters={"a": scored(0.7)}, best="a", merged=None, ensemble=None, comparisons={}, agreement=None)
    )
    assert [name for name, *_ in table_rows(single)] == ["base", "LoRA a"]
    assert "chosen" not in "\n".join(notes(single))
    assert "Every adapter" not in results_markdown(single)


def test_an_error_that_cannot_be_told_is_left_out(results):
    assert "**30.00** |" in results_markdown(results.model_copy(update=dict(base=scored(0.3, float("nan")))))
    assert "nan" not in printed(results.model_copy(update=dict(base=scored(0.3, float("nan")))))


def test_text_of_files_is_not_markup(results):
    attack = "x`<img src=x>|\n\n# Hello [a](b) $1 *b* ~~c~~"
    adapters = {attack: scored(0.7), "01": scored(0.72)}
    hostile = results.model_copy(
        update=dict(
            base_model=attack, prompt=attack, protocol=attack, adapters=adapters, best=attack, unread={attack: 0.5}
        )
    )
    for changed in (hostile, hostile.model_copy(update=dict(adapters={attack: scored(0.7)}))):
        text = results_markdown(changed.model_copy(update=dict(control=scored(0.5), control_name=attack)))
        assert not re.search(r"(?<!\\)(<img|\[a\]|\*b|~~|`<)|^# Hello", text, flags=re.MULTILINE)
        rows = [line for line in text.splitlines() if line.startswith("|")]
        assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {11}


def test_the_report_lies_in_the_runs_eval_folder(results, tmp_path):
    assert write_report(tmp_path / "out", results) == tmp_path / "out" / "results.md"
    (tmp_path / "config.yaml").touch()
    assert write_report(tmp_path, results) == tmp_path / "eval" / "results.md"
    assert (tmp_path / "eval" / "results.md").read_text() == results_markdown(results)


@pytest.mark.parametrize(("p", "said"), [(2 / 10_001, "≤ 0.0002"), (4 / 10_001, "0.0004"), (0.14, "0.14")])
def test_no_p_value_is_below_the_resolution_of_the_bootstrap(results, p, said):
    made = results.model_copy(update={"comparisons": {"best": Difference(value=0.05, low=0.02, high=0.07, p=p)}})
    assert paired_table(made).rows[0][3] == said
    assert any(f"p {said}" in note or f"p = {said}" in note for note in notes(made))


def test_before_scoring_it_is_said_what_the_questions_can_show():
    assert power_note({"quiz": 1}) == "1 question: too few to show any difference."
    assert power_note({"quiz": 60}).startswith("60 questions: a difference of 16.2 points or more would show")


def test_choices_of_ones_own_benchmark_have_a_second_column(results):
    half = Scored(
        benchmarks={"quiz": Estimate(0.5, 0.1)}, average=Estimate(0.5, 0.1), per_byte={"quiz": Estimate(0.4, 0.1)}
    )
    together = half.model_copy(update={"per_byte": {}})
    rows = dict.fromkeys(["base", "average", "merged"], half) | {"ensemble": together}
    made = results.model_copy(
        update=rows
        | {"questions": {"quiz": 40}, "too_long": {"quiz": 0}, "chance": {"quiz": 0.25}}
        | {"adapters": dict.fromkeys(["00", "01"], half), "subsets": None, "control": None}
    )
    table = accuracy_table(made)
    assert table.columns == ["", "quiz", "quiz per byte", "average"]
    assert table.rows[-1] == ["prediction ensemble", Estimate(0.5, 0.1), "", Estimate(0.5, 0.1)]
    assert {len(row) for row in table.rows} == {4}
    assert any("per byte" in note for note in notes(made))
