"""Several runs as one study: means and intervals over runs, against plain arithmetic."""

import json
import math
import statistics
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from poc_lora.artifacts.results import Calibration, Measure, Results
from poc_lora.artifacts.row_losses import RowLosses
from poc_lora.artifacts.study import Study
from poc_lora.artifacts.variant_scores import VariantAccuracy, VariantScores
from poc_lora.errors import RequestError, RunError
from poc_lora.reporting.compare import write_comparison
from poc_lora.reporting.run_files import read_run
from poc_lora.reporting.study import make_study, require_runs, study_notes, study_tables, write_study
from poc_lora.reporting.tables import terminal_table
from tests.reporting.run_folder import make_run, merge_report, metric_lines, results, scored

T_2 = 4.302653  # the 0.975 quantile of Student's t of two degrees of freedom, from tables


def calibration(nll):
    return Calibration(nll=Measure(nll, 0.1), brier=Measure(0.2, 0.1), ece=Measure(0.1, 0.1))


def held_out_lines(losses):
    """The last validation of two rows of 4 and 6 answer tokens, of losses per token."""
    members = [0, 1, 2]
    lines = [
        {"step": 40, "adapter": name, "members": members, "row_losses": [4 * loss, 6 * loss]}
        for name, loss in losses.items()
    ]
    lines[0]["row_tokens"] = [4, 6]
    return metric_lines(validation=False) + lines


def study_runs(tmp_path, merged=(0.70, 0.72, 0.77), best=(0.68, 0.71, 0.75), **config):
    runs = []
    for seed, (m, b) in enumerate(zip(merged, best, strict=True)):
        nll = {"base": 1.5, "best": 0.6 + seed / 10, "merged": 0.5 + seed / 20, "ensemble": 0.4}
        adapters = {"00": scored(0.6), "01": scored(b), "02": scored(0.61)}
        found = results().model_copy(
            update={
                "merged": scored(m),
                "adapters": adapters,
                "best": "01",
                "calibration": {name: calibration(value) for name, value in nll.items()},
                "calibration_of_adapters": {f"0{i}": calibration(0.7 + i / 10) for i in range(3)},
            }
        )
        found = Results.model_validate(found.model_dump())  # fields that were never set are not written
        lines = held_out_lines({"base": 2.0, "merge": 1.0 + seed / 100, 0: 1.2, 1: 1.1 + seed / 50, 2: 1.3})
        runs.append(make_run(tmp_path / f"seed{seed}", seed=seed, found=found, metrics=lines, **config))
    return runs


def test_each_figure_is_its_mean_and_its_interval_over_runs(tmp_path):
    study = make_study(list(map(read_run, study_runs(tmp_path))))
    accuracies = [scored(value).average.value for value in (0.70, 0.72, 0.77)]
    found = study.measures["accuracy"]["merged"]
    assert found.values == pytest.approx(accuracies)
    assert found.mean == pytest.approx(statistics.mean(accuracies))
    assert found.half_width == pytest.approx(T_2 * statistics.stdev(accuracies) / math.sqrt(3), rel=1e-6)
    assert study.measures["nll"]["best"].values == pytest.approx([0.6, 0.7, 0.8])
    assert study.measures["nll"]["average"].values == pytest.approx([0.8] * 3)
    assert study.measures["held_out_loss"]["merged"].values == pytest.approx([1.0, 1.01, 1.02])
    assert study.measures["held_out_loss"]["best"].values == pytest.approx([1.1, 1.12, 1.14])
    assert "ensemble" not in study.measures["held_out_loss"]  # validation has none
    assert "rows_loss" not in study.measures


def test_differences_are_taken_within_each_run(tmp_path):
    study = make_study(list(map(read_run, study_runs(tmp_path))))
    found = study.differences["accuracy"]["merged - best"]
    assert found.values == pytest.approx([0.02, 0.01, 0.02])
    assert found.half_width == pytest.approx(T_2 * statistics.stdev([0.02, 0.01, 0.02]) / math.sqrt(3), rel=1e-6)
    apart = [study.measures["accuracy"][name].half_width for name in ("merged", "best")]
    assert found.half_width < min(apart) / 5  # runs that are good are good in both
    assert study.differences["nll"]["ensemble - merged"].values == pytest.approx([-0.1, -0.15, -0.2])


def test_the_tables_fit_80_columns_and_say_what_the_intervals_are(tmp_path):
    runs = study_runs(tmp_path)
    study = make_study(list(map(read_run, runs)))
    console = Console(width=80, file=StringIO())
    for table in study_tables(study):
        console.print(terminal_table(table))
    shown = console.file.getvalue()
    assert "PoC merge − LoRA (best)" in shown
    assert "…" not in shown
    assert "76.50 ± 8.96" in shown  # 0.7, 0.72, 0.77, and 0.035 above them
    assert "+1.67 ± 1.43" in shown
    write_study(study, tmp_path)
    assert Study.read(tmp_path / "study.json") == study
    written = (tmp_path / "study.md").read_text()
    assert "| PoC merge | 76.50 ± 8.96 | 0.550 ± 0.124 | 1.010 ± 0.025 |" in written
    assert "over the 3 training runs" in written
    assert "with the questions fixed" in written


