"""The plotting style that reports and experiments share, and figures as reproducible SVG and PNG."""

import contextlib
import io
from collections.abc import Iterator
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.figure import Figure

# Colours by role. They keep their contrast on white, and on the dark page of a report, which inverts them.
COLOURS = {
    "ink": "#1b2027",
    "muted": "#55606d",
    "rule": "#d3d9e0",  # axes and grids
    "merge": "#0a58a8",
    "best": "#a64b00",
    "ensemble": "#17753a",
    "violet": "#7a45d0",
    "pink": "#b82f83",
    "teal": "#0b727c",
    "base": "#6b4f3a",
    "adapter": "#7d8896",
}
# For the lines of one legend.
SERIES = tuple(COLOURS[role] for role in ("merge", "best", "ensemble", "violet", "pink", "teal", "base"))
MARKERS = "osD^vP"

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "poc_lora",  # the same figure has the same bytes
    "svg.image_inline": True,
    "font.size": 9,
    "axes.titlesize": 9.5,
    "text.color": COLOURS["ink"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.titlecolor": COLOURS["ink"],
    "axes.titlelocation": "left",
    "axes.edgecolor": COLOURS["rule"],
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": COLOURS["rule"],
    "grid.linewidth": 0.6,
    "xtick.color": COLOURS["rule"],
    "ytick.color": COLOURS["rule"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["muted"],
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "xtick.major.size": 3,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 1.8,
    "legend.borderaxespad": 0,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "figure.facecolor": "none",
}


@contextlib.contextmanager
def style(*, math: bool = False) -> Iterator[None]:
    """Apply the style in place of the user's matplotlib settings, as a context manager or a decorator.

    Args:
        math: Typeset text between dollar signs. Off by default: a name with a dollar sign is a name.
    """
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE | {"text.parse_math": math})
        yield


def render(
    figure: Figure,
    kind: Literal["svg", "png"],
    *,
    title: str | None = None,
    background: str = "white",
    dpi: int = 200,
    math: bool = False,
) -> bytes:
    """Returns the figure as an image file, the same bytes every time.

    Args:
        figure: A figure made within `style`.
        kind: The format.
        title: The title element of an SVG.
        background: A colour, or "none".
        dpi: Dots per inch of a PNG.
        math: As in `style`.
    """
    # No date, no version of matplotlib.
    metadata: dict[str, Any] = {"Software": None}
    if kind == "svg":
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        if title is not None:
            metadata["Title"] = title
    file = io.BytesIO()
    with style(math=math):
        figure.savefig(file, format=kind, dpi=dpi, facecolor=background, metadata=metadata)
    return file.getvalue()
