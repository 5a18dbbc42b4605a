"""The paper's remark on pruning, measured: a wide network cut down to s neurons, beside networks trained with s."""

from functools import partial
from typing import Any

import torch

from poc_lora.mfnn.ensemble import log_slope, mean_and_error, prune, squared_l2
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
from poc_lora.mfnn.experiments.settings import DoubleCircleAt, MultiIndexAt, Pruning
from poc_lora.mfnn.experiments.training import REFERENCE, trained, trained_outputs
from poc_lora.mfnn.model import outputs

Section = DoubleCircleAt | MultiIndexAt


def run(folder: Folder, settings: Pruning) -> list[dict[str, Any]]:
    """Train, prune, draw; returns the rows of pruning.csv: one for each problem, s and kind of network.

    In a row: mean and standard error of the squared error over test inputs to a reference of N neurons; `pruned` over
    random choices of s of another network's N neurons, `trained` over networks trained with s neurons.
    """
    sections: dict[str, Section] = {"double_circle": settings.double_circle, "multi_index": settings.multi_index}
    cells = {}
    for name, section in sections.items():
        cells[f"{name}_reference"] = partial(_trained, section, settings, REFERENCE, settings.width)
        cells[f"{name}_pruned"] = partial(_pruned, section, settings)
        for kept in settings.kept:
            cells[f"{name}_s{kept}"] = partial(_trained, section, settings, range(settings.networks), kept)
    found = folder.compute(cells)
    rows = []
    for name in sections:
        limit = torch.tensor(found[f"{name}_reference"]["outputs"][0])
        for kept in settings.kept:
            kinds = {"pruned": found[f"{name}_pruned"][str(kept)], "trained": found[f"{name}_s{kept}"]["outputs"]}
            for kind, h in kinds.items():
                mean, error = mean_and_error(squared_l2(torch.tensor(h), limit))
                row = {"problem": name, "s": kept, "kind": kind, "error": mean, "standard_error": error}
                rows.append(row)
    save_csv(folder.out, "pruning", rows)
    _draw(folder, settings, rows)
    return rows


def slope(rows: list[dict[str, Any]], problem: str, kind: str) -> float:
    """Least-squares slope of the logarithm of the error against that of s."""
    mine = [row for row in rows if (row["problem"], row["kind"]) == (problem, kind)]
    s, error = (torch.tensor([float(row[key]) for row in mine]) for key in ("s", "error"))
    return log_slope(s, error)


def _trained(section: Section, settings: Pruning, networks: range, width: int) -> dict[str, Any]:
    h = trained_outputs(section, networks, width, temperature=section.temperature, seed=settings.seed)
    return {"outputs": h.tolist()}


def _pruned(section: Section, settings: Pruning) -> dict[str, Any]:
    problem = section.problem(settings.seed)
    (network,) = trained(
        section,
        problem,
        range(1),
        settings.width,
        temperature=section.temperature,
        initial_std=section.initial_std,
        seed=settings.seed,
    )
    neuron = section.neuron(problem.dim)
    found = {}
    for kept in settings.kept:
        cut = [prune(network, kept, seed=settings.seed + i) for i in range(settings.networks)]
        found[str(kept)] = outputs(neuron, torch.stack(cut), problem.test_inputs).tolist()
    return found


@styled
def _draw(folder: Folder, settings: Pruning, rows: list[dict[str, Any]]) -> None:
    figure, axes = new_figure(9.0, 4.0, 2)
    sections: dict[str, Section] = {
        "double circle": settings.double_circle,
        "multi-index regression": settings.multi_index,
    }
    for axis, (title, name) in zip(axes, zip(sections, ("double_circle", "multi_index"), strict=True), strict=True):
        for colour, kind in zip(COLOURS, ("pruned", "trained"), strict=False):
            mine = [row for row in rows if (row["problem"], row["kind"]) == (name, kind)]
            label = f"{settings.width:,} pruned to s" if kind == "pruned" else "trained with s"
            if len(mine) > 1:
                label += f", slope {slope(rows, name, kind):.2f}".replace("-", "−")
            axis.errorbar(
                [row["s"] for row in mine],
                [row["error"] for row in mine],
                [2 * row["standard_error"] for row in mine],
                fmt="o-",
                color=colour,
                capsize=2,
                label=label,
            )
        log_axes(axis, settings.kept)
        axis.set(xlabel="s, neurons", ylabel="squared error to the limit (bars: 2 standard errors)")
        axis.set_title(f"{title} (λ = {power(sections[title].temperature)}, {sections[title].epochs} epochs)")
        axis.legend()
    each = "\n".join(f"{title}: {trained_as(section)}" for title, section in sections.items())
    save_figure(
        figure,
        folder.out,
        "pruning",
        f"seed {settings.seed}; {settings.networks} networks or prunings for each s; limit: {settings.width:,} "
        f"neurons\n{each}",
    )