def test_two_runs_are_said_to_be_few_and_other_settings_to_differ(tmp_path):
    one, two = study_runs(tmp_path)[:2]
    said = " ".join(study_notes(make_study([read_run(one), read_run(two)])))
    assert "Two runs say little: their interval is 12.7 standard errors" in said
    other = make_run(tmp_path / "other", seed=5, lora={"rank": 8}, found=results())
    said = " ".join(study_notes(make_study([read_run(one), read_run(other)])))
    assert "the runs differ in lora.rank" in said


def test_what_is_no_study_is_refused(tmp_path):
    one, two, _ = study_runs(tmp_path)
    with pytest.raises(RequestError, match="one run is no study"):
        require_runs([one])
    with pytest.raises(RequestError, match="named twice"):
        require_runs([one, tmp_path / "seed1" / ".." / "seed0"])
    with pytest.raises(RequestError, match="no such folder"):
        require_runs([one, tmp_path / "none"])
    with pytest.raises(RequestError, match="this is none"):
        require_runs([one, two / "eval"])
    copy = make_run(tmp_path / "copy", seed=0)
    with pytest.raises(RunError, match=r"the same seed \(0\)"):
        make_study([read_run(one), read_run(copy)])
    other = make_run(tmp_path / "rank", seed=0, lora={"rank": 8})
    with pytest.raises(RunError, match=r"the same seed \(0\)"):  # although a third run has other settings
        make_study([read_run(one), read_run(other), read_run(copy)])
    with pytest.raises(RunError, match=r"evaluated with other limit than .*seed0"):
        make_study([read_run(one), read_run(make_run(tmp_path / "few", seed=7, found=results(limit=5)))])


def test_questions_of_another_text_and_settings_of_the_scores_are_no_study(tmp_path):
    one, two = (make_run(tmp_path / f"{i}", seed=i, found=results(questions_sha256="ab")) for i in range(2))
    for run, dtype in ((one, "float32"), (two, "bfloat16")):
        settings = {"base": f"of {run}", "dtype": dtype, "adapters": []}
        scores = VariantScores(
            base_model="b",
            protocol="label",
            prompt="clean",
            benchmarks={},
            average=VariantAccuracy(accuracy=0.5, error=0.1),
            settings=settings,
        )
        scores.write(run / "eval" / "base.json")
    other = make_run(tmp_path / "other", seed=2, found=results(questions_sha256="cd"))
    for refuse in (lambda runs: make_study(list(map(read_run, runs))), write_comparison):
        with pytest.raises(RunError, match="evaluated with other dtype than"):
            refuse([one, two])
        with pytest.raises(RunError, match="other dtype, questions than"):
            refuse([one, other])
    (one / "eval" / "base.json").unlink()
    (two / "eval" / "base.json").unlink()
    assert make_study([read_run(one), read_run(two)]).runs == [str(one), str(two)]


def test_losses_on_other_rows_or_rows_trained_on_are_told(tmp_path):
    def scored_rows(**changes):
        given = dict(base_model="b", prompt="clean", truncated=0, dropped=0, tokens=[2], base=[2.0], merged=[1.0])
        return RowLosses(**given | {"adapters": {"00": [1.5], "01": [1.4]}, "ensemble": None, "asked": "ab"} | changes)

    runs = [replace(read_run(run), evaluations=()) for run in study_runs(tmp_path)]
    with pytest.raises(RunError, match="evaluated with other rows, dtype or settings than"):
        make_study([replace(run, rows=scored_rows(asked=str(i))) for i, run in enumerate(runs)])
    study = make_study([replace(run, rows=scored_rows(trained_on=i == 1)) for i, run in enumerate(runs)])
    assert "A file of these rows was trained on" in " ".join(study_notes(study))


def test_runs_on_other_rows_are_told_to_differ_and_are_no_draws_of_one_law(tmp_path):
    one, two, three = study_runs(tmp_path)
    info = json.loads((two / "run.json").read_text()) | {"data_sha256": {"train.json": "cd" * 32}}
    (two / "run.json").write_text(json.dumps(info))
    assert make_study([read_run(one), read_run(two)]).differ_in == ["the training rows"]
    assert make_study([read_run(one), read_run(three)]).differ_in == []
    write_comparison([one, two, three])
    written = (one / "comparison.md").read_text()
    assert "the runs differ in the training rows" in written
    assert "| 0.001 | 2 |" in written  # one and three
    moved = {"data_sha256": {"elsewhere/train.json": "ab" * 32}}
    (two / "run.json").write_text(json.dumps(info | moved))
    assert make_study([read_run(one), read_run(two)]).differ_in == []


def test_an_average_is_the_same_merge_written_or_not(tmp_path):
    one = make_run(tmp_path / "one", seed=0, found=results())
    two = make_run(tmp_path / "two", seed=1, found=results(exact_average=True))
    assert make_study([read_run(one), read_run(two)]).differ_in == []
    soup = make_run(tmp_path / "soup", seed=2, merge=merge_report(method="soup"), found=results())
    assert make_study([read_run(two), read_run(soup)]).differ_in == ["the merge's method"]


def test_a_comparison_has_intervals_over_the_runs_of_each_temperature(tmp_path):
    three = study_runs(tmp_path)
    alone = make_run(tmp_path / "alone", temperature=0.0, seed=9)
    write_comparison([*three, alone])
    written = (three[0] / "comparison.md").read_text()
    assert "over runs (Student's t), questions fixed" in written
    assert "| 0.001 | 3 |" in written
    assert "| 76.50 ± 8.96 |" in written
    assert "| +1.67 ± 1.43 |" in written
    write_comparison([three[0], alone])
    assert "Student's t" not in (three[0] / "comparison.md").read_text()
