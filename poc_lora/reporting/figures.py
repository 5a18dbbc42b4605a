"""The figures of the report: functions from plain values to a matplotlib figure as wide as a phone."""

import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator

from poc_lora.plotting import COLOURS, MARKERS, SERIES, style
from poc_lora.reporting.escape import short

WIDTH = 4.1  # inches
MAX_POINTS = 120  # per curve; neighbouring points of longer curves are averaged
MAX_CURVES = 64  # single adapters drawn; the mean is over all
MAX_LABELLED = 10  # a larger heatmap has a colour bar instead of numbers
DASHED: dict[str, Any] = {"linestyle": (0, (4, 3)), "linewidth": 1.2}
BLUES = LinearSegmentedColormap.from_list("blues", ["#f4f8fc", "#a9cdea", "#5d9acd"])  # black text reads on each

Curve = Sequence[tuple[float, float]]


@style()
def averages_figure(rows: Sequence[tuple[str, str, Sequence[tuple[float, float]]]], chance: float | None) -> Figure:
    """Draws average accuracies.

    Args:
        rows: For each row from top to bottom its name, its role in `COLOURS` and its variants' accuracies with their
            standard errors, in percent.
        chance: The chance level in percent, a dotted line where it is near the values.
    """
    figure, axes = _figure(0.75 + 0.36 * len(rows))
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")
    for y, (_, role, estimates) in enumerate(reversed(rows)):
        colour = COLOURS[role]
        single = len(estimates) == 1
        for i, (value, error) in enumerate(estimates):
            offset = 0.0 if single else 0.12 * (i % 3 - 1)  # keeps the dots of a row apart
            if single and not math.isnan(error):
                axes.errorbar(value, y, xerr=error, color=colour, capsize=3, linewidth=1.4)
            axes.plot(value, y + offset, "o", color=colour, markersize=6 if single else 4)
            if single:
                axes.annotate(f"{value:.2f}", (value, y), (0, 6), textcoords="offset points", ha="center", size=8)
    if chance is not None and chance > min(v for _, _, estimates in rows for v, _ in estimates) - 15:
        axes.axvline(chance, color=COLOURS["muted"], linewidth=1, linestyle=":")
    names = [textwrap.fill(name.replace(" = ", "\u00a0=\u00a0"), 14) for name, _, _ in reversed(rows)]
    axes.set_yticks(range(len(rows)), names)
    axes.tick_params(axis="y", labelcolor=COLOURS["ink"])
    axes.set_ylim(-0.5, len(rows) - 0.25)
    axes.margins(x=0.12)
    axes.set_xlabel("average accuracy (%)")
    return figure


@style()
def curves_figure(curves: Mapping[str, Curve], *, label: str, limit: tuple[str, float] | None = None) -> Figure:
    """Draws a thin line per adapter and their mean against the step; `limit` is the name and value of a dashed line."""
    thin = {name: _grouped(curve) for name, curve in curves.items()}
    figure, axes = _figure(2.9)
    _each_adapter(axes, thin, "-")
    if len(thin) > 1:
        axes.plot(*_xy(_grouped(mean_curve(curves))), color=COLOURS["merge"], linewidth=2, label="their mean")
    if limit is not None:
        axes.axhline(limit[1], color=COLOURS["best"], label=limit[0], **DASHED)
    _steps_and_values(axes, curves.values(), label)
    _legend(figure, axes)
    return figure


@style()
def validation_figure(base: Curve, adapters: Mapping[str, Curve], merges: Mapping[str, Curve]) -> Figure:
    """Draws the validation loss of the base, of each adapter and of the running merge against the step."""
    figure, axes = _figure(2.9)
    _each_adapter(axes, adapters, ".-")
    for i, (name, curve) in enumerate(merges.items()):
        axes.plot(*_xy(curve), marker=MARKERS[i % 6], color=COLOURS["merge"], linewidth=2, label=name)
    if base:
        axes.plot(*_xy(base), color=COLOURS["base"], marker="" if base[1:] else "_", label="base", **DASHED)
    _steps_and_values(axes, [base, *adapters.values(), *merges.values()], "validation loss")
    _legend(figure, axes)
    return figure


@style()
def heatmap_figure(cosines: Sequence[Sequence[float]], names: Sequence[str]) -> Figure:
    """Draws the pairwise cosines on a scale from 0 to 1, or from -1 if one is below -0.05."""
    values = np.array(cosines)
    M = len(values)
    low = -1.0 if values.min() < -0.05 else 0.0
    labelled = M <= MAX_LABELLED
    figure = Figure(figsize=(WIDTH, 3.7 if labelled else 4.3), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=[1, 0.05]) if not labelled else figure.add_gridspec(1, 1)
    axes = figure.add_subplot(grid[0])
    axes.grid(False)
    axes.pcolormesh(values, cmap=BLUES, vmin=low, vmax=1, edgecolors=COLOURS["rule"], linewidth=0.4)
    axes.set_aspect("equal")
    axes.invert_yaxis()
    shown = range(0, M, math.ceil(M / 16))
    ticks = [i + 0.5 for i in shown]
    axes.set_xticks(ticks, [names[i] for i in shown], rotation=90 if max(map(len, names)) > 3 else 0)
    axes.set_yticks(ticks, [names[i] for i in shown])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for (i, j), value in np.ndenumerate(values) if labelled else ():
        axes.text(j + 0.5, i + 0.5, f"{value:.2f}", ha="center", va="center", size=8, color="black")
    if not labelled:
        key = figure.add_subplot(grid[1])
        steps = np.linspace(low, 1, 11)
        key.pcolormesh(steps[None], cmap=BLUES, vmin=low, vmax=1)
        key.set_xticks(np.arange(11) + 0.5, [f"{x:g}" for x in steps.round(1)])
        key.set_yticks([])
        key.grid(False)
    return figure


