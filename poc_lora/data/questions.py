"""Test questions from local JSON files: rows in the LLM-Adapters format, and rows with choices."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from poc_lora.data.commonsense import Benchmark, questions_file
from poc_lora.data.limits import MAX_LABELS, MAX_LABELS_LENGTH, require_characters, require_length
from poc_lora.data.rows import file_rows
from poc_lora.errors import DataError
from poc_lora.files import read_json

ANSWER_FORMAT = "Answer format:"
MAX_GROUP = 1000  # characters of the name of a group
CHOICES_FIX = "a row has `question` or `prompt`, `choices` (texts), and `answer`: a number from 0, or the choice's text"


@dataclass(frozen=True)
class Question:
    """A test question; `answer` is one of `labels`, which are in the question's order.

    Attributes:
        instruction, input: What the prompt template takes.
        labels: Of a row with choices their texts.
        form: `labels`, a row whose instruction names its labels; `question`, a row with choices, whose instruction is
            put into the prompt template; `prompt`, one whose instruction is the prompt as it stands.
        group: Names what the question shares with others, such as a passage, so that they are no independent samples;
            empty for a question on its own.
    """

    instruction: str
    input: str
    labels: tuple[str, ...]
    answer: str
    form: Literal["labels", "question", "prompt"] = "labels"
    group: str = ""

    @property
    def answer_index(self) -> int:
        return self.labels.index(self.answer)


def read_questions(
    data: Path, benchmark: Benchmark, *, split: str = "test", limit: int | None = None
) -> list[Question]:
    """Read the questions of `<data>/<benchmark>/<split>.json` or `.jsonl`, or the first `limit` of them.

    A row has `instruction`, which ends with its labels, and `answer`; or `question` (or `prompt`, the whole text before
    the answer), `choices` and `answer`, the number of the right choice, from 0, or its text. Either may have `group`.

    Raises:
        DataError: The file is missing, or one of its rows, also those beyond `limit`, is not a question.
    """
    path = questions_file(data / benchmark.folder, split)
    if path is None:
        raise DataError(
            f"the {split} file of {benchmark.folder} is missing",
            where=data / benchmark.folder / f"{split}.json",
            fix="check the data folder, or name the benchmarks that it holds",
        )
    if path.stat().st_size == 0:
        raise DataError("the file is empty", where=path, fix="fetch or build it again")
    rows = list(file_rows(path)) if path.suffix == ".jsonl" else read_json(path, error=DataError)
    if not isinstance(rows, list):
        raise DataError("the file is not a list of rows", where=path, fix="write one JSON list of rows")
    if not rows:
        raise DataError("the file has no rows", where=path, fix="fetch or build it again")
    questions = [_question(row, f"{path}, row {i}") for i, row in enumerate(rows, start=1)]
    for i, question in enumerate(questions, start=1):
        if (question.form == "labels") != (questions[0].form == "labels"):
            what = "some rows have choices and others have labels in their instruction"
            raise DataError(what, where=f"{path}, row {i}", fix="put them into two folders")
    return questions[:limit]


def chance_level(questions: Sequence[Question]) -> float:
    """The expected accuracy of random guessing: the mean of 1 / number of labels."""
    return sum(1 / len(q.labels) for q in questions) / len(questions)


def _question(row: Any, where: str) -> Question:
    if isinstance(row, DataError):
        raise row
    if not isinstance(row, dict):
        raise DataError("the row is not a mapping of columns", where=where)
    question = _with_choices(row, where) if "choices" in row else _with_labels(row, where)
    group = row.get("group")
    if group is None:
        return question
    if isinstance(group, bool) or not isinstance(group, str | int) or len(str(group)) > MAX_GROUP:
        what = f"column 'group' is not a number, nor a text of at most {MAX_GROUP} characters"
        raise DataError(what, where=where, fix="name what the question shares with others, such as its passage's title")
    return replace(question, group=str(group))


def _with_choices(row: dict[str, Any], where: str) -> Question:
    forms: list[Literal["question", "prompt"]] = ["question", "prompt"]
    given = [form for form in forms if row.get(form) is not None]
    if len(given) != 1:
        what = "the row has both 'question' and 'prompt'" if given else "column 'question' is missing"
        raise DataError(what, where=where, fix=CHOICES_FIX)
    text, choices, answer = row[given[0]], row["choices"], row.get("answer")
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"column {given[0]!r} is not text, or has no words", where=where, fix=CHOICES_FIX)
    if not isinstance(choices, list) or not all(isinstance(c, str) and c.strip() for c in choices):
        raise DataError("column 'choices' is not a list of texts", where=where, fix=CHOICES_FIX)
    if len(choices) > MAX_LABELS or sum(map(len, choices)) > MAX_LABELS_LENGTH:
        what = f"the choices are more than {MAX_LABELS}, or longer than {MAX_LABELS_LENGTH:,} characters in all"
        raise DataError(what, where=where, fix="ask with fewer or shorter choices")
    if len(choices) < 2 or len(set(choices)) < len(choices):
        what = "a question needs at least two choices" if len(choices) < 2 else "the same choice stands twice"
        raise DataError(what, where=where, fix=CHOICES_FIX)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        answer = choices[answer]
    if not isinstance(answer, str) or answer not in choices:
        shown = "missing" if answer is None else f"{str(answer)[:60]!r}, which is none of the {len(choices)} choices"
        raise DataError(f"the answer is {shown}", where=where, fix=CHOICES_FIX)
    require_length(text, where)
    require_characters(text + "".join(choices), where)
    return Question(text, "", tuple(choices), answer, given[0])


def _with_labels(row: dict[str, Any], where: str) -> Question:
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
    require_characters(instruction + extra, where)
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
