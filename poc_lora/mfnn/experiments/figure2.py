"""Figure 2: mean squared error per epoch at several λ, the average of many networks."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from poc_lora.mfnn.ensemble import mean_and_error, squared_l2
from poc_lora.mfnn.experiments.cells import Folder
from poc_lora.mfnn.experiments.figures import (
    COLOURS,
    log_axes,
    new_figure,
    power,
    save_csv,
    save_figure,
    styled,
    trained_as,
)
from poc_lora.mfnn.experiments.settings import Figure2
from poc_lora.mfnn.langevin import train
from poc_lora.mfnn.model import outputs

LOGGED = 60  # epochs at which the error is measured, evenly spaced in their logarithm
NEAR = 1.1  # a curve has settled once it stays below this times its own last value


def run(folder: Folder, settings: Figure2) -> list[dict[str, Any]]:
    """Train, measure, draw; returns the rows of figure2.csv: one for each start, λ and logged epoch.

    An epoch is one step: the gradient is that of all samples. Test targets are free of noise. The standard error is
    that of the mean over networks.
    """
    cells = {
        f"initial_std_{s:g}_temperature_{t:g}": partial(_trained, settings, s, t)
        for s in settings.initial_stds
        for t in settings.temperatures
    }
    found = folder.compute(cells)
    rows = [row for name in cells for row in found[name]["rows"]]
    save_csv(folder.out, "figure2", rows)
    _draw(folder, settings, rows)
    return rows


def curve(rows: list[dict[str, Any]], initial_std: float, temperature: float) -> list[dict[str, Any]]:
    """The rows of one start and temperature."""
    return [row for row in rows if (row["initial_std"], row["temperature"]) == (initial_std, temperature)]


def settled(mine: list[dict[str, Any]]) -> int:
    """The first logged epoch of a curve from which on the test error stays below NEAR times its last value."""
    outside = [i for i, row in enumerate(mine) if row["test_mse"] > NEAR * mine[-1]["test_mse"]]
    return int(mine[outside[-1] + 1 if outside else 0]["epoch"])


def epochs(last: int) -> list[int]:
    """Epochs 1 to `last`, about LOGGED of them, evenly spaced in their logarithm."""
    return sorted({round(last ** (i / (LOGGED - 1))) for i in range(LOGGED)})


def _trained(settings: Figure2, initial_std: float, temperature: float) -> dict[str, Any]:
    section = settings.multi_index
    problem = section.problem(settings.seed)
    objective = section.objective(problem)
    rows: list[dict[str, Any]] = []

    def measure(epoch: int, particles: Tensor) -> None:
        train_h = outputs(objective.neuron, particles, problem.inputs)
        test_h = outputs(objective.neuron, particles, problem.test_inputs)
        train_mse, train_error = mean_and_error(squared_l2(train_h, problem.targets))
        test_mse, test_error = mean_and_error(squared_l2(test_h, problem.test_targets))
        rows.append(
            {
                "initial_std": initial_std,
                "temperature": temperature,
                "epoch": epoch,
                "train_mse": train_mse,
                "train_standard_error": train_error,
                "test_mse": test_mse,
                "test_standard_error": test_error,
            }
        )

    train(
        objective,
        range(settings.networks),
        settings.width,
        steps=section.steps,
        lr=section.lr,
        temperature=temperature,
        seed=settings.seed,
        initial_std=initial_std,
        log_at=epochs(section.steps),
        on_log=measure,
    )
    return {"rows": rows}


@styled
def _draw(folder: Folder, settings: Figure2, rows: list[dict[str, Any]]) -> None:
    figure, axes = new_figure(4.8 * len(settings.initial_stds), 4.2, len(settings.initial_stds))
    for axis, initial_std in zip(axes, settings.initial_stds, strict=True):
        for colour, temperature in zip(COLOURS, settings.temperatures, strict=False):
            mine = curve(rows, initial_std, temperature)
            epoch = torch.tensor([row["epoch"] for row in mine])
            test, error = (torch.tensor([row[k] for row in mine]) for k in ("test_mse", "test_standard_error"))
            axis.plot(epoch, test, color=colour, label=f"λ = {power(temperature)}, epoch {settled(mine)}")
            axis.fill_between(epoch, test - 2 * error, test + 2 * error, color=colour, alpha=0.2, lw=0)
        log_axes(axis)
        axis.set(xlabel="epoch", ylabel="test MSE (band: 2 standard errors)")
        axis.set_title(f"neurons start from N(0, {initial_std:g}²)")
        axis.legend(title="λ, and when within 10 % of the last value", loc="upper right")
    section = settings.multi_index
    save_figure(
        figure,
        folder.out,
        "figure2",
        f"seed {settings.seed}; average of {settings.networks} networks of {settings.width} neurons\n"
        f"multi-index regression: {trained_as(section)}",
    )