@style()
def effective_rank_figure(modules: Mapping[str, float]) -> Figure:
    """Draws the effective rank of the merge by layer, a line per type of module."""
    types: dict[str, list[tuple[float, float]]] = {}
    for i, (name, value) in enumerate(modules.items()):
        layer = re.search(r"\.(\d+)\.", name)
        types.setdefault(name.rpartition(".")[2], []).append((int(layer[1][:6]) if layer else i, value))
    figure, axes = _figure(2.9)
    for i, (kind, points) in enumerate(types.items()):
        axes.plot(*_xy(sorted(points)), label=short(kind, 24), **_series(i))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.set_ylabel("effective rank")
    _legend(figure, axes)
    return figure


@style()
def rank_sweep_figure(sweep: Mapping[str, Mapping[int, float]]) -> Figure:
    """Draws relative error and retained energy against rank.

    Args:
        sweep: The `rank_sweep` of merge.json: for "all" and for every type of module the relative error e by rank.
            The retained energy is 1 − e², the share of ‖ΔW‖².
    """
    curves = {kind: sorted(errors.items()) for kind, errors in sweep.items()}
    ranks = sorted({rank for points in curves.values() for rank, _ in points})
    figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
    errors, energies = figure.subplots(2, 1, sharex=True)
    for i, (kind, points) in enumerate(curves.items()):
        look = _series(i - 1) if kind != "all" else {"color": COLOURS["ink"], "linewidth": 2.4, "zorder": 3}
        errors.plot([r for r, _ in points], [e for _, e in points], label=short(kind, 24), **look)
        energies.plot([r for r, _ in points], [100 * (1 - e**2) for _, e in points], **look)
    errors.set_ylabel("relative error")
    energies.set_ylabel("energy retained (%)")
    errors.set_ylim(bottom=0)
    energies.set_ylim(top=101)
    _doubling_axis(energies, ranks[:: max(1, math.ceil(len(ranks) / 8))], "rank")
    _legend(figure, errors)
    return figure


@style()
def ranks_figure(points: Sequence[tuple[int, float, float, float]], merge: float) -> Figure:
    """Draws (rank, accuracy of the merge truncated to it, bounds of an interval) and the merge's accuracy, in percent.

    The intervals are those of the difference from the merge, put at its accuracy.
    """
    figure, axes = _figure(2.7)
    ranks, values, low, high = zip(*points, strict=True)
    axes.vlines(ranks, low, high, color=COLOURS["merge"], linewidth=1.2)
    axes.plot(ranks, values, marker="o", color=COLOURS["merge"], label="merge, truncated")
    axes.axhline(merge, color=COLOURS["ink"], label="merge", **DASHED)
    _doubling_axis(axes, ranks[:: max(1, math.ceil(len(ranks) / 8))], "rank")
    axes.set_ylabel("average accuracy (%)")
    _legend(figure, axes)
    return figure


@style()
def subsets_figure(points: Sequence[tuple[int, float, float]], best: float | None) -> Figure:
    """Draws (m, mean accuracy of the merges of m adapters, its standard error) and the best adapter, in percent."""
    figure, axes = _figure(2.7)
    m, values, errors = zip(*points, strict=True)
    axes.errorbar(m, values, yerr=errors, marker="o", color=COLOURS["merge"], capsize=2.5, label="merge of m")
    if best is not None:
        axes.axhline(best, color=COLOURS["best"], label="LoRA (best)", **DASHED)
    _doubling_axis(axes, m, "adapters merged, m")
    axes.set_ylabel("average accuracy (%)")
    _legend(figure, axes)
    return figure


@style()
def distance_figure(points: Sequence[tuple[int, float]], law: tuple[float, float, int] | None) -> Figure:
    """Draws (m, squared distance of label logits from the merge of all); `law` is c, floor and M of the fit."""
    figure, axes = _figure(2.7)
    axes.plot(*_xy(points), "o", color=COLOURS["merge"], label="measured")
    if law is not None:
        c, floor, M = law
        x = np.geomspace(points[0][0], points[-1][0], 50)
        axes.plot(x, c * (1 / x - 1 / M) + floor, color=COLOURS["ensemble"], zorder=1, label="c (1/m − 1/M) + floor")
    axes.set_ylim(bottom=0)
    _doubling_axis(axes, [m for m, _ in points], "adapters merged, m")
    axes.set_ylabel("squared distance")
    _legend(figure, axes)
    return figure


