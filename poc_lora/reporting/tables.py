"""One model of a table, shown in a terminal, in Markdown and by the template of the report."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import rich.table
from rich import box
from rich.text import Text

from poc_lora.artifacts.results import Estimate
from poc_lora.artifacts.task_scores import Score
from poc_lora.errors import visible
from poc_lora.reporting.escape import markdown

Value = str | int | Estimate | Score


@dataclass(frozen=True)
class Table:
    """A table whose first column names the rows.

    Attributes:
        caption: What the table shows.
        columns: Their titles.
        rows: The values: texts, counts, accuracies with their standard errors, which are shown in percent, and scores
            with theirs, which are shown as they are.
        strong: The names of the rows to highlight.
        bold: The cells to set in bold, by the name of the row and the title of the column.
        note: How to read it, below it in the report.
        texts: The titles of the columns of texts, which are aligned to the left as the first column is.
        folded: Whether the report hides the table until it is opened.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Value]]
    strong: Sequence[str] = ()
    bold: Collection[tuple[Value, str]] = ()
    note: str = ""
    texts: Sequence[str] = ()
    folded: bool = False

    @property
    def left(self) -> list[bool]:
        """For each column, whether it is aligned to the left."""
        return [i == 0 or title in self.texts for i, title in enumerate(self.columns)]


def shown(value: Value) -> tuple[str, str]:
    """Returns a value as text, and its standard error, if any. Errors of ten points or more have one decimal."""
    if isinstance(value, Estimate):
        error = "" if math.isnan(value.error) else percent(value.error, 1 if value.error >= 0.1 else 2)
        return percent(value.value), error
    if isinstance(value, Score):
        return _digits(value.value, 4), "" if math.isnan(value.error) else _digits(value.error, 2)
    return (f"{value:,}" if isinstance(value, int) else visible(value)), ""


def percent(share: float, digits: int = 2) -> str:
    return f"{100 * share:.{digits}f}"


def _digits(value: float, digits: int) -> str:
    return "not a number" if math.isnan(value) else f"{value:.{digits}g}"


def terminal_table(table: Table, narrow: Mapping[str, str] | None = None) -> rich.table.Table:
    """Returns the table for a terminal, with standard errors below their values.

    `narrow` maps titles to shorter ones or to ones on several lines, so that 80 columns are enough.
    """
    made = rich.table.Table(title=table.caption, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    titles = [(narrow or {}).get(title, title) for title in table.columns]
    lines = max(title.count("\n") for title in titles)
    wraps = table.texts[-1] if table.texts else table.columns[0]
    for title, name, left in zip(table.columns, titles, table.left, strict=True):
        low = "\n" * (lines - name.count("\n")) + name
        made.add_column(low, justify="left" if left else "right", no_wrap=title != wraps, overflow="fold")
    for row in table.rows:
        bold = [row[0] in table.strong, *((row[0], title) in table.bold for title in table.columns[1:])]
        cells = (Text(_joined(value, "\n±"), "bold" if b else "") for value, b in zip(row, bold, strict=True))
        made.add_row(*cells)
    return made


def markdown_table(table: Table, text: Callable[[str], str] = markdown) -> list[str]:
    """Returns the lines of the table in Markdown, without its caption; `text` turns texts into Markdown."""
    rule = ["---" if left else "---:" for left in table.left]
    rows = [
        [
            f"**{cell}**" if (row[0], title) in table.bold else cell
            for title, cell in zip(
                table.columns, (text(v) if isinstance(v, str) else _joined(v, " ± ") for v in row), strict=True
            )
        ]
        for row in table.rows
    ]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (table.columns, rule, *rows)]


def _joined(value: Value, separator: str) -> str:
    text, error = shown(value)
    return text + (separator + error if error else "")
