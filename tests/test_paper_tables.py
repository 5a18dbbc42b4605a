"""The paper's rows beside a run's: which they are, what is picked, and which adapters have collapsed."""

import importlib.util
import sys
from pathlib import Path

import pytest

from poc_lora.artifacts.results import Estimate
from poc_lora.errors import RequestError
from poc_lora.reporting.tables import markdown_table
from tests.reporting.run_folder import make_run, results, scored

PATH = Path(__file__).parents[1] / "scripts" / "paper_tables.py"
spec = importlib.util.spec_from_file_location("paper_tables", PATH)
paper_tables = importlib.util.module_from_spec(spec)
sys.modules["paper_tables"] = paper_tables  # where dataclass looks its module up
spec.loader.exec_module(paper_tables)


def run(tmp_path, name="run", averages=(0.70, 0.73, 0.71), **options):
    names = [f"{i:02d}" for i in range(len(averages))]
    adapters = {n: scored(a - 0.035) for n, a in zip(names, averages, strict=True)}
    found = results(names).model_copy(update={"adapters": adapters, "best": "00"})
    return paper_tables.read(make_run(tmp_path / name, found=found, **options))


def test_the_papers_numbers_are_those_of_its_tables():
    for base in ("Llama-2-7B", "Llama-3-8B"):
        for values in paper_tables.PAPER["table1"][base].values():
            assert sum(values[:8]) / 8 == pytest.approx(values[8], abs=0.006)  # rounded to two decimals
        assert set(paper_tables.PAPER["table3"][base]) == {"0", "1e-5", "1e-4"}
    assert paper_tables.PAPER["table1"]["Llama-3-8B"]["PoC merge"][-1] == 87.30


@pytest.mark.parametrize(
    ("base", "shown"),
    [
        ("meta-llama/Llama-2-7b-hf", ["Llama-2-7B"]),
        ("meta-llama/Meta-Llama-3-8B", ["Llama-3-8B"]),
        ("some/where/llama3-8b", ["Llama-3-8B"]),
        ("meta-llama/Llama-3.1-8B", ["Llama-2-7B", "Llama-3-8B"]),
        ("org/base", ["Llama-2-7B", "Llama-3-8B"]),
    ],
)
def test_the_rows_are_those_of_the_runs_base_or_of_both(base, shown):
    assert paper_tables.paper_bases(base) == shown


def test_table_1_has_the_best_on_the_test_the_average_and_the_worst(tmp_path):
    made = run(tmp_path, model="meta-llama/Meta-Llama-3-8B")
    lines = markdown_table(paper_tables.table1(made))
    assert lines[2].startswith("| paper, Llama-3-8B: LoRA (best) | 81.22 | 89.50 |")
    names = [line.split(" |")[0][2:] for line in lines[4:]]
    assert names == ["ours: LoRA (best)", "ours: LoRA (average)", "ours: LoRA (worst)", "ours: PoC merge"]
    assert lines[4].endswith("| 73.00 ± 0.43 |")  # not the one that validation questions chose
    assert lines[6].endswith("| 70.00 ± 0.43 |")
    assert "Collapsed adapters: 0 of 3." in paper_tables.notes([made])


def test_table_3_has_the_papers_row_at_each_of_its_temperatures(tmp_path):
    runs = [
        run(tmp_path, name, temperature=level, model="meta-llama/Llama-2-7b-hf")
        for name, level in (("a", 0.0), ("b", 1e-4), ("c", 2.5e-3))
    ]
    lines = markdown_table(paper_tables.table3(runs))
    assert [line.split(" |")[0][2:] for line in lines[2:]] == [
        "0, paper, Llama-2-7B",
        "0, ours",
        "1e-4, paper, Llama-2-7B",
        "1e-4, ours",
        "2.5e-3, ours",
    ]
    assert lines[4] == "| 1e-4, paper, Llama-2-7B | 77.42 | 71.71 |  | 81.63 |  |"
    assert lines[5].endswith("| 0 of 3 |")


@pytest.mark.parametrize(("averages", "count"), [((0.70, 0.30), 2), ((0.70, 0.48), 1), ((0.31,), 2)])
def test_adapters_near_guessing_and_those_that_diverged_have_collapsed(tmp_path, averages, count):
    made = run(tmp_path, averages=averages)  # chance is 0.25, and three adapters were trained
    assert made.collapsed == count


def test_a_run_that_is_not_evaluated_is_named(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "eval" / "results.json").unlink()
    with pytest.raises(RequestError, match="its adapters are not evaluated"):
        paper_tables.read(folder)


def test_the_papers_protocol_goes_first(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "eval-generate").mkdir()
    generated = results(protocol="generate", merged=scored(0.5).model_copy(update={"average": Estimate(0.5, 0.1)}))
    (folder / "eval-generate" / "results.json").write_text(generated.dumps())
    assert paper_tables.read(folder).results.protocol == "generate"
