"""Propagation of chaos where everything is known (linear neurons), and with bounded neurons."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from poc_lora.mfnn.ensemble import mean_and_error, squared_l2
from poc_lora.mfnn.experiments.cells import Folder
from poc_lora.mfnn.experiments.chain import law_rows, simulate, split_rows
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
from poc_lora.mfnn.experiments.settings import Bounded, Chain, ClosedForm, Poc
from poc_lora.mfnn.experiments.training import REFERENCE, trained_outputs
from poc_lora.mfnn.gaussian import Gaussian, from_samples
from poc_lora.mfnn.problems import linear

Rows = list[dict[str, Any]]


def run(folder: Folder, settings: Poc) -> dict[str, Rows]:
    """Compute, compare, draw; returns the rows of the four CSV files by their names."""
    chain, bounded, seed = settings.chain, settings.bounded, settings.seed
    cells = {f"chain_N{n}": partial(_chain, chain, n, seed) for n in chain.widths}
    cells[f"ensemble_N{chain.ensemble_width}"] = partial(_split, chain, seed)
    for t in bounded.temperatures:
        cells[f"bounded_{t:g}_reference"] = partial(_bounded, bounded, t, REFERENCE, bounded.reference_width, seed)
        for n in bounded.widths:
            cells[f"bounded_{t:g}_N{n}"] = partial(_bounded, bounded, t, range(bounded.networks), n, seed)
    found = folder.compute(cells)
    results = {
        "poc_gap": gap_rows(settings.closed_form, chain, seed),
        "poc_law": [row for n in chain.widths for row in found[f"chain_N{n}"]["rows"]],
        "poc_ensemble": found[f"ensemble_N{chain.ensemble_width}"]["rows"],
        "poc_bounded": _bounded_rows(bounded, found),
    }
    for name, rows in results.items():
        save_csv(folder.out, name, rows)
    _draw(folder, settings, results)
    return results


def gap_rows(grid: ClosedForm, chain: Chain, seed: int) -> Rows:
    """Gap, bound and (λ/N) KL in closed form for every λ, d and N of the grid; data and λ' as in the chain."""
    rows = []
    for dim in grid.dims:
        problem = linear(chain.samples, dim, seed=seed)
        for temperature in grid.temperatures:
            case, _ = from_samples(problem.inputs, problem.targets, chain.regularization, temperature)
            rows += [_gap_row(case, dim, n) for n in grid.widths]
    return rows


def _gap_row(case: Gaussian, dim: int, width: int) -> dict[str, Any]:
    return {
        "temperature": case.temperature,
        "d": dim,
        "N": width,
        "gap": case.gap(width),
        "bound": case.gap_bound(width),
        "temperature_times_kl_over_N": case.temperature * case.kl() / width,
    }


def _chain(settings: Chain, width: int, seed: int) -> dict[str, Any]:
    _, snapshots = simulate(settings, width, seed=seed)
    return {"rows": [row for time, snapshot in snapshots.items() for row in law_rows(snapshot, time)]}


def _split(settings: Chain, seed: int) -> dict[str, Any]:
    case, snapshots = simulate(settings, settings.ensemble_width, seed=seed)
    return {"rows": split_rows(case, snapshots, settings.members)}


def _bounded(settings: Bounded, temperature: float, networks: range, width: int, seed: int) -> dict[str, Any]:
    h = trained_outputs(settings.sines, networks, width, temperature=temperature, seed=seed)
    return {"outputs": h.tolist()}


def _bounded_rows(settings: Bounded, found: dict[str, dict[str, Any]]) -> Rows:
    rows = []
    for t in settings.temperatures:
        limit = torch.tensor(found[f"bounded_{t:g}_reference"]["outputs"][0])
        for n in settings.widths:
            rows.append(_error_row(t, n, torch.tensor(found[f"bounded_{t:g}_N{n}"]["outputs"]), limit))
    return rows


def _error_row(temperature: float, width: int, h: Tensor, limit: Tensor) -> dict[str, Any]:
    """Squared L2 error of single networks to the limit, of the merge of all, and N times the single one.

    h: [M, n]; limit: [n]. The limit is a network of finitely many neurons after the same number of steps; its own error
    is part of what is shown, a share of about N over its width.
    """
    single, error = mean_and_error(squared_l2(h, limit))
    return {
        "temperature": temperature,
        "N": width,
        "error": single,
        "standard_error": error,
        "N_times_error": width * single,
        "N_times_standard_error": width * error,
        "merged_error": squared_l2(h.mean(0), limit).item(),
        "M": len(h),
    }


