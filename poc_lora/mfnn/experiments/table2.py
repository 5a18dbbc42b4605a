"""Table 2: test error of merged networks, λ by N, beside the paper's."""

import math
from functools import partial
from typing import Any

import torch

from poc_lora.files import write_atomic
from poc_lora.mfnn.ensemble import merged_outputs, squared_l2
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
from poc_lora.mfnn.experiments.settings import Table2
from poc_lora.mfnn.experiments.training import trained_outputs

# Nitanda et al. 2025, Table 2: the MSE of the merge of 20 networks after 5 epochs.
PAPER_WIDTHS = (300, 400, 500, 600, 700, 800)
PAPER = {
    1e-1: (0.9132253, 0.9040508, 0.9075238, 0.9044338, 0.9030165, 0.9022377),
    1e-2: (1.2325489, 1.2229528, 1.2166352, 1.1978958, 1.1921849, 1.1654898),
    1e-3: (1.5718020, 1.5668763, 1.5607907, 1.5581368, 1.5282313, 1.5234329),
    1e-4: (1.6987042, 1.6887244, 1.6631799, 1.6135653, 1.5860944, 1.5821924),
}


def run(folder: Folder, settings: Table2) -> list[dict[str, Any]]:
    """Train, merge, draw; returns the rows of table2.csv: one for each λ and N.

    Mean squared errors on test targets free of noise: mean, standard deviation and range over the seeds, each with
    samples and networks of its own. The single error of a seed is the mean over its networks. `ratio` is the merge's
    over the paper's; both are missing where the paper has no such cell.
    """
    cells = {
        f"seed_{seed}_temperature_{t:g}_N{width}": partial(_trained, settings, seed, t, width)
        for seed in range(settings.seed, settings.seed + settings.seeds)
        for t in settings.temperatures
        for width in settings.widths
    }
    found = folder.compute(cells)
    rows = [
        _row(t, width, [cell for cell in found.values() if (cell["temperature"], cell["N"]) == (t, width)])
        for t in settings.temperatures
        for width in settings.widths
    ]
    save_csv(folder.out, "table2", rows)
    write_atomic(folder.out / "table2.md", markdown(settings, rows))
    _draw(folder, settings, rows)
    return rows


def markdown(settings: Table2, rows: list[dict[str, Any]]) -> str:
    """The table: in each cell the merged error ± its standard deviation over the seeds, the paper's, and the ratio."""
    table = {(row["temperature"], row["N"]): row for row in rows}
    lines = [
        "| λ | " + " | ".join(f"N = {n}" for n in settings.widths) + " |",
        "|---|" + "---:|" * len(settings.widths),
    ]
    for t in settings.temperatures:
        lines.append(f"| {t:g} | " + " | ".join(_cell(table[t, n]) for n in settings.widths) + " |")
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any]) -> str:
    text = f"{row['merged_mse']:.3f}"
    if not math.isnan(row["merged_deviation"]):
        text += f" ± {row['merged_deviation']:.3f}"
    return text if math.isnan(row["paper"]) else f"{text}; {row['paper']:.3f}; {row['ratio']:.2f}"


def _trained(settings: Table2, seed: int, temperature: float, width: int) -> dict[str, Any]:
    section = settings.multi_index
    h = trained_outputs(section, range(settings.members), width, temperature=temperature, seed=seed)
    targets = section.problem(seed).test_targets
    return {
        "temperature": temperature,
        "N": width,
        "merged_mse": squared_l2(merged_outputs(h, settings.members), targets).item(),
        "single_mse": squared_l2(h, targets).mean().item(),
    }


def _row(temperature: float, width: int, cells: list[dict[str, Any]]) -> dict[str, Any]:
    merged, single = (torch.tensor([cell[key] for cell in cells]).double() for key in ("merged_mse", "single_mse"))
    paper = math.nan
    if temperature in PAPER and width in PAPER_WIDTHS:
        paper = PAPER[temperature][PAPER_WIDTHS.index(width)]
    return {
        "temperature": temperature,
        "N": width,
        "merged_mse": merged.mean().item(),
        "merged_deviation": _deviation(merged),
        "merged_min": merged.min().item(),
        "merged_max": merged.max().item(),
        "single_mse": single.mean().item(),
        "single_deviation": _deviation(single),
        "paper": paper,
        "ratio": merged.mean().item() / paper,
    }


def _deviation(values: torch.Tensor) -> float:
    return values.std().item() if len(values) > 1 else math.nan


@styled
def _draw(folder: Folder, settings: Table2, rows: list[dict[str, Any]]) -> None:
    figure, (axis,) = new_figure(7.0, 4.4, 1)
    for colour, temperature in zip(COLOURS, settings.temperatures, strict=False):
        mine = [row for row in rows if row["temperature"] == temperature]
        widths = [row["N"] for row in mine]
        for kind, style in (("merged", "o-"), ("single", "x:")):
            axis.errorbar(
                widths,
                [row[f"{kind}_mse"] for row in mine],
                [row[f"{kind}_deviation"] for row in mine],
                fmt=style,
                color=colour,
                capsize=2,
                label=f"λ = {power(temperature)}, {f'merge of {settings.members}' if kind == 'merged' else 'single'}",
            )
        axis.plot(widths, [row["paper"] for row in mine], "s--", color=colour, mfc="none", lw=0.8)
    log_axes(axis, settings.widths)
    axis.set(xlabel="N, neurons of each network", ylabel="test MSE (bars: standard deviation over seeds)")
    axis.set_title("merged (●) and single (×) networks, and the paper's merges (□)")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    section = settings.multi_index
    save_figure(
        figure,
        folder.out,
        "table2",
        f"seed {settings.seed}; {settings.seeds} data sets, by this seed and the next; a merge of "
        f"{settings.members} networks of each\n"
        f"multi-index regression: {trained_as(section)}",
    )
