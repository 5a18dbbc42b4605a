"""The building blocks of the report: sections of text, charts, tables and lists."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field

from matplotlib.figure import Figure

from poc_lora.plotting import render
from poc_lora.reporting.tables import Table


@dataclass(frozen=True)
class Listing:
    """A folded list of names and texts."""

    caption: str
    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Chart:
    """A figure as a data URL; `description` is its text alternative, `caption` the text below it."""

    title: str
    image: str
    description: str
    caption: str


@dataclass
class Section:
    """A section of the report; `omitted` says which contents are left out, and why."""

    key: str
    title: str
    paragraphs: list[str] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    listings: list[Listing] = field(default_factory=list)
    omitted: list[str] = field(default_factory=list)


def chart(figure: Figure, title: str, description: str, caption: str) -> Chart:
    """Draws a figure on a transparent background, for `Chart`."""
    svg = base64.b64encode(render(figure, "svg", title=title, background="none")).decode()
    return Chart(title, f"data:image/svg+xml;base64,{svg}", description, caption)
