"""Figure 2: mean logarithm of the squared error per epoch at several λ, over many networks."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from poc_lora.mfnn.ensemble import mean_and_error, squared_l2
from poc_lora.mfnn.experiments.cells import Folder
from poc_lora.mfnn.experiments.figures import COLOURS, new_figure, power, save_csv, save_figure, styled, trained_as
from poc_lora.mfnn.experiments.settings import Curves
from poc_lora.mfnn.experiments.training import trained
from poc_lora.mfnn.model import outputs

LOGGED = 60  # epochs at which the error is measured, evenly spaced in their logarithm
NEAR = 1.1  # a curve has settled once it stays below this times its own last value
LONG = 30  # from this many epochs on, the axis of epochs is logarithmic and the legend says when a curve settles


def run(folder: Folder, settings: Curves) -> list[dict[str, Any]]:
    """Train, measure, draw; returns the CSV's rows: one for each start, N, λ and logged epoch.

    Means over networks of the natural logarithm of each network's mean squared error, and their standard errors. Test
    targets are free of noise.
    """
    cells = {
        f"initial_std_{s:g}_N{n}_temperature_{t:g}": partial(_trained, settings, s, n, t)
        for s in settings.initial_stds
        for n in settings.widths
        for t in settings.temperatures
    }
    found = folder.compute(cells)
    rows = [row for name in cells for row in found[name]["rows"]]
    save_csv(folder.out, folder.name, rows)
    _draw(folder, settings, rows)
    return rows


def curve(rows: list[dict[str, Any]], initial_std: float, width: int, temperature: float) -> list[dict[str, Any]]:
    """The rows of one start, N and temperature."""
    mine = (initial_std, width, temperature)
    return [row for row in rows if (row["initial_std"], row["N"], row["temperature"]) == mine]


def settled(mine: list[dict[str, Any]]) -> int:
    """The first logged epoch of a curve from which on the test error stays below NEAR times its last value."""
    near = mine[-1]["log_test_mse"] + math.log(NEAR)
    outside = [i for i, row in enumerate(mine) if row["log_test_mse"] > near]
    return int(mine[outside[-1] + 1 if outside else 0]["epoch"])


def epochs(last: int) -> list[int]:
    """Epochs 1 to `last`, about LOGGED of them, evenly spaced in their logarithm."""
    return sorted({round(last ** (i / (LOGGED - 1))) for i in range(LOGGED)})


def _trained(settings: Curves, initial_std: float, width: int, temperature: float) -> dict[str, Any]:
    section = settings.section
    problem = section.problem(settings.seed)
    neuron = section.neuron(problem.dim)
    rows: list[dict[str, Any]] = []

    def measure(epoch: int, particles: Tensor) -> None:
        train_mse = squared_l2(outputs(neuron, particles, problem.inputs), problem.targets)
        test_mse = squared_l2(outputs(neuron, particles, problem.test_inputs), problem.test_targets)
        row: dict[str, Any] = {"initial_std": initial_std, "N": width, "temperature": temperature, "epoch": epoch}
        for name, mse in (("train", train_mse), ("test", test_mse)):
            row[f"log_{name}_mse"], row[f"log_{name}_standard_error"] = mean_and_error(mse.log())
        rows.append(row)

    trained(
        section,
        problem,
        range(settings.networks),
        width,
        temperature=temperature,
        initial_std=initial_std,
        seed=settings.seed,
        log_epochs=epochs(section.epochs),
        on_epoch=measure,
    )
    return {"rows": rows}


@styled
def _draw(folder: Folder, settings: Curves, rows: list[dict[str, Any]]) -> None:
    panels = [(s, n) for s in settings.initial_stds for n in settings.widths]
    columns = min(3, len(panels))
    height = -(-len(panels) // columns)
    figure, axes = new_figure(3.6 * columns + 1, 3.2 * height + 0.6, columns, height)
    section = settings.section
    long = section.epochs >= LONG
    for axis in axes[len(panels) :]:
        axis.remove()
    for axis, (initial_std, width) in zip(axes, panels, strict=False):
        for colour, temperature in zip(COLOURS, settings.temperatures, strict=False):
            mine = curve(rows, initial_std, width, temperature)
            epoch = torch.tensor([row["epoch"] for row in mine])
            mean, error = (torch.tensor([row[f"log_test_{k}"] for row in mine]) for k in ("mse", "standard_error"))
            label = f"λ = {power(temperature)}" + (f", epoch {settled(mine)}" if long else "")
            if long:
                axis.plot(epoch, mean, color=colour, label=label)
                axis.fill_between(epoch, mean - 2 * error, mean + 2 * error, color=colour, alpha=0.2, lw=0)
            else:
                axis.errorbar(epoch, mean, 2 * error, fmt="o-", color=colour, capsize=2, label=label)
        if long:
            axis.set_xscale("log")
        else:
            axis.set_xticks(range(1, section.epochs + 1))
        axis.set(xlabel="epoch", ylabel="mean ln(test MSE)")
        axis.set_title(f"N = {width}, neurons start from N(0, {initial_std:g}²)")
        if long:
            axis.legend(title="λ, and when within 10 % of the last value")
    if not long:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    save_figure(
        figure,
        folder.out,
        folder.name,
        f"seed {settings.seed}; means over {settings.networks} networks, bands or bars: 2 standard errors\n"
        f"{section.problem(settings.seed).name}: {trained_as(section)}",
    )
