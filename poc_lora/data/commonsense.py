"""The eight commonsense benchmarks, and their questions from local JSON files in the LLM-Adapters format."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from poc_lora.data.limits import MAX_LABELS, MAX_LABELS_LENGTH, require_length
from poc_lora.errors import DataError
from poc_lora.files import read_json

ANSWER_FORMAT = "Answer format:"


@dataclass(frozen=True)
class Benchmark:
    """A benchmark of the paper's table, as LLM-Adapters tests on it.

    folder: its name on disk.
    short: its name in the paper's table.
    name: in full.
    lm_eval: the name of lm-eval's own task.
    source: the data set on the Hugging Face Hub.
    split: which of its splits the test questions are; where the labels of `test` are hidden, it is `validation`.
    licence: as the data set's card states it; "unknown" where the card says so, or says nothing.
    labels: number of labels of a question -> how many test questions have that number.
    """

    folder: str
    short: str
    name: str
    lm_eval: str
    source: str
    split: str
    licence: str
    labels: Mapping[int, int] = field(compare=False)

    @property
    def questions(self) -> int:
        """How many test questions there are."""
        return sum(self.labels.values())

    @property
    def chance(self) -> float:
        """The expected accuracy of guessing: the mean of 1 / number of labels."""
        return sum(count / labels for labels, count in self.labels.items()) / self.questions


WINOGRANDE_LICENCE = "unknown (its authors: CC-BY)"  # nothing on the card; github.com/allenai/winogrande says CC-BY

# fmt: off
# In the paper's column order.
BENCHMARKS = (
    Benchmark("social_i_qa", "SIQA", "Social IQa", "social_iqa", "allenai/social_i_qa", "validation", "CC-BY-4.0",
              {3: 1954}),
    Benchmark("piqa", "PIQA", "Physical Interaction: Question Answering", "piqa", "ybisk/piqa", "validation", "unknown",
              {2: 1838}),
    Benchmark("winogrande", "WinoGrande", "WinoGrande", "winogrande", "allenai/winogrande", "validation",
              WINOGRANDE_LICENCE, {2: 1267}),
    Benchmark("openbookqa", "OBQA", "OpenBookQA", "openbookqa", "allenai/openbookqa", "test", "unknown", {4: 500}),
    Benchmark("ARC-Challenge", "ARC-c", "AI2 Reasoning Challenge, challenge set", "arc_challenge", "allenai/ai2_arc",
              "test", "CC-BY-SA-4.0", {3: 4, 4: 1165, 5: 3}),
    Benchmark("ARC-Easy", "ARC-e", "AI2 Reasoning Challenge, easy set", "arc_easy", "allenai/ai2_arc", "test",
              "CC-BY-SA-4.0", {3: 7, 4: 2365, 5: 4}),
    Benchmark("boolq", "BoolQ", "Boolean Questions", "boolq", "google/boolq", "validation", "CC-BY-SA-3.0", {2: 3270}),
    Benchmark("hellaswag", "HellaSwag", "HellaSwag", "hellaswag", "Rowan/hellaswag", "validation", "MIT", {4: 10042}),
)
# fmt: on
BY_FOLDER = {benchmark.folder: benchmark for benchmark in BENCHMARKS}


@dataclass(frozen=True)
class Question:
    """A test question; `answer` is one of `labels`, which are in the question's order."""

    instruction: str
    input: str
    labels: tuple[str, ...]
    answer: str

    @property
    def answer_index(self) -> int:
        return self.labels.index(self.answer)


def find_benchmarks(names: Sequence[str] | None) -> tuple[Benchmark, ...]:
    """Returns the benchmarks with these folder or paper names in the paper's order; all if None. Raises DataError."""
    if names is None:
        return BENCHMARKS
    known = {name.lower(): b for b in BENCHMARKS for name in (b.folder, b.short)}
    for name in names:
        if name.lower() not in known:
            near = difflib.get_close_matches(name.lower(), known, n=1)
            guess = f"did you mean {known[near[0]].folder}? " if near else ""
            choices = ", ".join(b.folder for b in BENCHMARKS)
            raise DataError(f"no benchmark is called {name!r}", fix=f"{guess}known: {choices}")
    if not names:
        raise DataError("no benchmark was named", fix="name at least one, or leave the choice out to take all eight")
    wanted = {known[name.lower()].folder for name in names}
    return tuple(b for b in BENCHMARKS if b.folder in wanted)


