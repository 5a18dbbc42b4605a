"""The experiments at small sizes: the shapes that the theory expects, and files that say what they show.

Differences are asserted at three of their standard errors or more; seeds are fixed.
"""

import csv
import itertools
import math

import pytest

from poc_lora import __version__
from poc_lora.mfnn.experiments import figure1, figure2, poc, table2
from poc_lora.mfnn.experiments.cells import Folder
from poc_lora.mfnn.experiments.settings import load

MULTI_INDEX = ["multi_index.samples=200", "multi_index.steps=60"]


def run(module, name, out, *overrides):
    settings = load(name, quick=True, overrides=overrides)
    return settings, module.run(Folder(out, name, settings, hidden=True), settings)


def check_files(out, name, settings, tables):
    svg = (out / f"{name}.svg").read_text()
    assert f"poc_lora {__version__}; seed {settings.seed};" in svg
    assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    for table in tables:
        with (out / f"{table}.csv").open() as lines:
            assert list(csv.DictReader(lines))


def test_sup_norm_falls_with_m_and_n(tmp_path):
    settings, rows = run(
        figure1,
        "figure1",
        tmp_path,
        *MULTI_INDEX,
        "double_circle.steps=60",
        "widths=[16, 64, 256]",
        "members=[1, 4]",
        "networks=32",
        "reference_width=16384",
    )
    check_files(tmp_path, "figure1", settings, ["figure1"])
    table = {(row["problem"], row["M"], row["N"]): row for row in rows}
    for problem in ("double_circle", "multi_index"):
        for m in settings.members:
            for a, b in itertools.pairwise(settings.widths):
                assert falls(table[problem, m, a], table[problem, m, b])
        for n in settings.widths:
            assert falls(table[problem, 1, n], table[problem, 4, n])
        # independent neurons give −1/2 in both; 32 log sup norms with a standard deviation of about 0.25 each side
        # leave a standard error of 0.25 sqrt(2/32)/log 4 = 0.05 for M, where groups are fewer 0.07, and less for N
        for slope in figure1.slopes(rows, problem):
            assert slope == pytest.approx(-0.5, abs=0.2)


def falls(before, after):
    error = math.hypot(before["standard_error"], after["standard_error"])
    return after["log_sup_norm"] < before["log_sup_norm"] - 3 * error


def test_larger_temperatures_settle_sooner_and_higher_and_lead_from_a_common_start(tmp_path):
    settings, rows = run(
        figure2,
        "figure2",
        tmp_path,
        "multi_index.samples=200",
        "multi_index.steps=200",
        "temperatures=[1e-1, 1e-3]",
        "networks=10",
    )
    check_files(tmp_path, "figure2", settings, ["figure2"])
    for initial_std in settings.initial_stds:
        hot, cold = (figure2.curve(rows, initial_std, t) for t in settings.temperatures)
        assert figure2.settled(hot) < figure2.settled(cold) / 3
        assert exceeds(hot[-1], cold[-1])
        assert (hot[0]["epoch"], hot[-1]["epoch"]) == (1, 200)
        early = next(i for i, row in enumerate(hot) if row["epoch"] >= 4)
        if initial_std < 0.1:  # neurons start almost equal, and only noise tells them apart
            assert exceeds(cold[early], hot[early])
        else:  # they start apart, and noise only disturbs
            assert hot[0]["test_mse"] == pytest.approx(cold[0]["test_mse"], rel=0.05)
            assert hot[early]["test_mse"] > cold[early]["test_mse"]


def exceeds(more, less):
    error = math.hypot(more["test_standard_error"], less["test_standard_error"])
    return more["test_mse"] > less["test_mse"] + 3 * error


def test_merging_lowers_the_error_and_more_neurons_do(tmp_path):
    settings, rows = run(
        table2, "table2", tmp_path, *MULTI_INDEX, "temperatures=[1e-1, 1e-3]", "widths=[30, 240]", "ensembles=6"
    )
    check_files(tmp_path, "table2", settings, ["table2"])
    assert (tmp_path / "table2.md").read_text() == table2.markdown(settings, rows)
    assert table2.markdown(settings, rows).count("±") == 4
    for row in rows:
        error = math.hypot(row["merged_standard_error"], row["single_standard_error"])
        assert row["merged_mse"] < row["single_mse"] - 3 * error
    for few, many in (rows[:2], rows[2:]):
        error = math.hypot(few["single_standard_error"], many["single_standard_error"])
        assert many["single_mse"] < few["single_mse"] - 3 * error


