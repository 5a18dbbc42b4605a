"""Table 2: test error of merged networks, λ by N."""

import math
from functools import partial
from typing import Any

from poc_lora.files import write_atomic
from poc_lora.mfnn.ensemble import mean_and_error, merged_outputs, squared_l2
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


def run(folder: Folder, settings: Table2) -> list[dict[str, Any]]:
    """Train, merge, draw; returns the rows of table2.csv: one for each λ and N.

    Errors are mean squared, against test targets free of noise. The standard error of the merged error is over
    ensembles, that of the single network's over networks; the draw of samples is the same for all.
    """
    cells = {
        f"temperature_{t:g}_N{width}": partial(_trained, settings, t, width)
        for t in settings.temperatures
        for width in settings.widths
    }
    found = folder.compute(cells)
    rows = [found[name] for name in cells]
    save_csv(folder.out, "table2", rows)
    write_atomic(folder.out / "table2.md", markdown(settings, rows))
    _draw(folder, settings, rows)
    return rows


def markdown(settings: Table2, rows: list[dict[str, Any]]) -> str:
    """The table: merged error in thousandths, ± standard error where there is more than one merge."""
    table = {(row["temperature"], row["N"]): row for row in rows}
    lines = [
        "| λ | " + " | ".join(f"N = {n}" for n in settings.widths) + " |",
        "|---|" + "---:|" * len(settings.widths),
    ]
    for t in settings.temperatures:
        found = [table[t, n] for n in settings.widths]
        lines.append(
            f"| {t:g} | "
            + " | ".join(_cell(1e3 * r["merged_mse"], 1e3 * r["merged_standard_error"]) for r in found)
            + " |"
        )
    return "\n".join(lines) + "\n"


def _cell(value: float, error: float) -> str:
    return f"{value:.2f}" if math.isnan(error) else f"{value:.2f} ± {error:.2f}"


def _trained(settings: Table2, temperature: float, width: int) -> dict[str, Any]:
    networks = range(settings.members * settings.ensembles)
    h = trained_outputs(settings.multi_index, networks, width, temperature=temperature, seed=settings.seed)
    targets = settings.multi_index.problem(settings.seed).test_targets  # the probe inputs are the test inputs
    single, single_error = mean_and_error(squared_l2(h, targets))
    merged, merged_error = mean_and_error(squared_l2(merged_outputs(h, settings.members), targets))
    return {
        "temperature": temperature,
        "N": width,
        "merged_mse": merged,
        "merged_standard_error": merged_error,
        "single_mse": single,
        "single_standard_error": single_error,
    }


@styled
def _draw(folder: Folder, settings: Table2, rows: list[dict[str, Any]]) -> None:
    figure, (axis,) = new_figure(6.4, 4.2, 1)
    for colour, temperature in zip(COLOURS, settings.temperatures, strict=False):
        mine = [row for row in rows if row["temperature"] == temperature]
        for kind, style in (("merged", "o-"), ("single", "x:")):
            axis.errorbar(
                [row["N"] for row in mine],
                [row[f"{kind}_mse"] for row in mine],
                [2 * row[f"{kind}_standard_error"] for row in mine],
                fmt=style,
                color=colour,
                capsize=2,
                label=f"λ = {power(temperature)}, {f'merge of {settings.members}' if kind == 'merged' else 'single'}",
            )
    log_axes(axis, settings.widths)
    axis.set(xlabel="N, neurons of each network", ylabel="test MSE (bars: 2 standard errors)")
    axis.set_title("merged (●) and single (×) networks")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    section = settings.multi_index
    save_figure(
        figure,
        folder.out,
        "table2",
        f"seed {settings.seed}; {settings.ensembles} merges of {settings.members} networks\nmulti-index regression: "
        f"{trained_as(section)}",
    )
