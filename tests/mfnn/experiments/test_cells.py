"""Cells stay done: a second call computes what is missing, and other settings are refused."""

import json
import math

import pytest

from poc_lora.errors import Interrupted, RunError
from poc_lora.mfnn.experiments.cells import Folder
from poc_lora.mfnn.experiments.settings import load

SETTINGS = load("table2", quick=True)


@pytest.fixture
def calls():
    return []


def cells(calls, stop_at=None):
    def cell(name):
        def compute():
            if name == stop_at:
                raise KeyboardInterrupt
            calls.append(name)
            return {"value": name}

        return compute

    return {name: cell(name) for name in "abc"}


def test_finished_cells_are_not_computed_again(tmp_path, calls):
    folder = Folder(tmp_path / "x", "table2", SETTINGS, hidden=True)
    first = folder.compute(cells(calls))
    again = Folder(tmp_path / "x", "table2", SETTINGS, hidden=True).compute(cells(calls))
    assert first == again == {name: {"value": name} for name in "abc"}
    assert calls == ["a", "b", "c"]


def test_what_cannot_be_told_is_null_in_the_file_and_nan_again(tmp_path):
    folder = Folder(tmp_path, "table2", SETTINGS, hidden=True)
    cell = {"a": lambda: {"rows": [{"error": math.nan, "mean": 1.5, "name": "x", "n": 3}]}}
    for _ in range(2):
        (row,) = folder.compute(cell)["a"]["rows"]
        assert math.isnan(row.pop("error"))
        assert row == {"mean": 1.5, "name": "x", "n": 3}
    assert json.loads((tmp_path / "cells" / "a.json").read_text())["rows"][0]["error"] is None


def test_ctrl_c_keeps_finished_cells_and_a_second_call_goes_on(tmp_path, calls):
    with pytest.raises(Interrupted, match="1 of 3 cells done") as stopped:
        Folder(tmp_path, "table2", SETTINGS, hidden=True).compute(cells(calls, stop_at="b"))
    assert stopped.value.exit_status == 130
    assert "the same command" in stopped.value.fix
    Folder(tmp_path, "table2", SETTINGS, hidden=True).compute(cells(calls))
    assert calls == ["a", "b", "c"]


def test_other_settings_are_refused_by_name(tmp_path):
    Folder(tmp_path, "table2", SETTINGS)
    with pytest.raises(RunError, match=r"other settings: multi_index\.lr") as refused:
        Folder(tmp_path, "table2", load("table2", quick=True, overrides=["multi_index.lr=0.05"]))
    assert refused.value.exit_status == 2
    with pytest.raises(RunError, match="experiment, "):
        Folder(tmp_path, "figure2", load("figure2", quick=True))


def test_another_version_is_refused(tmp_path):
    Folder(tmp_path, "table2", SETTINGS)
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": "0.0.1"}))
    with pytest.raises(RunError, match="version"):
        Folder(tmp_path, "table2", SETTINGS)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match="not empty"):
        Folder(tmp_path, "table2", SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
