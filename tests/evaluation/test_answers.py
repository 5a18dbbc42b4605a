"""Answers on disk: saved as they are given, and read back only where everything they depend on is the same."""

import json

import pytest

from poc_lora.data.questions import Question
from poc_lora.evaluation.answers import Answer, AnswerFile, Item

SETTINGS = {"base": "org/base", "prompt": "clean"}
ITEMS = [
    Item("piqa", "test", row, Question(f"Which {row}? Answer format: a/b", "", ("a", "b"), "a")) for row in (1, 2, 3)
]
ANSWERS = [
    Answer("a", log_probs=(-0.5, -1.25)),
    Answer(None, too_long=True),
    Answer(None, text="neither \u2028 nor\n"),
]


def opened(tmp_path, settings=SETTINGS, items=ITEMS, process_index=0):
    return AnswerFile(tmp_path / "eval" / "merged.jsonl", settings, items, process_index=process_index)


def test_answers_come_back_from_parts_of_all_ranks_and_from_the_whole(tmp_path):
    opened(tmp_path, process_index=1).append(ITEMS[2:], ANSWERS[2:])
    opened(tmp_path).append(ITEMS[:2], ANSWERS[:2])
    file = opened(tmp_path)
    assert file.answers == dict(zip(ITEMS, ANSWERS, strict=True))
    file.finish()
    assert [path.name for path in (tmp_path / "eval").iterdir()] == ["merged.jsonl"]
    lines = [json.loads(line) for line in file.path.read_text().split("\n")[:-1]]
    assert [(x["row"], x["choice"], x["correct"], x["too_long"]) for x in lines] == [
        (1, "a", True, False),
        (2, None, False, True),
        (3, None, False, False),
    ]
    assert opened(tmp_path).answers == file.answers


def test_a_line_that_a_kill_cut_short_takes_no_other_with_it(tmp_path):
    opened(tmp_path, process_index=1).append(ITEMS[:2], ANSWERS[:2])
    part = tmp_path / "eval" / "merged.jsonl.part-1"
    part.write_text(part.read_text()[:-30])
    opened(tmp_path, process_index=1).append(ITEMS[1:], ANSWERS[1:])
    assert opened(tmp_path).answers == dict(zip(ITEMS, ANSWERS, strict=True))


def test_answers_to_what_is_not_asked_this_time_stay(tmp_path):
    whole = opened(tmp_path)
    whole.append(ITEMS, ANSWERS)
    narrow = opened(tmp_path, items=ITEMS[1:2])
    assert list(narrow.answers) == ITEMS[1:2]
    narrow.finish()
    assert opened(tmp_path).answers == whole.answers
    other = opened(tmp_path, settings=SETTINGS | {"beams": 4}, items=ITEMS[:1])
    other.append(ITEMS[:1], ANSWERS[:1])
    other.finish()
    assert opened(tmp_path).answers == {}  # they were of other settings


@pytest.mark.parametrize(
    "other",
    [
        dict(settings=SETTINGS | {"base": "org/other"}),
        dict(settings=SETTINGS | {"beams": 4}),
        dict(items=[Item("boolq", "test", 1, ITEMS[0].question)]),
        dict(items=[Item("piqa", "validation", 1, ITEMS[0].question)]),
        dict(items=[Item("piqa", "test", 1, Question("Who 1? Answer format: a/b", "", ("a", "b"), "a"))]),
        dict(items=[Item("piqa", "test", 1, Question(ITEMS[0].question.instruction, "more", ("a", "b"), "a"))]),
        dict(items=[Item("piqa", "test", 1, Question(ITEMS[0].question.instruction, "", ("a", "b"), "b"))]),
    ],
)
def test_answers_to_something_else_are_ignored(tmp_path, other):
    opened(tmp_path).append(ITEMS, ANSWERS)
    assert opened(tmp_path, **other).answers == {}


@pytest.mark.parametrize(
    "change",
    [
        {"choice": "c"},
        {"too_long": "no"},
        {"log_probs": {"a": -1.0}},
        {"log_probs": {"a": -1.0, "b": "x"}},
        {"log_probs": [1]},
        {"key": 3},
    ],
)
def test_lines_that_are_no_answers_are_passed_over(tmp_path, change):
    opened(tmp_path).append(ITEMS[:1], ANSWERS[:1])
    part = tmp_path / "eval" / "merged.jsonl.part-0"
    line = json.loads(part.read_text())
    part.write_text(json.dumps(line | change) + "\n[1]\n" + part.read_text()[:40])  # the last was cut off
    file = opened(tmp_path)
    assert file.answers == {}
    file.append(ITEMS, ANSWERS)
    assert opened(tmp_path).answers[ITEMS[2]] == ANSWERS[2]
