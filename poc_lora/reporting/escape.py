"""Makes text from files safe to show, and writes Markdown tables. In HTML, jinja's autoescape does the rest."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from poc_lora.errors import visible


def short(text: str, longest: int = 120) -> str:
    """Returns the text on one line, without invisible characters, and at most `longest` characters long."""
    shown = visible(text[: longest + 1])
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"


def markdown(text: Any) -> str:
    """Escapes the markup of Markdown and HTML. `markdown_table` escapes the bars."""
    return re.sub(r"([\\`*_{}\[\]<>#~!&])", r"\\\1", visible(str(text)))


def code(text: Any) -> str:
    """Returns the text as inline code, with a question mark for every character that might end it."""
    return "`" + re.sub(r"[^\w .,:;@/+=()-]", "?", str(text))[:200] + "`"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = True) -> list[str]:
    """Returns the lines of a Markdown table.

    Args:
        head: The titles of the columns.
        rows: The cells, in Markdown.
        numbers: Whether all columns but the first are aligned to the right.
    """
    rule = ["---", *["---:" if numbers else "---"] * (len(head) - 1)]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (head, rule, *rows)]
