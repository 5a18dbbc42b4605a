"""Read training rows from files, folders or the Hub. Their columns decide between three formats:

instruction / input / output     the LLM-Adapters and Alpaca format (`answer` and other columns are ignored)
prompt / completion              text that is used as it is
messages                         a chat, rendered by the tokenizer's template; the answer is the last turn
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poc_lora.errors import DataError
from poc_lora.files import read_json, read_text
from poc_lora.hub_ids import is_repo_id

MAX_DATA_BYTES = 4 * 2**30
TRAIN_FILES = ("train.json", "train.jsonl")


@dataclass(frozen=True)
class InstructionRow:
    instruction: str
    input: str
    output: str


@dataclass(frozen=True)
class CompletionRow:
    prompt: str
    completion: str


@dataclass(frozen=True)
class ChatRow:
    messages: tuple[dict[str, str], ...]


Row = InstructionRow | CompletionRow | ChatRow


def source_files(sources: Sequence[str]) -> list[Path]:
    """Returns the local files of the sources; a folder stands for every train.json and train.jsonl inside it.

    Hub ids are skipped.

    Raises:
        DataError: A source does not exist, or a folder has no such file.
    """
    files: list[Path] = []
    for source in sources:
        path = Path(source).expanduser()
        if path.is_dir():
            found = sorted(p for name in TRAIN_FILES for p in path.rglob(name))
            if not found:
                raise DataError(
                    "the folder holds no train.json or train.jsonl", where=path, fix="name the files themselves"
                )
            files += found
        elif path.is_file():
            files.append(path)
        elif not is_repo_id(source) or source.endswith((".json", ".jsonl")):
            raise DataError("no such file or folder", where=source, fix="check data.train")
    return files


def read_sources(sources: Sequence[str]) -> list[Row]:
    """Read the rows of files, folders and Hub ids, in this order: local ones first. Raises DataError."""
    rows: list[Row] = []
    for path in source_files(sources):
        rows += read_file(path)
    for source in sources:
        if not Path(source).expanduser().exists():
            rows += _read_hub(source)
    return rows


def read_file(path: Path) -> list[Row]:
    """Read the rows of a .json file (a list) or .jsonl file (one object a line). Raises DataError."""
    raw = (
        list(_json_lines(path))
        if path.suffix == ".jsonl"
        else read_json(path, error=DataError, max_bytes=MAX_DATA_BYTES)
    )
    if not isinstance(raw, list):
        raise DataError("the file is not a list of rows", where=path, fix="write one JSON list, or .jsonl")
    if not raw:
        raise DataError("the file has no rows", where=path, fix="remove it from data.train or fill it")
    return [_parse(row, f"{path}, row {number}") for number, row in enumerate(raw, 1)]


def _json_lines(path: Path) -> Iterable[Any]:
    # Not splitlines(), which also splits at characters, such as U+2028, that a JSON string may contain.
    for number, line in enumerate(read_text(path, error=DataError, max_bytes=MAX_DATA_BYTES).split("\n"), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as problem:
                reason = getattr(problem, "msg", problem)
                raise DataError(
                    f"not valid JSON at line {number}: {reason}", where=path, fix="repair that line"
                ) from problem


def _parse(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise DataError("a row is not an object with columns", where=where)
    if "messages" in row:
        return _parse_chat(row["messages"], where)
    if "prompt" in row or "completion" in row:
        return CompletionRow(_text(row, "prompt", where), _text(row, "completion", where))
    if "instruction" in row or "output" in row:
        extra = row.get("input") or ""
        if not _is_text(extra):
            raise DataError("the column 'input' is not text", where=where)
        return InstructionRow(_text(row, "instruction", where), extra, _text(row, "output", where))
    raise DataError(
        f"columns {', '.join(map(repr, row)) or 'none'} fit none of the formats",
        where=where,
        fix="rows have instruction/input/output, or prompt/completion, or messages",
    )


def _text(row: dict[str, Any], column: str, where: str) -> str:
    if column not in row:
        raise DataError(f"the column '{column}' is missing", where=where, fix=f"its columns are {', '.join(row)}")
    if not _is_text(row[column]) or not row[column]:
        raise DataError(f"the column '{column}' is empty or not text", where=where)
    text: str = row[column]
    return text


def _is_text(value: Any) -> bool:
    """Whether `value` is text that UTF-8 can encode; JSON escapes may contain half of a surrogate pair."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _parse_chat(messages: Any, where: str) -> ChatRow:
    well_formed = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and _is_text(m.get("content")) for m in messages
    )
    if not well_formed or len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise DataError("'messages' is not a list of {role, content} turns that ends with the assistant's", where=where)
    return ChatRow(tuple({"role": m["role"], "content": m["content"]} for m in messages))


def _read_hub(source: str) -> list[Row]:
    try:
        import datasets
    except ImportError as problem:
        raise DataError(
            f"'{source}' is neither a file nor a folder, and reading the Hub needs the datasets library",
            where="data.train",
            fix="check the path, or pip install 'poc-lora[hub]'",
        ) from problem
    try:
        table = datasets.load_dataset(source, split="train")
    except Exception as problem:  # datasets raises many kinds
        raise DataError(
            f"'{source}' is neither a file nor a folder, and cannot be loaded from the Hub: {problem}",
            where="data.train",
        ) from problem
    return [_parse(row, f"{source}, row {number}") for number, row in enumerate(table, 1)]
