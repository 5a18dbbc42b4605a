"""`poc-lora mfnn`: what a user sees, and what they are told when they ask for what cannot be."""

import re
import signal
import sys

import pytest

from poc_lora.cli import app as cli
from poc_lora.mfnn.experiments import cells as module

SMALL = ["temperatures=[1e-2]", "widths=[5, 300]", "multi_index.samples=50", "multi_index.epochs=1", "members=2"]
SMALL += ["seeds=1"]


@pytest.fixture
def mfnn(monkeypatch, capsys, tmp_path):
    """Run a verb in this process, in an empty current folder; returns exit status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["poc-lora", "mfnn", *map(str, arguments)])
        try:
            cli.main()
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.mark.parametrize("name", ["figure1", "figure2", "table2", "sweep", "pruning", "poc"])
def test_every_verb_has_help_with_an_example(mfnn, name):
    status, out, _ = mfnn(name, "--help")
    assert status == 0
    assert f"Example: poc-lora mfnn {name}" in " ".join(out.split())


def test_a_verb_says_where_the_result_lies_and_what_to_run_next(mfnn, tmp_path):
    status, out, err = mfnn("table2", "--quick", "--out", "here", *SMALL)
    assert status == 0, err
    table, said = out.split("\n\n\n")
    assert re.fullmatch(r"\| λ \| N = 5 \| N = 300 \|\n.*\n\| 0.01 \| [\d.]+ \| [\d.]+; 1.233; [\d.]+ \|", table)
    assert said == "the figure: here/table2.png (also .svg; numbers in table2.csv)\nnext: poc-lora mfnn table2\n"
    assert "2/2" in err
    files = {path.name for path in (tmp_path / "here").iterdir()}
    assert files == {"settings.json", "cells", "table2.csv", "table2.md", "table2.png", "table2.svg"}


def test_the_long_figure_2_has_a_file_of_its_own(mfnn, tmp_path):
    few = ["sines.epochs=2", "widths=[5]", "networks=1", "temperatures=[1e-2]", "initial_stds=[1.0]"]
    status, out, err = mfnn("figure2", "--long", "--quick", *few)
    assert status == 0, err
    assert "runs/mfnn/figure2_long-quick/figure2_long.png" in out
    assert (tmp_path / "runs/mfnn/figure2_long-quick/figure2_long.csv").is_file()


def test_without_out_it_goes_to_runs(mfnn, tmp_path):
    assert mfnn("table2", "--quick", *SMALL)[0] == 0
    assert (tmp_path / "runs/mfnn/table2-quick/table2.png").is_file()


def test_other_settings_in_the_same_folder_are_refused(mfnn):
    assert mfnn("table2", "--quick", "--out", "here", *SMALL)[0] == 0
    status, _, err = mfnn("table2", "--quick", "--out", "here", *SMALL, "seed=1")
    assert status == 2
    assert err.startswith("poc-lora: the folder holds an experiment with other settings: seed\n")
    assert "fix:   give another folder with --out" in err


def test_a_bad_setting_is_refused_before_anything_is_made(mfnn, tmp_path):
    status, _, err = mfnn("table2", "--quick", "--out", "here", "multi_index.lr=fast")
    assert status == 2
    assert "multi_index.lr" in err
    assert "Traceback" not in err
    assert not (tmp_path / "here").exists()


def test_ctrl_c_keeps_cells_and_the_same_command_goes_on(mfnn, monkeypatch, tmp_path):
    arguments = ["table2", "--quick", "--out", "here", *SMALL, "seeds=2"]
    cells, write = tmp_path / "here" / "cells", module.write_json

    def write_and_stop(path, found):
        write(path, found)
        if len(list(cells.glob("*.json"))) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(module, "write_json", write_and_stop)
    status, _, err = mfnn(*arguments)
    assert status == 130
    assert "stopped with 2 of 4 cells done" in err
    assert "Traceback" not in err
    done = {path: path.stat().st_mtime_ns for path in cells.glob("*.json")}
    assert len(done) == 2
    monkeypatch.setattr(module, "write_json", write)
    assert mfnn(*arguments)[0] == 0
    assert len(list(cells.glob("*.json"))) == 4
    assert all(path.stat().st_mtime_ns == when for path, when in done.items())
