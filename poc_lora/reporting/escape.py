"""Texts from files as they can stand in Markdown: as themselves, and as nothing else."""

import re
from typing import Any

LONGEST = 200


def plain(value: Any) -> str:
    """A text without what Markdown or HTML take for markup; other characters are question marks."""
    return re.sub(r"[^\w .,:;@/+=()-]", "?", str(value))[:LONGEST]


def code(value: Any) -> str:
    """A text as inline code that ends neither the code nor a cell of a table."""
    return f"`{plain(value)}`"


def escaped(text: str) -> str:
    """A sentence that holds texts from files, on one line and with its markup escaped, but for the bars of tables."""
    seen = "".join(c if c.isprintable() else "?" for c in text)
    return re.sub(r"([\\`*_{}\[\]<>#~!&])", r"\\\1", seen)
