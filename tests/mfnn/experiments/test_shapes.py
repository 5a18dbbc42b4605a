"""The experiments at small sizes: the shapes that the theory expects, and files that say what they show.

Differences are asserted at three of their standard errors or more; seeds are fixed.
"""

import csv
import itertools
import math

import pytest
import torch

from poc_lora import __version__
from poc_lora.mfnn import MEAN_SQUARED_ERROR, Objective, TanhProduct, multi_index, outputs
from poc_lora.mfnn.experiments import figure1, figure2, poc, pruning, sweep, table2
from poc_lora.mfnn.experiments.cells import Folder
from poc_lora.mfnn.experiments.settings import load


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
        "multi_index.epochs=30",
        "double_circle.epochs=30",
        "widths=[20, 80, 320]",
        "members=[1, 2, 4]",
        "networks=32",
    )
    check_files(tmp_path, "figure1", settings, ["figure1"])
    table = {(row["problem"], row["M"], row["N"]): row for row in rows}
    for problem in ("double_circle", "multi_index"):
        for m in settings.members:
            for a, b in itertools.pairwise(settings.widths):
                assert falls(table[problem, m, a], table[problem, m, b], settings.subsets)
        for n in settings.widths:
            assert falls(table[problem, 1, n], table[problem, 4, n], settings.subsets)
        # independent neurons give −1/2 in both. Log sup norms of single networks have a standard deviation of
        # about 0.25: means over 32 leave 0.25 sqrt(2/32)/log 16 = 0.02 for N; for M, eight merges of 4 are
        # independent, 0.25 sqrt(2/8)/log 4 = 0.09
        for slope in figure1.slopes(rows, problem):
            assert slope == pytest.approx(-0.5, abs=0.2)


def falls(before, after, subsets):
    error = math.hypot(before["standard_deviation"], after["standard_deviation"]) / math.sqrt(subsets)
    return after["sup_norm"] < before["sup_norm"] - 3 * error


def test_larger_temperatures_lead_where_steps_overshoot_and_nowhere_else(tmp_path):
    """The paper's Figure 2 at few networks, and at a thirtieth of the learning rate, where the order is the other."""
    few = ["temperatures=[1e-1, 1e-4]", "widths=[300]", "networks=8"]
    settings, rows = run(figure2, "figure2", tmp_path / "a", *few)
    check_files(tmp_path / "a", "figure2", settings, ["figure2"])
    hot, cold = (figure2.curve(rows, 0.1, 300, t) for t in settings.temperatures)
    assert [row["epoch"] for row in hot] == [1, 2, 3, 4, 5]
    assert exceeds(cold[-1], hot[-1])
    _, slow = run(figure2, "figure2", tmp_path / "b", *few, "multi_index.lr=0.01")
    hot, cold = (figure2.curve(slow, 0.1, 300, t) for t in settings.temperatures)
    assert exceeds(hot[-1], cold[-1])


def test_larger_temperatures_settle_sooner_and_higher_and_lead_from_a_common_start(tmp_path):
    settings, rows = run(
        figure2,
        "figure2_long",
        tmp_path,
        "sines.samples=200",
        "sines.epochs=200",
        "temperatures=[1e-1, 1e-3]",
        "networks=10",
    )
    check_files(tmp_path, "figure2_long", settings, ["figure2_long"])
    for initial_std in settings.initial_stds:
        hot, cold = (figure2.curve(rows, initial_std, 100, t) for t in settings.temperatures)
        assert figure2.settled(hot) < figure2.settled(cold) / 3
        assert exceeds(hot[-1], cold[-1])
        assert (hot[0]["epoch"], hot[-1]["epoch"]) == (1, 200)
        early = next(i for i, row in enumerate(hot) if row["epoch"] >= 4)
        if initial_std < 0.1:  # neurons start almost equal, and only noise tells them apart
            assert exceeds(cold[early], hot[early])
        else:  # they start apart, and noise only disturbs
            assert hot[0]["log_test_mse"] == pytest.approx(cold[0]["log_test_mse"], abs=0.05)
            assert hot[early]["log_test_mse"] > cold[early]["log_test_mse"]


