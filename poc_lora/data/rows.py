"""Read training rows from files, folders or the Hub; data/formats.py tells what a row may be."""

import csv
import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from poc_lora.data.formats import Row, as_columns, parse_row
from poc_lora.errors import DataError, first_line
from poc_lora.files import read_json, read_text, require_plain, unique_keys, write_atomic
from poc_lora.hub_ids import is_repo_id

MAX_DATA_BYTES = 4 * 2**30
MAX_SHOWN = 10
TRAIN_FILES = ("train.json", "train.jsonl")
SUFFIXES = (".json", ".jsonl", ".jsonl.gz", ".csv", ".parquet")


class BadRows:
    """Rows that cannot be used: how many, and what is wrong with the first ten."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[DataError] = []

    def add(self, problem: DataError) -> None:
        self.count += 1
        if len(self.first) < MAX_SHOWN:
            self.first.append(problem)

    def raise_if_any(self) -> None:
        """Raise the one problem there is, or one DataError that tells the first of them and their number."""
        if not self.count:
            return
        skip = "data.skip_bad_rows: true leaves such rows out"
        fixes = list(dict.fromkeys(problem.fix for problem in self.first if problem.fix))
        if self.count == 1:
            (problem,) = self.first
            fix = "; ".join([*fixes, skip])
            raise DataError(problem.what, where=problem.where, fix=fix) from problem
        lines = [f"{problem.where}: {problem.what}" for problem in self.first]
        if self.count > len(lines):
            lines.append(f"and {self.count - len(lines):,} more")
        raise DataError(
            f"{self.count:,} rows cannot be used:",
            details=lines,
            where="data.train",
            fix="; ".join([*(fixes if len(fixes) == 1 else []), skip]),
        ) from self.first[0]


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
        elif not is_dataset_id(source):
            raise DataError("no such file or folder", where=source, fix="check the path")
    return files


def is_dataset_id(source: str) -> bool:
    """Whether a source has the form of a Hub data set, org/name or org/name:split, and not that of a file."""
    return is_repo_id(source.partition(":")[0]) and not source.endswith(SUFFIXES)


def read_sources(
    sources: Sequence[str], *, columns: Mapping[str, str | None] | None = None, bad: BadRows | None = None
) -> list[Row]:
    """Read the rows of files, folders and Hub ids, in this order: local ones first.

    Args:
        sources: The configuration's `data.train`.
        columns: Its `data.columns`.
        bad: Where rows that cannot be used are added.

    Raises:
        DataError: A source cannot be read, or no row has a column that `columns` names; without `bad`, also if a row
            cannot be used.
    """
    problems = BadRows() if bad is None else bad
    columns = columns or {}
    rows, unseen = [], {name.partition(".")[0] for name in columns} | set(columns)
    for place, raw in _parts(sources):
        number = 0
        for number, row in enumerate(raw, 1):
            if isinstance(row, dict):
                unseen -= row.keys()
            try:
                if isinstance(row, DataError):
                    raise row
                rows.append(parse_row(row, f"{place}, row {number}", columns))
            except DataError as problem:
                problems.add(problem)
        if not number:
            raise DataError("the file has no rows", where=place, fix="remove it from the list, or fill it")
    for name in columns:
        if name in unseen and name.partition(".")[0] in unseen:
            raise DataError(f"no row has the column {name!r}", where="data.columns", fix="correct it, or take it out")
    if bad is None:
        problems.raise_if_any()
    return rows


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as JSON lines, which `read_sources` reads back without `data.columns`."""
    lines = (json.dumps(as_columns(row), ensure_ascii=False, default=str) for row in rows)  # a Hub's dates as text
    write_atomic(path, "".join(line + "\n" for line in lines))


def _parts(sources: Sequence[str]) -> Iterator[tuple[str | Path, Iterable[Any]]]:
    """Yields the files and Hub data sets of the sources, with the rows of each as plain values."""
    for path in source_files(sources):
        yield path, file_rows(path)
    for source in sources:
        if not Path(source).expanduser().exists():
            yield source, _hub_rows(source)


