"""How every figure and CSV file of the experiments is made: one style, a footer that says what it shows, atomic files."""

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from poc_lora import __version__
from poc_lora.files import write_atomic

# Told apart also by those who see few colours; in order of temperature or size.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "svg.hashsalt": "poc_lora",  # the same figure is the same bytes
    "svg.fonttype": "none",
}


def save_figure(figure: Figure, folder: Path, name: str, footer: str) -> list[Path]:
    """Write NAME.png and NAME.svg with a footer of settings and version."""
    figure.text(0.01, 0.008, f"poc_lora {__version__}; {footer}", fontsize=6.5, color="#555555", va="bottom")
    paths = []
    with matplotlib.rc_context(STYLE):
        FigureCanvasAgg(figure)
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, dpi=110, metadata=metadata)
            paths.append(folder / f"{name}.{kind}")
            write_atomic(paths[-1], buffer.getvalue())
    return paths


def new_figure(width: float, height: float, columns: int, rows: int = 1) -> tuple[Figure, list[Any]]:
    """A figure of `width` × `height` inches with a row-major list of axes, and room for the footer."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.get_layout_engine().set(rect=(0, 0.05, 1, 0.95))  # type: ignore[union-attr]
        axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.flat)


def save_csv(folder: Path, name: str, rows: Sequence[dict[str, Any]]) -> Path:
    """Write NAME.csv with the rows' keys as its header; numbers with six significant digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    path = folder / f"{name}.csv"
    write_atomic(path, text.getvalue())
    return path


def power(value: float) -> str:
    """A temperature as mathematics: 0.01 as 10⁻², 0.03 as 0.03."""
    match = re.fullmatch(r"1e([+-])0*(\d+)", f"{value:.0e}") if f"{value:.0e}".startswith("1e") else None
    if match is None or abs(float(f"{value:.0e}") - value) > 1e-12 * value:
        return f"{value:g}"
    sign = "-" if match[1] == "-" else ""
    return f"$10^{{{sign}{match[2]}}}$"
