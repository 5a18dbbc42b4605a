"""What the page is made of: parts of words, charts and tables."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup
from matplotlib.figure import Figure

from poc_lora.artifacts.results import Estimate
from poc_lora.reporting.svg import inline_svg


@dataclass(frozen=True)
class Cell:
    """A value and, in smaller type, its error."""

    text: str
    error: str = ""


@dataclass(frozen=True)
class Table:
    """The first column is the row's name; `strong` are the rows that stand out; `folded` opens at a click."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    strong: Sequence[str] = ()
    folded: bool = False
    facts: bool = False  # folded as well: one value a row, which is text, not a figure


@dataclass(frozen=True)
class Chart:
    title: str
    svg: Markup
    caption: str


@dataclass
class Part:
    """A section of the page; `missing` says of what is left out why."""

    key: str
    title: str
    words: list[str] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def accuracy(estimate: Estimate) -> Cell:
    """In percent, with its standard error where there is one."""
    error = "" if math.isnan(estimate.error) else f"{100 * estimate.error:.2f}"
    return Cell(f"{100 * estimate.value:.2f}", error)


def percent(share: float, digits: int = 2) -> str:
    return f"{100 * share:.{digits}f}"


def chart(figure: Figure, name: str, title: str, description: str, caption: str) -> Chart:
    """A figure with what a screen reader says of it, and what stands below it."""
    return Chart(title, inline_svg(figure, name=name, title=title, description=description), caption)


def visible(text: str) -> str:
    """A text with escapes for what cannot be seen: control characters, and those that turn text around."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def short(text: str, longest: int = 120) -> str:
    """A text from a file as it can stand in a sentence or a figure: on one line, nothing invisible, not too long."""
    shown = visible(text[: longest + 1])
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"
