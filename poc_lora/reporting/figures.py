"""The figures of the report: plain values in, a matplotlib figure out. All are drawn for the width of a phone."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from poc_lora.reporting.blocks import short
from poc_lora.reporting.palette import LIGHT, SERIES
from poc_lora.reporting.svg import drawing

WIDTH = 4.1  # inches
POINTS = 120  # of a curve; more are averaged in groups
DRAWN = 64  # single curves; of more adapters only the mean is drawn as well
MARKERS = "osD^vP"
WRITTEN_CELLS = 10  # a heatmap of more has a key instead of numbers
BLUES = LinearSegmentedColormap.from_list("blues", ["#f2f6fb", "#9cc3e6", "#3a83c0", "#0a3f7a"])

Curve = Sequence[tuple[float, float]]


def averages_figure(rows: Sequence[tuple[str, str, Sequence[tuple[float, float]]]], chance: float | None) -> Figure:
    """Average accuracies in percent: for each row its name, role and (value, standard error) of all in it."""
    with drawing():
        figure, axes = _figure(0.75 + 0.36 * len(rows))
        axes.grid(True, axis="x")
        axes.grid(False, axis="y")
        for y, (_, role, things) in enumerate(reversed(rows)):
            colour = LIGHT[role]
            single = len(things) == 1
            for i, (value, error) in enumerate(things):
                offset = 0.0 if single else 0.12 * (i % 3 - 1)  # dots of one row do not hide each other
                if single and not math.isnan(error):
                    axes.errorbar(value, y, xerr=error, color=colour, capsize=3, linewidth=1.4)
                axes.plot(value, y + offset, "o", color=colour, markersize=6 if single else 4)
                if single:
                    axes.annotate(f"{value:.2f}", (value, y), (0, 6), textcoords="offset points", ha="center", size=8)
        if chance is not None and chance > min(v for _, _, things in rows for v, _ in things) - 15:
            axes.axvline(chance, color=LIGHT["muted"], linewidth=1, linestyle=":")
        axes.set_yticks(range(len(rows)), [name for name, _, _ in reversed(rows)])
        axes.tick_params(axis="y", labelcolor=LIGHT["ink"])
        axes.set_ylim(-0.5, len(rows) - 0.25)
        axes.margins(x=0.12)
        axes.set_xlabel("average accuracy (%)")
        return figure


def curves_figure(
    curves: Mapping[str, Curve],
    *,
    label: str,
    log: bool = False,
    limit: tuple[str, float] | None = None,
    single: str = "each adapter",
) -> Figure:
    """One thin line per adapter and their mean, against the step; `limit` is a dashed line with its name."""
    thin = {name: _grouped(curve) for name, curve in curves.items()}
    with drawing():
        figure, axes = _figure(2.9)
        for i, curve in enumerate(list(thin.values())[:DRAWN]):
            axes.plot(*_xy(curve), color=LIGHT["adapter"], linewidth=0.7, label=None if i else single)
        if len(thin) > 1:
            axes.plot(*_xy(_grouped(mean_curve(curves))), color=LIGHT["merge"], linewidth=2, label="their mean")
        if limit is not None:
            axes.axhline(limit[1], color=LIGHT["best"], linestyle=(0, (4, 3)), linewidth=1.2, label=limit[0])
        _value_axis(axes, log)
        _step_axis(axes)
        axes.set_ylabel(label)
        _legend(figure, axes)
        return figure


def validation_figure(base: Curve, adapters: Mapping[str, Curve], merges: Mapping[str, Curve]) -> Figure:
    """The validation loss of the base, of each adapter and of the running merge, against the step."""
    with drawing():
        figure, axes = _figure(2.9)
        for i, curve in enumerate(list(adapters.values())[:DRAWN]):
            axes.plot(*_xy(curve), ".-", color=LIGHT["adapter"], linewidth=0.7, label=None if i else "each adapter")
        for i, (name, curve) in enumerate(merges.items()):
            axes.plot(*_xy(curve), marker=MARKERS[i % 6], color=LIGHT["merge"], linewidth=2, label=name)
        if base:
            axes.plot(
                *_xy(base), color=LIGHT["base"], linestyle=(0, (4, 3)), marker="" if base[1:] else "_", label="base"
            )
        values = [y for curve in (base, *adapters.values(), *merges.values()) for _, y in curve]
        _value_axis(axes, log=spans_decades(values))
        _step_axis(axes)
        axes.set_ylabel("validation loss")
        _legend(figure, axes)
        return figure


def heatmap_figure(cosines: Sequence[Sequence[float]], names: Sequence[str]) -> Figure:
    """Pairwise cosines on a fixed scale from 0, or from -1 where one is below -0.05, to 1."""
    values = np.array(cosines)
    M = len(values)
    low = -1.0 if values.min() < -0.05 else 0.0
    with drawing():
        written = M <= WRITTEN_CELLS
        figure = Figure(figsize=(WIDTH, 3.7 if written else 4.3), layout="constrained")
        grid = figure.add_gridspec(2, 1, height_ratios=[1, 0.05]) if not written else figure.add_gridspec(1, 1)
        axes = figure.add_subplot(grid[0])
        axes.grid(False)
        axes.pcolormesh(values, cmap=BLUES, vmin=low, vmax=1, edgecolors=LIGHT["rule"], linewidth=0.4)
        axes.set_aspect("equal")
        axes.invert_yaxis()
        shown = range(0, M, math.ceil(M / 16))
        ticks = [i + 0.5 for i in shown]
        axes.set_xticks(ticks, [names[i] for i in shown], rotation=90 if max(map(len, names)) > 3 else 0)
        axes.set_yticks(ticks, [names[i] for i in shown])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        for (i, j), value in np.ndenumerate(values) if written else ():
            colour = cell_ink(to_hex(BLUES((value - low) / (1 - low))))
            axes.text(j + 0.5, i + 0.5, f"{value:.2f}", ha="center", va="center", size=8, color=colour)
        if not written:
            key = figure.add_subplot(grid[1])
            steps = np.linspace(low, 1, 11)
            key.pcolormesh(steps[None], cmap=BLUES, vmin=low, vmax=1)
            key.set_xticks(np.arange(11) + 0.5, [f"{x:g}" for x in steps.round(1)])
            key.set_yticks([])
            key.grid(False)
        return figure


def cell_ink(background: str) -> str:
    """Black or white, whichever reads better on a cell of the heatmap; neither is a role of the palette."""
    return max(("#010101", "#fefefe"), key=lambda colour: contrast(colour, background))


def effective_rank_figure(modules: Mapping[str, float]) -> Figure:
    """The effective rank of the merge by layer, a line per type of module."""
    types: dict[str, list[tuple[float, float]]] = {}
    for i, (name, value) in enumerate(modules.items()):
        layer = re.search(r"\.(\d+)\.", name)
        types.setdefault(name.rpartition(".")[2], []).append((int(layer[1][:6]) if layer else i, value))
    with drawing():
        figure, axes = _figure(2.9)
        for i, (kind, points) in enumerate(types.items()):
            axes.plot(*_xy(sorted(points)), label=short(kind, 24), **_series(i))
        axes.set_ylim(bottom=0)
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.set_ylabel("effective rank")
        _legend(figure, axes)
        return figure


def rank_sweep_figure(sweep: Mapping[str, Mapping[int, float]]) -> Figure:
    """Relative error and retained energy against rank, for all modules and by type.

    sweep: from `all` and every type of module to {rank: relative error e}; the energy retained is 1 − e², the share
    of ‖ΔW‖².
    """
    curves = {kind: sorted(errors.items()) for kind, errors in sweep.items()}
    ranks = sorted({rank for points in curves.values() for rank, _ in points})
    with drawing():
        figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
        errors, energies = figure.subplots(2, 1, sharex=True)
        for i, (kind, points) in enumerate(curves.items()):
            look = _series(i - 1) if kind != "all" else {"color": LIGHT["ink"], "linewidth": 2.4, "zorder": 3}
            errors.plot([r for r, _ in points], [e for _, e in points], label=short(kind, 24), **look)
            energies.plot([r for r, _ in points], [100 * (1 - e**2) for _, e in points], **look)
        errors.set_ylabel("relative error")
        energies.set_ylabel("energy retained (%)")
        errors.set_ylim(bottom=0)
        energies.set_ylim(top=101)
        energies.set_xscale("log", base=2)
        shown = ranks[:: max(1, math.ceil(len(ranks) / 8))]
        energies.set_xticks(shown, [str(r) for r in shown])
        energies.minorticks_off()
        energies.set_xlabel("rank")
        _legend(figure, errors)
        return figure


def subsets_figure(points: Sequence[tuple[int, float, float]], best: float) -> Figure:
    """Average accuracy (%) against m, the number of adapters merged: (m, mean over subsets, its error)."""
    with drawing():
        figure, axes = _figure(2.7)
        m, values, errors = zip(*points, strict=True)
        axes.errorbar(m, values, yerr=errors, marker="o", color=LIGHT["merge"], capsize=2.5, label="merge of m")
        axes.axhline(best, color=LIGHT["best"], linestyle=(0, (4, 3)), linewidth=1.2, label="LoRA (best)")
        _adapters_axis(axes, m)
        axes.set_ylabel("average accuracy (%)")
        _legend(figure, axes)
        return figure


def distance_figure(points: Sequence[tuple[int, float]], law: tuple[float, float, int] | None) -> Figure:
    """Squared distance of label logits from the merge of all against m; law: c, floor, M of c (1/m − 1/M) + floor."""
    with drawing():
        figure, axes = _figure(2.7)
        axes.plot(*_xy(points), "o", color=LIGHT["merge"], label="measured")
        if law is not None:
            c, floor, M = law
            x = np.geomspace(points[0][0], points[-1][0], 50)
            axes.plot(x, c * (1 / x - 1 / M) + floor, color=LIGHT["ensemble"], zorder=1, label="c (1/m − 1/M) + floor")
        axes.set_ylim(bottom=0)
        _adapters_axis(axes, [m for m, _ in points])
        axes.set_ylabel("squared distance")
        _legend(figure, axes)
        return figure


def _adapters_axis(axes: Axes, sizes: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(m) for m in sizes])
    axes.minorticks_off()
    axes.set_xlabel("adapters merged, m")


def temperature_figure(rows: Mapping[str, tuple[str, Sequence[tuple[float, float, float]]]]) -> Figure:
    """Average accuracy (%) against λ: for each row of the table its role and (λ, value, error), ordered by λ."""
    levels = sorted({level for _, points in rows.values() for level, _, _ in points})
    places = {level: place for place, level in enumerate(levels)}
    with drawing():
        figure, axes = _figure(3.2)
        for i, (name, (role, points)) in enumerate(rows.items()):
            x = [places[level] + 0.05 * (i - (len(rows) - 1) / 2) for level, _, _ in points]
            y, errors = [v for _, v, _ in points], [0 if math.isnan(e) else e for _, _, e in points]
            style: dict[str, Any] = {"color": LIGHT[role], "marker": MARKERS[i % 6], "capsize": 2.5}
            axes.errorbar(x, y, yerr=errors, label=name, elinewidth=1, **style)
        axes.set_xticks(range(len(levels)), [f"{level:g}" for level in levels])
        axes.set_xlim(-0.4, len(levels) - 0.6)
        axes.set_xlabel("temperature λ (even steps, not to scale)")
        axes.set_ylabel("average accuracy (%)")
        _legend(figure, axes)
        return figure


def mean_curve(curves: Mapping[str, Curve]) -> list[tuple[float, float]]:
    """The mean over curves at every step where there is one."""
    by_step: dict[float, list[float]] = {}
    for curve in curves.values():
        for step, value in curve:
            by_step.setdefault(step, []).append(value)
    return [(step, math.fsum(values) / len(values)) for step, values in sorted(by_step.items())]


def spans_decades(values: Sequence[float]) -> bool:
    """Whether values are better told apart on a logarithmic axis."""
    return bool(values) and min(values) > 0 and max(values) > 20 * min(values)


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours #rrggbb, 1 to 21 (WCAG 2.2)."""

    def luminance(colour: str) -> float:
        parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _series(i: int) -> dict[str, Any]:
    dashes = "-" if i < len(SERIES) else (0, (4, 2))
    return {"color": LIGHT[SERIES[i % len(SERIES)]], "marker": MARKERS[i % 6], "linestyle": dashes, "linewidth": 1.2}


def _xy(curve: Curve) -> tuple[list[float], list[float]]:
    return [x for x, _ in curve], [y for _, y in curve]


def _grouped(curve: Curve) -> list[tuple[float, float]]:
    """At most POINTS points, each the mean of neighbours."""
    size = math.ceil(len(curve) / POINTS)
    groups = [curve[i : i + size] for i in range(0, len(curve), size)] if size > 1 else [[point] for point in curve]
    return [(sum(x for x, _ in g) / len(g), math.fsum(y for _, y in g) / len(g)) for g in groups]


def _value_axis(axes: Axes, log: bool) -> None:
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: "")


def _step_axis(axes: Axes) -> None:
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")


def _legend(figure: Figure, axes: Axes) -> None:
    """Above the axes, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=min(len(labels), 3), columnspacing=1.2)
