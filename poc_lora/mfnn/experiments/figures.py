"""How figures and CSV files of the experiments are made: one style, a footer that says what is shown, atomic files."""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from poc_lora import __version__, plotting
from poc_lora.files import write_atomic
from poc_lora.mfnn.experiments.settings import DoubleCircle, MultiIndex, Sines, Started, Training
from poc_lora.plotting import SERIES

COLOURS = (*SERIES[:-1], plotting.COLOURS["ink"])  # in order of temperature or size
styled = plotting.style(math=True)


def save_figure(figure: Figure, folder: Path, name: str, footer: str) -> None:
    """Write NAME.png and NAME.svg with a footer of settings and version."""
    text = f"poc_lora {__version__}; {footer}"
    room = (0.1 + 0.13 * len(text.splitlines())) / figure.get_figheight()
    figure.set_layout_engine(ConstrainedLayoutEngine(rect=(0, room, 1, 1 - room)))
    figure.text(0.01, 0.008, text, fontsize=6.5, color="#555555", va="bottom")
    write_atomic(folder / f"{name}.png", plotting.render(figure, "png", dpi=110, math=True))
    write_atomic(folder / f"{name}.svg", plotting.render(figure, "svg", math=True))


def trained_as(section: Training) -> str:
    """How networks were trained, for a footer: all of the section but the temperature, which the figure shows."""
    shape = ""
    if isinstance(section, MultiIndex):
        shape = f"d {section.dim}, k {section.directions}, R̄ {section.scale:g}, r {section.radius:g}, "
    elif isinstance(section, Sines):
        shape = f"d {section.dim}, {section.directions} directions, noise {section.noise:g}, "
    elif isinstance(section, DoubleCircle):
        shape = f"noise {section.noise:g}, "
    start = f" from N(0, {section.initial_std:g}²)" if isinstance(section, Started) else ""
    batches = f"batches of {section.batch_size}" if section.batch_size else "all samples a step"
    return (
        f"{shape}{section.samples} samples, {type(section.neuron(1)).__name__} neurons{start}, R "
        f"{section.bound:g}, η {section.lr:g}, λ' {section.regularization:g}, {section.epochs} epochs, {batches}"
    )


def new_figure(width: float, height: float, columns: int, rows: int = 1) -> tuple[Figure, list[Any]]:
    """A figure of `width` × `height` inches with a row-major list of axes."""
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine())  # colour bars need to know it
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.grid(True, axis="both")
    return figure, axes


def log_axes(axis: Any, at: Sequence[int] | None = None) -> None:
    """Logarithmic axes with plain numbers: at the values `at` of x, and at 1, 2 and 5 times powers of ten of y."""
    axis.set(xscale="log", yscale="log")
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    if at is not None:
        axis.set_xticks(list(at), [str(value) for value in at])
        axis.xaxis.set_minor_locator(NullLocator())
    else:
        axis.xaxis.set_major_formatter(plain)
    low, high = axis.get_ylim()
    if high < 1000 * low:  # of a few decades, so that the ticks at powers of ten alone would be too few
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 4, 5, 6, 8)))
        axis.yaxis.set_major_formatter(plain)
        axis.yaxis.set_minor_formatter(NullFormatter())


def save_csv(folder: Path, name: str, rows: Sequence[dict[str, Any]]) -> Path:
    """Write NAME.csv with the rows' keys as its header; numbers with six significant digits, NaN as nothing."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: _number(v) if isinstance(v, float) else v for k, v in row.items()})
    path = folder / f"{name}.csv"
    write_atomic(path, text.getvalue())
    return path


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6g}"


def power(value: float) -> str:
    """A temperature as mathematics where it is a power of ten, 10⁻² for 0.01, and plain where it is not."""
    exponent = round(math.log10(value)) if value > 0 else 0
    return f"$10^{{{exponent}}}$" if math.isclose(value, 10.0**exponent) else f"{value:g}"