def exceeds(more, less):
    error = math.hypot(more["log_test_standard_error"], less["log_test_standard_error"])
    return more["log_test_mse"] > less["log_test_mse"] + 3 * error


def test_merging_lowers_the_error_and_cells_stand_beside_the_papers(tmp_path):
    settings, rows = run(
        table2, "table2", tmp_path, "temperatures=[1e-1, 1e-3]", "widths=[300, 350]", "members=4", "seeds=2"
    )
    check_files(tmp_path, "table2", settings, ["table2"])
    text = (tmp_path / "table2.md").read_text()
    assert text == table2.markdown(settings, rows)
    assert text.count("±") == 4
    for row in rows:
        assert row["merged_min"] <= row["merged_mse"] <= row["merged_max"] < row["single_mse"]
        if row["N"] == 300:
            assert row["paper"] == {1e-1: 0.9132253, 1e-3: 1.571802}[row["temperature"]]
            assert row["ratio"] == pytest.approx(row["merged_mse"] / row["paper"])
            assert f"{row['merged_mse']:.3f} ± {row['merged_deviation']:.3f}; {row['paper']:.3f}; " in text
        else:  # not in the paper's table
            assert math.isnan(row["paper"])
    by_seed = [run(table2, "table2", tmp_path / str(seed), *few_of(seed))[1][0]["merged_mse"] for seed in (0, 1)]
    assert rows[0]["merged_mse"] == pytest.approx(sum(by_seed) / 2)


def few_of(seed):
    return [f"seed={seed}", "temperatures=[1e-1]", "widths=[300]", "members=4", "seeds=1"]


def test_the_advantage_of_a_larger_temperature_goes_with_overshoot(tmp_path):
    settings, rows = run(sweep, "sweep", tmp_path, "batch_sizes=[64, 128]", "temperatures=[1e-1, 1e-4]", "networks=4")
    check_files(tmp_path, "sweep", settings, ["sweep"])
    steps = {(row["lr"], row["batch_size"]): row["overshoot"] for row in rows if row["temperature"] == 1e-4}
    assert len(steps) == 4
    for (lr, batch_size), step in steps.items():
        gain = sweep.advantage(rows, (0.1, lr, batch_size))
        assert (step > 3) == (lr == 0.3)
        assert gain > 0.2 if step > 3 else gain < -0.2
    for row in rows:
        mine = [r for r in rows if (r["lr"], r["batch_size"]) == (row["lr"], row["batch_size"])]
        logs = [math.log(r["merged_mse"] / {1e-1: 0.9132253, 1e-4: 1.6987042}[r["temperature"]]) for r in mine]
        assert row["distance"] == pytest.approx(math.sqrt((logs[0] ** 2 + logs[1] ** 2) / 2))


