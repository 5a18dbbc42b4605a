"""How long the texts of rows and questions may be: a tokenizer takes time and memory for parts that are cut off too."""

from poc_lora.errors import DataError

MAX_TEXT = 2**22  # characters; a long novel has half as many
MAX_LABELS = 1000  # of a question
MAX_LABELS_LENGTH = 2**16  # characters of all of them


def require_length(text: str, where: str) -> None:
    """Raise DataError for a text of more than `MAX_TEXT` characters."""
    if len(text) > MAX_TEXT:
        what = f"a text of {len(text):,} characters; {MAX_TEXT:,} are the most that is read"
        raise DataError(what, where=where, fix="split it into several rows")


def require_characters(text: str, where: str) -> None:
    """Raise DataError for half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as problem:
        raise DataError("the text holds half of a surrogate pair, which is no character", where=where) from problem
