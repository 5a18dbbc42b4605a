"""Questions and their answers, saved batch by batch, so that an interrupted evaluation can resume."""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poc_lora.data.questions import Question
from poc_lora.errors import AdapterError, ModelError, WriteError
from poc_lora.files import system_errors_as, write_atomic


@dataclass(frozen=True)
class Item:
    """One question of an evaluation and its place in the benchmark's files."""

    benchmark: str  # its folder
    split: str  # test or validation
    row: int  # from 1
    question: Question


@dataclass(frozen=True)
class Answer:
    """The answer of one variant to one question.

    Attributes:
        choice: One of the labels; None if the prompt does not fit the context, or no label was found.
        too_long: The prompt does not fit the context.
        log_probs: The log-probability of every label (protocols `label` and `harness`).
        text: The generated text (protocol `generate`).
    """

    choice: str | None
    too_long: bool = False
    log_probs: tuple[float, ...] | None = None
    text: str | None = None


class AnswerFile:
    """The answers of one variant, `NAME.jsonl`: one line per question, in order once the evaluation has finished.

    Until then each rank appends to a file of its own, `NAME.jsonl.part-RANK`, and an evaluation that resumes reads all
    of them. Lines with other settings, or whose question has changed, are ignored. Answers with the same settings to
    questions that this evaluation does not ask are kept, after the others.

    Args:
        path: `NAME.jsonl`, which need not exist.
        settings: Everything that answers depend on apart from the question: base, adapter, protocol, prompt, dtype.
        items: The questions of this evaluation.

    Attributes:
        answers: The answers known so far, by question.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], items: Sequence[Item], *, process_index: int = 0):
        self.path, self.items = path, items
        self._part = path.with_name(f"{path.name}.part-{process_index}")
        self._same_settings = _hash(json.dumps(settings, sort_keys=True))
        self._keys = {item: self._key(item) for item in items}
        self._others: dict[tuple[str, ...], dict[str, Any]] = {}  # benchmark, split and row -> a line to keep
        self.answers: dict[Item, Answer] = {}
        self.read()

    def read(self) -> None:
        """Read the answers that all ranks have written."""
        wanted = {key: item for item, key in self._keys.items()}
        asked = {(item.benchmark, item.split, str(item.row)) for item in self.items}
        for path in (self.path, *self._parts()):
            for line in _read_lines(path):
                key, *place = (str(line.get(name)) for name in ("key", "benchmark", "split", "row"))
                item = wanted.get(key)
                answer = None if item is None else _parsed(line, item.question)
                if item is not None and answer is not None:
                    self.answers[item] = answer
                elif tuple(place) not in asked and key.startswith(self._same_settings):
                    self._others[tuple(place)] = line

    def append(self, items: Sequence[Item], answers: Sequence[Answer]) -> None:
        """Save answers; they are on the disk when this returns."""
        lines = []
        for item, answer in zip(items, answers, strict=True):
            self.answers[item] = answer
            lines.append(json.dumps(self._line(item, answer), ensure_ascii=False) + "\n")
        with system_errors_as(WriteError, "the answers could not be saved", self._part):
            self._part.parent.mkdir(parents=True, exist_ok=True)
            self._add("".join(lines).encode())

    def _add(self, lines: bytes) -> None:
        with self._part.open("ab+") as out:
            if out.tell():
                out.seek(-1, os.SEEK_END)
                if out.read() != b"\n":  # the last line was cut short by a kill; it must not swallow the next
                    out.write(b"\n")
            out.write(lines)
            out.flush()
            os.fsync(out.fileno())

    def finish(self) -> None:
        """Write all answers to one file, in order, and delete the parts."""
        lines = [*(self._line(item, self.answers[item]) for item in self.items), *self._others.values()]
        write_atomic(self.path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        for part in self._parts():
            part.unlink()

    def _parts(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{self.path.name}.part-*"))

    def _key(self, item: Item) -> str:
        asked = [item.benchmark, item.split, item.row, item.question.instruction, item.question.input]
        form = [] if item.question.form == "labels" else [item.question.form]
        return self._same_settings + _hash(json.dumps([asked, item.question.labels, item.question.answer, *form]))

    def _line(self, item: Item, answer: Answer) -> dict[str, Any]:
        line = {
            "benchmark": item.benchmark,
            "split": item.split,
            "row": item.row,
            "answer": item.question.answer,
            "choice": answer.choice,
            "correct": answer.choice == item.question.answer,
            "too_long": answer.too_long,
            "key": self._keys[item],
        }
        if answer.text is not None:
            line["text"] = answer.text
        else:
            found = answer.log_probs
            line["log_probs"] = None if found is None else dict(zip(item.question.labels, found, strict=True))
        return line


def check_numbers(variant: str, items: Sequence[Item], answers: Sequence[Answer]) -> None:
    """Raises ModelError (for the base) or AdapterError if a log-probability is NaN."""
    for item, answer in zip(items, answers, strict=True):
        if any(math.isnan(value) for value in answer.log_probs or ()):
            where = f"{variant} on {item.benchmark}"
            if variant == "base":
                raise ModelError("the base model's scores are not numbers", where=where, fix="try --dtype float32")
            fix = "the adapter has diverged or overflows in this dtype: leave it out, or try float32"
            raise AdapterError("the adapter's scores are not numbers", where=where, fix=fix)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file that are JSON objects; a line that was cut short is skipped."""
    with contextlib.suppress(FileNotFoundError), path.open(encoding="utf-8", errors="replace") as handle:
        for text in handle:
            with contextlib.suppress(ValueError):
                line = json.loads(text)
                if isinstance(line, dict):
                    yield line


def _parsed(line: Mapping[str, Any], question: Question) -> Answer | None:
    """The answer on a line; None if it is not a valid answer to this question."""
    choice, text, found, too_long = (line.get(name) for name in ("choice", "text", "log_probs", "too_long"))
    if (choice is not None and choice not in question.labels) or not isinstance(too_long, bool):
        return None
    log_probs: tuple[float, ...] | None = None
    if found is not None:
        if not isinstance(found, dict) or tuple(found) != question.labels:
            return None
        if not all(isinstance(value, int | float) for value in found.values()):
            return None
        log_probs = tuple(map(float, found.values()))
    return Answer(choice, too_long, log_probs, text if isinstance(text, str) else None)
