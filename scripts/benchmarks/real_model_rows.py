"""The rows and questions of real_model.py."""

import ast
import json
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from poc_lora.data.commonsense import BENCHMARKS
from poc_lora.data.questions import ANSWER_FORMAT, Question, read_questions
from poc_lora.evaluation.protocols import label
from poc_lora.files import write_json

TRAINED = ("boolq", "ARC-Easy", "ARC-Challenge", "openbookqa")
QUESTIONS = 1_000  # of each benchmark
HELD_OUT = 20  # every so many rows, or modules
OPTION = re.compile(r"\b(?:Answer|Solution|Option|Ending)\d: ")


def write_rows(commonsense: Path, out: Path) -> None:
    """Write OUT/TASK/train.json, heldout.json and, of what is multiple choice, questions.json."""
    for task in ("labels", "choices"):
        rows, questions = [], []
        for benchmark in BENCHMARKS:
            for question in read_questions(commonsense, benchmark, limit=QUESTIONS):
                questions.append({"benchmark": benchmark.folder, **asdict(render(question, task))})
            if benchmark.folder in TRAINED:
                for question in trainable(commonsense / benchmark.folder / "train.json"):
                    shown = render(question, task)
                    output = f"{label.ANSWER_PREFIX} {shown.answer}"
                    rows.append({"instruction": shown.instruction, "input": "", "output": output})
        heldout = rows[::HELD_OUT]
        del rows[::HELD_OUT]
        _write_task(out / task, {"train": rows, "heldout": heldout, "questions": questions})
    _write_task(out / "docstrings", docstrings())


def _write_task(folder: Path, files: dict[str, list[Any]]) -> None:
    folder.mkdir(parents=True)
    for name, rows in files.items():
        write_json(folder / f"{name}.json", rows)
    print(f"{folder.name}: " + ", ".join(f"{len(rows):,} {name}" for name, rows in files.items()))


def docstrings() -> dict[str, list[Any]]:
    """Rows of the standard library of the Python that runs this."""
    folder = Path(sysconfig.get_path("stdlib"))
    files: dict[str, list[Any]] = {"train": [], "heldout": []}
    for number, path in enumerate(sorted(folder.glob("**/*.py"))):
        module = ".".join(path.relative_to(folder).with_suffix("").parts)
        if re.search("site-packages|dist-packages|test|lib2to3|idlelib", module):
            continue
        part = files["heldout" if number % HELD_OUT == 0 else "train"]
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
                first = " ".join(text.split("\n\n")[0].split())
                if 4 <= len(first.split()) <= 60:
                    head = f"def {node.name}({ast.unparse(node.args)})"
                    row = {"instruction": f"The docstring of {head} in {module}:", "input": "", "output": first}
                    part.append(row)
    return files


def trainable(path: Path) -> Iterator[Question]:
    """The questions of a training file whose answer is one of their labels; ARC-Easy has one whose is not."""
    for row in json.loads(path.read_text(encoding="utf-8")):
        labels = tuple(part.strip() for part in row["instruction"].rpartition(ANSWER_FORMAT)[2].split("/"))
        if row["answer"] in labels:
            yield Question(row["instruction"], row["input"], labels, row["answer"])


def render(question: Question, task: str) -> Question:
    """The question with the texts of its options as labels and without their list, or as it is.

    Questions without numbered options (BoolQ) and those with two equal ones stay as they are.
    """
    text = question.instruction.rpartition(ANSWER_FORMAT)[0]
    stem, *options = (part.strip() for part in OPTION.split(text))
    if task == "labels" or len(options) != len(question.labels) or len(set(options)) < len(options):
        return question
    return Question(stem, question.input, tuple(options), options[question.answer_index])