@styled
def _draw(folder: Folder, settings: Poc, results: dict[str, Rows]) -> None:
    figure, axes = new_figure(10.0, 7.6, 2, 2)
    _draw_gap(axes[0], settings.closed_form, results["poc_gap"])
    _draw_law(axes[1], settings.chain, results["poc_law"])
    _draw_ensemble(axes[2], settings.chain, results["poc_ensemble"])
    _draw_bounded(axes[3], settings.bounded, results["poc_bounded"])
    chain, bounded = settings.chain, settings.bounded
    save_figure(
        figure,
        folder.out,
        "poc",
        f"seed {settings.seed}; linear: {chain.networks} networks, d {chain.dim}, {chain.samples} samples, λ "
        f"{chain.temperature:g}, λ' {chain.regularization:g}, η {chain.lr:g}, {chain.early_steps} and {chain.steps} "
        f"steps, start from N(0, {chain.initial_std:g}²)\ntanh: {bounded.networks} networks; limit: "
        f"{bounded.reference_width:,} neurons after as many steps\nsines: "
        f"{trained_as(bounded.sines)}",
    )


def _draw_gap(axis: Any, grid: ClosedForm, rows: Rows) -> None:
    dim = grid.dims[-1]
    for colour, temperature in zip(COLOURS, grid.temperatures, strict=False):
        mine = [row for row in rows if row["temperature"] == temperature and row["d"] == dim]
        for key, style, label in (
            ("bound", "--", "bound"),
            ("gap", "-", "gap"),
            ("temperature_times_kl_over_N", ":", "λ KL/N"),
        ):
            axis.plot(
                [row["N"] for row in mine],
                [row[key] for row in mine],
                style,
                color=colour,
                label=f"{label}, λ = {power(temperature)}" if key == "gap" else None,
            )
    axis.plot([], [], "k--", label="bound E Var(h)/(2N)")
    axis.plot([], [], "k:", label="(λ/N) KL")
    log_axes(axis)
    axis.set(xlabel="N", ylabel="objective gap")
    axis.set_title(f"Linear neurons, closed form (d = {dim}): gap and bound")
    axis.legend(loc="lower left")


def _draw_law(axis: Any, chain: Chain, rows: Rows) -> None:
    late = [row for row in rows if row["time"] == "late"]
    for colour, k in zip(COLOURS, (0, chain.dim - 1), strict=False):
        mine = [row for row in late if row["direction"] == k]
        width = [row["N"] for row in mine]
        axis.plot(width, [-row["correlation_law"] for row in mine], color=colour)
        axis.errorbar(
            width,
            [-row["correlation"] for row in mine],
            [2 * row["correlation_standard_error"] for row in mine],
            fmt="o",
            color=colour,
            capsize=2,
            label=f"direction of Σ's {'smallest' if k == 0 else 'largest'} eigenvalue",
        )
    worst = max(abs(row[f"{what}_z"]) for row in rows for what in ("mean", "along", "across"))
    log_axes(axis, chain.widths)
    axis.set(xlabel="N", ylabel="−correlation of two neurons")
    axis.set_title(f"Linear neurons, simulated: law (lines) and chain\nlargest of {3 * len(rows)} |z|: {worst:.1f}")
    axis.legend(title="bars: 2 standard errors")


def _draw_ensemble(axis: Any, chain: Chain, rows: Rows) -> None:
    labels = {
        ("early", "prediction"): f"prediction, {chain.early_steps} steps",
        ("late", "prediction"): f"prediction, {chain.steps} steps",
        ("late", "spread"): f"spread of neurons, {chain.steps} steps",
    }
    for colour, (key, label) in zip(COLOURS, labels.items(), strict=False):
        mine = [row for row in rows if (row["time"], row["quantity"]) == key]
        members = [row["M"] for row in mine]
        axis.plot(members, [row["known"] for row in mine], color=colour)
        axis.errorbar(
            members,
            [row["error"] for row in mine],
            [2 * row["standard_error"] for row in mine],
            fmt="o",
            color=colour,
            capsize=2,
            label=label,
        )
        if mine[0]["known_floor"] > 1e-3 * mine[-1]["known"]:
            axis.axhline(mine[0]["known_floor"], color=colour, lw=0.8, ls="--")
    log_axes(axis, chain.members)
    axis.set(xlabel="M, networks merged", ylabel="squared error to the limit")
    axis.set_title(f"Linear neurons, N = {chain.ensemble_width}: known (lines), measured, floor (dashed)")
    axis.legend()


def _draw_bounded(axis: Any, bounded: Bounded, rows: Rows) -> None:
    for colour, temperature in zip(COLOURS, bounded.temperatures, strict=False):
        mine = [row for row in rows if row["temperature"] == temperature]
        axis.errorbar(
            [row["N"] for row in mine],
            [row["N_times_error"] for row in mine],
            [2 * row["N_times_standard_error"] for row in mine],
            fmt="o-",
            color=colour,
            capsize=2,
            label=f"λ = {power(temperature)}",
        )
    axis.set_yscale("log")
    axis.set_ylim(top=6 * axis.get_ylim()[1])  # room for the legend
    log_axes(axis, bounded.widths)
    axis.set(xlabel="N", ylabel="N × squared error to the limit")
    axis.set_title("Tanh neurons: the constant of the 1/N rate")
    axis.legend(loc="upper right", ncols=3)