def test_the_constant_of_the_rate_does_not_blow_up_and_the_solvable_case_agrees(tmp_path):
    settings, results = run(
        poc,
        "poc",
        tmp_path,
        "chain.widths=[2, 8]",
        "chain.networks=100",
        "chain.steps=100",
        "bounded.multi_index.samples=200",
        "bounded.multi_index.steps=60",
        "bounded.temperatures=[1e-1, 1e-5]",
        "bounded.widths=[32, 128]",
        "bounded.networks=32",
    )
    check_files(tmp_path, "poc", settings, results)
    grid = settings.closed_form
    assert len(results["poc_gap"]) == len(grid.temperatures) * len(grid.dims) * len(grid.widths)
    for row in results["poc_gap"]:
        assert row["temperature_times_kl_over_N"] < row["gap"] < row["bound"]
    # 4 directions, 2 times, 2 widths, 3 quantities: beyond 4.5 in less than one seed of 3,000
    assert all(abs(row[f"{what}_z"]) < 4.5 for row in results["poc_law"] for what in ("mean", "along", "across"))
    constants = {(row["temperature"], row["N"]): row for row in results["poc_bounded"]}
    for n in settings.bounded.widths:
        hot, cold = constants[1e-1, n], constants[1e-5, n]
        # λ is 10,000 times smaller; a constant like 1/λ, let alone exp(1/λ), would tower over this
        assert cold["N_times_error"] < hot["N_times_error"] + 3 * hot["N_times_standard_error"]
    for t in settings.bounded.temperatures:
        few, many = (constants[t, n] for n in settings.bounded.widths)
        error = math.hypot(few["N_times_standard_error"], many["N_times_standard_error"])
        assert abs(few["N_times_error"] - many["N_times_error"]) < 4 * error  # the rate is 1/N


TINY = ["multi_index.samples=20", "multi_index.steps=2"]


@pytest.mark.parametrize(
    ("module", "name", "overrides"),
    [
        (
            figure1,
            "figure1",
            [*TINY, "double_circle.steps=2", "networks=1", "members=[1]", "widths=[5, 6]", "reference_width=64"],
        ),
        (figure2, "figure2", [*TINY, "networks=1", "width=5"]),
        (table2, "table2", [*TINY, "ensembles=1", "members=1", "widths=[5, 6]"]),
        (
            poc,
            "poc",
            "bounded.multi_index.samples=20 bounded.multi_index.steps=2 bounded.networks=1 bounded.reference_width=64 "
            "bounded.widths=[5,6] chain.networks=4 chain.members=[1,4]".split(),
        ),
    ],
)
def test_a_single_network_has_no_standard_error(tmp_path, module, name, overrides):
    run(module, name, tmp_path, *overrides)
    first = {path: path.read_bytes() for path in tmp_path.glob(f"{name}*")}
    run(module, name, tmp_path, *overrides)  # from the cells
    assert {path: path.read_bytes() for path in tmp_path.glob(f"{name}*")} == first
    tables = b"".join(text for path, text in first.items() if path.suffix in (".csv", ".md"))
    assert b"nan" not in tables
    assert b",," in tables


def test_a_footer_says_how_networks_were_trained(tmp_path):
    run(figure2, "figure2", tmp_path / "2", *TINY, "networks=2", "width=5", "multi_index.noise=0.25")
    text = (tmp_path / "2" / "figure2.svg").read_text()
    assert "d 10, 3 directions, 20 samples, noise 0.25, tanh neurons, R 5, η 0.1, λ' 0.01, 2 steps" in text.replace(
        "&#39;", "'"
    )
    arguments = ["double_circle.steps=2", "double_circle.initial_std=0.5", "networks=2", "members=[1, 2]"]
    run(figure1, "figure1", tmp_path / "1", *TINY, *arguments, "widths=[5, 6]", "reference_width=64")
    text = (tmp_path / "1" / "figure1.svg").read_text()
    assert "double circle: 500 samples, noise 0.1, tanh neurons from N(0, 0.5²), R 10" in text


def test_figures_are_the_same_bytes_when_drawn_again(tmp_path):
    arguments = [*MULTI_INDEX, "temperatures=[1e-2]", "widths=[10, 20]", "members=2", "ensembles=2"]
    run(table2, "table2", tmp_path, *arguments)
    names = ["table2.png", "table2.svg", "table2.csv"]
    before = [(tmp_path / name).read_bytes() for name in names]
    run(table2, "table2", tmp_path, *arguments)
    assert [(tmp_path / name).read_bytes() for name in names] == before