def file_rows(path: Path) -> Iterable[Any]:
    """The rows of a file as plain values; a line that cannot be read is a DataError in its row's place."""
    name = path.name.lower()
    if name.endswith(".parquet"):
        return _table_rows(path, "parquet", data_files=glob.escape(str(path)), split="train", streaming=True)
    if name.endswith(".csv"):
        return _csv_rows(path)
    if name.endswith((".jsonl", ".jsonl.gz")):
        return _json_lines(path)
    if name.endswith(".gz"):
        raise DataError("a packed file that is no .jsonl.gz", where=path, fix="unpack it")
    try:
        rows = read_json(path, error=DataError, max_bytes=MAX_DATA_BYTES)
    except DataError as problem:
        if getattr(problem.__cause__, "msg", "") != "Extra data":
            raise
        return _json_lines(path)  # in a file called .json, as often on the Hub
    if not isinstance(rows, list):
        raise DataError("the file is not a list of rows", where=path, fix="write one JSON list, or .jsonl")
    return rows


def _json_lines(path: Path) -> Iterator[Any]:
    text = _unzipped(path) if path.suffix.lower() == ".gz" else _text(path)
    # Not splitlines(), which also splits at characters, such as U+2028, that a JSON string may contain.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield json.loads(line, object_pairs_hook=unique_keys)
            except (ValueError, RecursionError) as problem:
                reason = getattr(problem, "msg", problem)
                yield DataError(f"not valid JSON at line {number}: {reason}", where=path, fix="repair that line")


def _csv_rows(path: Path) -> Iterator[Any]:
    """Every value is text as it stands: the libraries that guess types read the answers "007" and "NA" as others."""
    before = csv.field_size_limit(MAX_DATA_BYTES)
    try:
        table = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
        header = next(table, [])
        if len(set(header)) < len(header):
            raise DataError("a column's name stands twice in the first line", where=path)
        for values in table:
            if len(values) == len(header):
                yield dict(zip(header, values, strict=True))
            elif values:
                yield DataError(
                    f"{len(values)} values for {len(header)} columns at line {table.line_num}",
                    where=path,
                    fix='values are separated by commas; those with commas or line ends stand in "..."',
                )
    except csv.Error as problem:
        raise DataError(f"not valid CSV at line {table.line_num}: {problem}", where=path) from problem
    finally:
        csv.field_size_limit(before)


def _text(path: Path) -> str:
    return read_text(path, error=DataError, max_bytes=MAX_DATA_BYTES)


def _unzipped(path: Path) -> str:
    require_plain(path, error=DataError)
    try:
        with gzip.open(path, "rb") as handle:
            content = handle.read(MAX_DATA_BYTES + 1)
        if len(content) > MAX_DATA_BYTES:
            raise DataError(f"more than {MAX_DATA_BYTES:,} bytes, the most this reads", where=path)
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise DataError(f"not UTF-8 text (byte {problem.start})", where=path, fix="save it as UTF-8") from problem
    except (OSError, EOFError, zlib.error) as problem:
        raise DataError(f"cannot be unpacked: {problem}", where=path) from problem


def _hub_rows(source: str) -> Iterable[Any]:
    name, _, split = source.partition(":")
    return _table_rows(source, name, split=split or "train")


def _table_rows(source: str | Path, *names: str, **options: Any) -> Iterator[Any]:
    """The rows of a table that the datasets library loads."""
    what = "this is a parquet file" if isinstance(source, Path) else "neither a file nor a folder has this name"
    try:
        import datasets
    except ImportError as problem:
        raise DataError(
            f"{what}, and reading that needs the datasets library",
            where=source,
            fix="check the path, or pip install 'poc-lora[hub]'",
        ) from problem
    try:
        for row in datasets.load_dataset(*names, **options):
            yield _without_nulls(row)
    except Exception as problem:  # datasets raises many kinds
        raise DataError(
            f"{what}, and the datasets library cannot load it: {first_line(problem)}",
            where=source,
            fix=None if isinstance(source, Path) else "check the path; a Hub data set is org/name or org/name:split",
        ) from problem


def _without_nulls(value: Any) -> Any:
    """A table's value without the keys that only other rows have: their columns are null in this one."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
