"""Makes text from files safe to show. In HTML, jinja's autoescape does the rest."""

import re
from typing import Any

from poc_lora.errors import visible


def short(text: str, longest: int = 120) -> str:
    """Returns the text on one line, without invisible characters, and at most `longest` characters long."""
    shown = visible(text[: longest + 1])
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"


def markdown(text: Any) -> str:
    """Escapes the markup of Markdown and HTML. `markdown_table` escapes bars."""
    return re.sub(r"([\\`*_{}\[\]<>#~!&])", r"\\\1", visible(str(text)))


def code(text: Any) -> str:
    """Returns the text as inline code, with a question mark for every character that might end it."""
    return "`" + re.sub(r"[^\w .,:;@/+=()-]", "?", str(text))[:200] + "`"