def test_the_tangent_kernel_says_how_a_small_step_changes_outputs():
    problem = multi_index(40, dim=6, directions=4, seed=1)
    inputs, targets = problem.inputs.double(), problem.targets.double()
    objective = Objective(TanhProduct(6, 10.0), MEAN_SQUARED_ERROR, inputs, targets, 0.0)
    x = torch.randn(9, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lr, before = 1e-7, outputs(objective.neuron, x, inputs)
    after = outputs(objective.neuron, x - lr * objective.gradient(x), inputs)
    kernel = sweep.tangent_kernel(objective.neuron, x, inputs)
    expected = -kernel @ (2 * (before - targets)) / 32
    assert torch.allclose((after - before) / lr, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    largest = torch.linalg.eigvalsh(kernel)[-1].item()
    assert sweep.overshoot(objective, x, 0.1, 400) == pytest.approx(0.1 * 2 * largest / 32)  # all 32 there are


def test_the_errors_of_pruned_and_of_trained_networks_fall_as_one_over_s(tmp_path):
    settings, rows = run(
        pruning, "pruning", tmp_path, "double_circle.epochs=20", "multi_index.epochs=20", "kept=[25, 100, 400]"
    )
    check_files(tmp_path, "pruning", settings, ["pruning"])
    for problem in ("double_circle", "multi_index"):
        for kind in ("pruned", "trained"):
            # ten mean squares of outputs that vary together have a relative error of about 0.4 each at the worst: 0.4
            # sqrt(2)/log 16 = 0.2 for the slope
            assert pruning.slope(rows, problem, kind) == pytest.approx(-1.0, abs=0.5)


def test_the_constant_of_the_rate_does_not_blow_up_and_the_solvable_case_agrees(tmp_path):
    settings, results = run(
        poc,
        "poc",
        tmp_path,
        "chain.widths=[2, 8]",
        "chain.networks=100",
        "chain.steps=100",
        "bounded.sines.samples=200",
        "bounded.sines.epochs=60",
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


TINY = ["multi_index.samples=40", "multi_index.epochs=1"]


@pytest.mark.parametrize(
    ("module", "name", "overrides"),
    [
        (
            figure1,
            "figure1",
            [*TINY, "double_circle.epochs=2", "networks=1", "members=[1]", "widths=[5, 6]", "reference_width=64"],
        ),
        (figure2, "figure2", [*TINY, "networks=1", "widths=[5]"]),
        (table2, "table2", [*TINY, "seeds=1", "members=1", "widths=[5, 300]"]),
        (sweep, "sweep", [*TINY, "networks=1", "width=5", "batch_sizes=[16]"]),
        (pruning, "pruning", [*TINY, "double_circle.epochs=2", "networks=1", "kept=[5, 6]", "width=64"]),
        (
            poc,
            "poc",
            "bounded.sines.samples=20 bounded.sines.epochs=2 bounded.networks=1 bounded.reference_width=64 "
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
    if module is not figure1:  # there it is the deviation over subsets
        assert b",," in tables or b",\n" in tables


def test_a_footer_says_how_networks_were_trained(tmp_path):
    few = ["networks=2", "widths=[5]", "temperatures=[1e-2]"]
    run(figure2, "figure2", tmp_path / "2", *TINY, *few)
    text = (tmp_path / "2" / "figure2.svg").read_text()
    expected = "d 100, k 100, R̄ 100, r 5, 40 samples, TanhProduct neurons, R 10, η 0.3, λ' 0.1, 1 epochs, batches of 32"
    assert expected in text.replace("&#39;", "'")
    run(figure2, "figure2_long", tmp_path / "3", *few, "sines.samples=20", "sines.epochs=2", "sines.noise=0.25")
    text = (tmp_path / "3" / "figure2_long.svg").read_text()
    expected = (
        "d 10, 3 directions, noise 0.25, 20 samples, Tanh neurons, R 5, η 0.1, λ' 0.01, 2 epochs, all samples a step"
    )
    assert expected in text.replace("&#39;", "'")
    arguments = ["double_circle.epochs=2", "double_circle.initial_std=0.5", "networks=2", "members=[1, 2]"]
    run(figure1, "figure1", tmp_path / "1", *TINY, *arguments, "widths=[5, 6]", "reference_width=64")
    text = (tmp_path / "1" / "figure1.svg").read_text()
    assert "double circle: noise 0.1, 200 samples, TanhProduct neurons from N(0, 0.5²), R 10" in text


def test_figures_are_the_same_bytes_when_drawn_again(tmp_path):
    arguments = [*TINY, "temperatures=[1e-2]", "widths=[10, 20]", "members=2", "seeds=2"]
    run(table2, "table2", tmp_path, *arguments)
    names = ["table2.png", "table2.svg", "table2.csv"]
    before = [(tmp_path / name).read_bytes() for name in names]
    run(table2, "table2", tmp_path, *arguments)
    assert [(tmp_path / name).read_bytes() for name in names] == before