@style()
def temperature_figure(rows: Mapping[str, tuple[str, Sequence[tuple[float, float, float]]]]) -> Figure:
    """Draws average accuracy against λ.

    Args:
        rows: For each row of the table its role in `COLOURS` and its (λ, accuracy in percent, standard error).
    """
    levels = sorted({level for _, points in rows.values() for level, _, _ in points})
    places = {level: place for place, level in enumerate(levels)}
    figure, axes = _figure(3.2)
    for i, (name, (role, points)) in enumerate(rows.items()):
        x = [places[level] + 0.05 * (i - (len(rows) - 1) / 2) for level, _, _ in points]
        y, errors = [v for _, v, _ in points], [0 if math.isnan(e) else e for _, _, e in points]
        axes.errorbar(
            x, y, yerr=errors, label=name, elinewidth=1, capsize=2.5, color=COLOURS[role], marker=MARKERS[i % 6]
        )
    axes.set_xticks(range(len(levels)), [f"{level:g}" for level in levels])
    axes.set_xlim(-0.4, len(levels) - 0.6)
    axes.set_xlabel("temperature λ (even steps, not to scale)")
    axes.set_ylabel("average accuracy (%)")
    _legend(figure, axes)
    return figure


@style()
def sweep_figure(points: Mapping[float, Sequence[float]], merge: float | None, *, xlabel: str, ylabel: str) -> Figure:
    """Draws a measure of adapters against a value in which they differ, in even steps, and that of their merge.

    Args:
        points: By value, in order, the measures of its adapters.
        merge: The measure of the merge.
        xlabel, ylabel: The names of the value and the measure.
    """
    figure, axes = _figure(2.9)
    for place, found in enumerate(points.values()):
        label = None if place else "each adapter"
        axes.plot([place] * len(found), found, ".", color=COLOURS["adapter"], label=label, zorder=3)
    means = [math.fsum(found) / len(found) for found in points.values()]
    axes.plot(range(len(points)), means, color=COLOURS["best"], label="mean of a value")
    if merge is not None:
        axes.axhline(merge, color=COLOURS["merge"], label="merge", **DASHED)
    _log_if_decades(axes, [value for found in points.values() for value in found])
    axes.set_xticks(range(len(points)), [f"{value:g}" for value in points], rotation=30 if len(points) > 5 else 0)
    axes.set_xlabel(f"{xlabel} (even steps, not to scale)")
    axes.set_ylabel(ylabel)
    _legend(figure, axes)
    return figure


def mean_curve(curves: Mapping[str, Curve]) -> list[tuple[float, float]]:
    """Returns the mean over the curves that have a value at a step, for every step."""
    by_step: dict[float, list[float]] = {}
    for curve in curves.values():
        for step, value in curve:
            by_step.setdefault(step, []).append(value)
    return [(step, math.fsum(values) / len(values)) for step, values in sorted(by_step.items())]


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _series(i: int) -> dict[str, Any]:
    dashes = "-" if i < len(SERIES) else (0, (4, 2))
    return {"color": SERIES[i % len(SERIES)], "marker": MARKERS[i % 6], "linestyle": dashes, "linewidth": 1.2}


def _xy(curve: Curve) -> tuple[list[float], list[float]]:
    return [x for x, _ in curve], [y for _, y in curve]


def _grouped(curve: Curve) -> list[tuple[float, float]]:
    """Returns at most MAX_POINTS points, each the mean of neighbours."""
    size = math.ceil(len(curve) / MAX_POINTS)
    groups = [curve[i : i + size] for i in range(0, len(curve), size)] if size > 1 else [[point] for point in curve]
    return [(sum(x for x, _ in g) / len(g), math.fsum(y for _, y in g) / len(g)) for g in groups]


def _each_adapter(axes: Axes, curves: Mapping[str, Curve], line: str) -> None:
    for i, curve in enumerate(list(curves.values())[:MAX_CURVES]):
        axes.plot(*_xy(curve), line, color=COLOURS["adapter"], linewidth=0.7, label=None if i else "each adapter")


def _steps_and_values(axes: Axes, curves: Iterable[Curve], label: str) -> None:
    """Labels the axes; that of the values is logarithmic if they span decades."""
    points = [point for curve in curves for point in curve]
    _log_if_decades(axes, [value for _, value in points])
    axes.set_ylabel(label)
    axes.set_xlabel("optimizer step")
    steps = {step for step, _ in points}
    # Around a single step the locator would take fractions.
    axes.xaxis.set_major_locator(FixedLocator(list(steps)) if len(steps) == 1 else MaxNLocator("auto", integer=True))
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")


def _log_if_decades(axes: Axes, values: Sequence[float]) -> None:
    if values and min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: "")


def _doubling_axis(axes: Axes, ticks: Sequence[int], label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(label)


def _legend(figure: Figure, axes: Axes) -> None:
    """Puts the legend above the axes, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=min(len(labels), 3), columnspacing=1.2)
