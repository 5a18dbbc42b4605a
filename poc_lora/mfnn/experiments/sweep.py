"""Where a larger λ is better after a few epochs, over learning rate, batch size and start; and why."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from poc_lora.mfnn.ensemble import mean_and_error, squared_l2
from poc_lora.mfnn.experiments.cells import Folder
from poc_lora.mfnn.experiments.figures import COLOURS, new_figure, power, save_csv, save_figure, styled, trained_as
from poc_lora.mfnn.experiments.settings import Sweep
from poc_lora.mfnn.experiments.table2 import PAPER, PAPER_WIDTHS
from poc_lora.mfnn.experiments.training import trained
from poc_lora.mfnn.model import Neuron, Objective, outputs

Setup = tuple[float, float, int]  # initial_std, lr, batch_size


def run(folder: Folder, settings: Sweep) -> list[dict[str, Any]]:
    """Train, measure, draw; returns the rows of sweep.csv: one for each start, η, batch size and λ.

    In a row: mean and standard error over networks of ln(test MSE) after the last epoch, the merge's test MSE, and the
    first network's largest `overshoot` after any epoch, and the setup's `distance` from the paper's Table 2.
    """
    grid = [(s, lr, b) for s in settings.initial_stds for lr in settings.lrs for b in settings.batch_sizes]
    cells = {
        f"initial_std_{s:g}_lr_{lr:g}_batch_{b}_temperature_{t:g}": partial(_trained, settings, (s, lr, b), t)
        for s, lr, b in grid
        for t in settings.temperatures
    }
    found = folder.compute(cells)
    rows = [found[name] for name in cells]
    for row in rows:
        row["distance"] = distance(rows, _setup(row)) if settings.width == 300 else math.nan
    save_csv(folder.out, "sweep", rows)
    _draw(folder, settings, rows)
    return rows


def advantage(rows: list[dict[str, Any]], setup: Setup) -> float:
    """ln(MSE) at the smallest λ minus that at the largest: positive where the larger λ is better."""
    mine = sorted((row["temperature"], row["log_test_mse"]) for row in rows if _setup(row) == setup)
    return float(mine[0][1] - mine[-1][1])


def distance(rows: list[dict[str, Any]], setup: Setup) -> float:
    """Root mean square over λ of ln(merged MSE / the paper's), for N = 300: how far a setup is from its Table 2."""
    logs = [
        math.log(row["merged_mse"] / PAPER[row["temperature"]][PAPER_WIDTHS.index(300)])
        for row in rows
        if _setup(row) == setup and row["temperature"] in PAPER
    ]
    return math.sqrt(math.fsum(value**2 for value in logs) / len(logs)) if logs else math.nan


def overshoot(objective: Objective, particles: Tensor, lr: float, batch_size: int) -> float:
    """Returns how far a step changes a batch's outputs, in units of its own error, in the worst direction.

    To first order a step with learning rate η changes the outputs at a batch's B inputs by −η (ℓ''/B) K (h − y), where
    K is the tangent kernel, K_kl = (1/N) Σ_i <∇_x h(x_i, z_k), ∇_x h(x_i, z_l)>. Returned is η (ℓ''/B) times K's
    largest eigenvalue at the first B samples: a step overshoots above 1, and makes the error larger above 2.
    For losses of constant ℓ''.

    Args:
        objective: F.
        particles: One network, [N, P].
        lr: η.
        batch_size: B.
    """
    kernel = tangent_kernel(objective.neuron, particles, objective.inputs[:batch_size])
    largest = torch.linalg.eigvalsh(kernel.double())[-1].item()
    return float(lr * objective.loss.smoothness * largest / len(kernel))


def tangent_kernel(neuron: Neuron, particles: Tensor, inputs: Tensor) -> Tensor:
    """Returns K [B, B] of a network [N, P] at inputs [B, d]: see `overshoot`."""

    def total(x: Tensor, z: Tensor) -> Tensor:
        return neuron.values(x, z[None]).sum()

    slopes = torch.func.vmap(torch.func.grad(total), (None, 0))(particles.t(), inputs).flatten(1)
    kernel: Tensor = slopes @ slopes.t() / len(particles)
    return kernel


def _setup(row: dict[str, Any]) -> Setup:
    return row["initial_std"], row["lr"], row["batch_size"]


def _trained(settings: Sweep, setup: Setup, temperature: float) -> dict[str, Any]:
    initial_std, lr, batch_size = setup
    section = settings.multi_index.model_copy(update={"lr": lr, "batch_size": batch_size, "initial_std": initial_std})
    problem = section.problem(settings.seed)
    objective = section.objective(problem)
    steps: list[float] = []

    def measure(epoch: int, particles: Tensor) -> None:
        steps.append(overshoot(objective, particles[0], lr, batch_size))

    particles = trained(
        section,
        problem,
        range(settings.networks),
        settings.width,
        temperature=temperature,
        initial_std=initial_std,
        seed=settings.seed,
        log_epochs=range(1, section.epochs + 1),
        on_epoch=measure,
    )
    h = outputs(objective.neuron, particles, problem.test_inputs)
    mean, error = mean_and_error(squared_l2(h, problem.test_targets).log())
    return {
        "initial_std": initial_std,
        "lr": lr,
        "batch_size": batch_size,
        "temperature": temperature,
        "log_test_mse": mean,
        "standard_error": error,
        "merged_mse": squared_l2(h.mean(0), problem.test_targets).item(),
        "overshoot": max(steps),
    }


@styled
def _draw(folder: Folder, settings: Sweep, rows: list[dict[str, Any]]) -> None:
    starts, base = settings.initial_stds, settings.multi_index
    figure, axes = new_figure(3.6 * len(starts) + 4.6, 4.4, len(starts) + 1)
    low, high = min(settings.temperatures), max(settings.temperatures)
    table = {_setup(row): advantage(rows, _setup(row)) for row in rows}
    limit = max(abs(value) for value in table.values())
    for axis, start in zip(axes, starts, strict=False):
        values = [[table[start, lr, b] for b in settings.batch_sizes] for lr in settings.lrs]
        image = axis.imshow(values, origin="lower", cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
        for i, line in enumerate(values):
            for j, value in enumerate(line):
                here = (start, settings.lrs[i], settings.batch_sizes[j])
                chosen = here == (base.initial_std, base.lr, base.batch_size)
                axis.text(
                    j,
                    i,
                    f"{value:.2f}".replace("-", "−"),
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="w" if abs(value) > 0.6 * limit else "k",
                    bbox={"facecolor": "none", "edgecolor": "k"} if chosen else None,
                )
        axis.set_xticks(range(len(settings.batch_sizes)), map(str, settings.batch_sizes))
        axis.set_yticks(range(len(settings.lrs)), [f"{lr:g}" for lr in settings.lrs])
        axis.grid(False)
        axis.set(xlabel="batch size", ylabel="learning rate η")
        axis.set_title(f"start from N(0, {start:g}²)")
    figure.colorbar(image, ax=axes[len(starts) - 1], label=f"ln(MSE at {low:g}) − ln(MSE at {high:g})")
    axis = axes[-1]
    for colour, start in zip(COLOURS, starts, strict=False):
        mine = [row for row in rows if row["initial_std"] == start and row["temperature"] == low]
        x, y = [row["overshoot"] for row in mine], [table[_setup(row)] for row in mine]
        axis.plot(x, y, "o", color=colour, label=f"start {start:g}")
    axis.axhline(0, color="k", lw=0.8)
    axis.axvline(2, color="k", lw=0.8, ls="--")
    axis.set_xscale("log")
    axis.set(xlabel=f"overshoot of a step at λ = {power(low)}", ylabel="larger λ is worse (−) or better (+)")
    axis.set_title("a larger λ is better\nwhere steps are unstable (above 2)")
    axis.legend()
    near = min(rows, key=lambda row: (math.isnan(row["distance"]), row["distance"]))
    nearest = f"start {near['initial_std']:g}, η {near['lr']:g}, batches of {near['batch_size']}"
    save_figure(
        figure,
        folder.out,
        "sweep",
        f"seed {settings.seed}; mean ln(test MSE) of {settings.networks} networks of {settings.width} neurons; frame: "
        f"the values of Figure 2\nmulti-index regression: {trained_as(base)}, but for what is swept\n"
        f"nearest to the paper's Table 2 at N = 300: {nearest} (rms log ratio {near['distance']:.2f})",
    )
