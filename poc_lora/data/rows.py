"""Read training rows from files, folders or the Hub; data/formats.py tells what a row may be."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from poc_lora.data.formats import Row, parse_row
from poc_lora.errors import DataError
from poc_lora.files import read_json, read_text
from poc_lora.hub_ids import is_repo_id

MAX_DATA_BYTES = 4 * 2**30
TRAIN_FILES = ("train.json", "train.jsonl")


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
    return [parse_row(row, f"{path}, row {number}") for number, row in enumerate(raw, 1)]


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
    return [parse_row(row, f"{source}, row {number}") for number, row in enumerate(table, 1)]