def read_questions(
    data: Path, benchmark: Benchmark, *, split: str = "test", limit: int | None = None
) -> list[Question]:
    """Read the questions of `<data>/<benchmark>/<split>.json`, or the first `limit` of them.

    Raises:
        DataError: The file is missing, or one of its rows, also those beyond `limit`, is not a question.
    """
    path = data / benchmark.folder / f"{split}.json"
    if not path.is_file():
        raise DataError(
            f"the {split} file of {benchmark.folder} is missing",
            where=path,
            fix="check the data folder, or name the benchmarks that it holds",
        )
    if path.stat().st_size == 0:
        raise DataError("the file is empty", where=path, fix="fetch or build it again")
    rows = read_json(path, error=DataError)
    if not isinstance(rows, list):
        raise DataError(
            "the file is not a list of rows",
            where=path,
            fix="write one JSON list of {instruction, input, output, answer}",
        )
    if not rows:
        raise DataError("the file has no rows", where=path, fix="fetch or build it again")
    return [_question(row, f"{path}, row {i}") for i, row in enumerate(rows, start=1)][:limit]


def chance_level(questions: Sequence[Question]) -> float:
    """The expected accuracy of random guessing: the mean of 1 / number of labels."""
    return sum(1 / len(q.labels) for q in questions) / len(questions)


def _question(row: Any, where: str) -> Question:
    if not isinstance(row, dict):
        raise DataError("the row is not a mapping of columns", where=where)
    instruction, answer = (_column(row, name, where) for name in ("instruction", "answer"))
    extra = row.get("input") or ""
    if not isinstance(extra, str):
        raise DataError("column 'input' is not text", where=where)
    require_length(instruction + extra, where)
    labels = _labels(instruction, where)
    answer = answer.strip()
    if answer not in labels:
        raise DataError(
            f"the answer {answer!r} is not among the labels {'/'.join(labels)}",
            where=where,
            fix=f"correct the answer, or the labels after {ANSWER_FORMAT!r}",
        )
    try:
        (instruction + extra).encode()
    except UnicodeEncodeError as problem:
        raise DataError("the text holds half of a surrogate pair, which is no character", where=where) from problem
    return Question(instruction, extra, labels, answer)


def _column(row: dict[str, Any], name: str, where: str) -> str:
    if name not in row:
        raise DataError(f"column {name!r} is missing", where=where, fix="every row needs 'instruction' and 'answer'")
    if not isinstance(row[name], str):
        raise DataError(f"column {name!r} is not text", where=where)
    text: str = row[name]
    return text


def _labels(instruction: str, where: str) -> tuple[str, ...]:
    """`... Answer format: a/b / c` -> ("a", "b", "c")."""
    _, found, formats = instruction.rpartition(ANSWER_FORMAT)
    fix = f"end the instruction with '{ANSWER_FORMAT} a/b/c'"
    if not found:
        raise DataError("the instruction names no labels", where=where, fix=fix)
    labels = tuple(label.strip() for label in formats.split("/", MAX_LABELS))
    if len(labels) > MAX_LABELS or len(formats) > MAX_LABELS_LENGTH:
        what = f"the labels are more than {MAX_LABELS}, or longer than {MAX_LABELS_LENGTH:,} characters in all"
        raise DataError(what, where=where, fix=fix)
    if len(labels) < 2 or "" in labels:
        raise DataError(f"a question needs at least two labels, none of them empty: {formats!r}", where=where, fix=fix)
    if len(set(labels)) < len(labels):
        raise DataError(f"the same label stands twice in {formats.strip()!r}", where=where, fix=fix)
    return labels
