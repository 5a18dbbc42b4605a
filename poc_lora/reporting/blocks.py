"""The building blocks of the report: sections of text, charts and tables."""

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from matplotlib.figure import Figure

from poc_lora.artifacts.results import Estimate
from poc_lora.plotting import render


@dataclass(frozen=True)
class Cell:
    """A value with its standard error."""

    text: str
    error: str = ""

    def joined(self, separator: str) -> str:
        """Returns value and error as one text."""
        return self.text + (separator + self.error if self.error else "")


@dataclass(frozen=True)
class Table:
    """A table whose first column names the rows.

    Args:
        caption: What the table shows.
        head: The titles of the columns.
        rows: The cells.
        strong: The names of the rows to highlight.
        folded: Whether the table is hidden until it is opened.
        facts: Whether it is a folded list of names and texts rather than of numbers.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    strong: Sequence[str] = ()
    folded: bool = False
    facts: bool = False


@dataclass(frozen=True)
class Chart:
    """A figure as an image.

    Args:
        title: The heading.
        image: A data URL.
        description: The text alternative.
        caption: The text below.
    """

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
    omitted: list[str] = field(default_factory=list)


def accuracy(estimate: Estimate) -> Cell:
    """Returns an accuracy in percent, with its standard error if it has one."""
    return Cell(percent(estimate.value), "" if math.isnan(estimate.error) else percent(estimate.error))


def percent(share: float, digits: int = 2) -> str:
    return f"{100 * share:.{digits}f}"


def chart(figure: Figure, title: str, description: str, caption: str) -> Chart:
    """Draws a figure on a transparent background, for `Chart`."""
    svg = base64.b64encode(render(figure, "svg", title=title, background="none")).decode()
    return Chart(title, f"data:image/svg+xml;base64,{svg}", description, caption)
