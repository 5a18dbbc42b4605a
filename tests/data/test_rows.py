"""Rows from files in three formats; every refusal names the file and the row or line."""

import json

import pytest

from poc_lora.data.formats import ChatRow, CompletionRow, InstructionRow
from poc_lora.data.rows import read_file, read_sources, source_files
from poc_lora.errors import DataError

INSTRUCTION = {"instruction": "Add.", "input": "1 2", "output": "3", "answer": "3"}
COMPLETION = {"prompt": "1 + 2 =", "completion": " 3"}
TURNS = [{"role": "user", "content": "1 + 2?"}, {"role": "assistant", "content": "3"}]


@pytest.fixture
def write(tmp_path):
    def write(content, name="rows.json"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write


def refusal(path):
    with pytest.raises(DataError) as caught:
        read_file(path)
    assert str(path) in caught.value.where
    return caught.value


def test_three_formats_are_told_apart_row_by_row(write):
    assert read_file(write([INSTRUCTION, COMPLETION, {"messages": TURNS}])) == [
        InstructionRow("Add.", "1 2", "3"),
        CompletionRow("1 + 2 =", " 3"),
        ChatRow(tuple(TURNS)),
    ]


@pytest.mark.parametrize(
    "row", [{"instruction": "a", "output": "b"}, {"instruction": "a", "input": None, "output": "b"}]
)
def test_the_input_column_may_be_absent_or_null(write, row):
    assert read_file(write([row])) == [InstructionRow("a", "", "b")]


def test_jsonl_rows_are_read_and_blank_lines_passed_over(write):
    path = write(f"{json.dumps(INSTRUCTION)}\r\n\n{json.dumps(COMPLETION)}", "rows.jsonl")
    assert read_file(path) == [InstructionRow("Add.", "1 2", "3"), CompletionRow("1 + 2 =", " 3")]


@pytest.mark.parametrize("character", ["\u2028", "\u0085", "\u000b", "\u001c"])
def test_line_separators_inside_jsonl_text_do_not_end_the_line(write, character):
    row = {"prompt": f"one{character}two", "completion": "x"}
    path = write(json.dumps(row, ensure_ascii=False) + "\n", "rows.jsonl")
    assert read_file(path) == [CompletionRow(f"one{character}two", "x")]


def test_a_missing_column_is_named_with_its_row(write):
    problem = refusal(write([COMPLETION, {"prompt": "a", "label": "b"}]))
    assert "'completion' is missing" in problem.what
    assert problem.where.endswith("row 2")
    assert "prompt, label" in problem.fix


@pytest.mark.parametrize("value", ["", 3, None, ["a"], "half a pair \ud800"])
def test_a_column_that_is_not_text_is_named(write, value):
    problem = refusal(write([{**COMPLETION, "completion": value}]))
    assert "'completion' is empty or not text" in problem.what


@pytest.mark.parametrize("value", [3, ["a"], "half a pair \udc00"])
def test_an_input_that_is_not_text_is_refused(write, value):
    assert "'input'" in refusal(write([{**INSTRUCTION, "input": value}])).what


def test_columns_of_no_known_format_are_listed(write):
    problem = refusal(write([{"question": "a", "reply": "b"}]))
    assert "'question', 'reply'" in problem.what
    assert "prompt/completion" in problem.fix


@pytest.mark.parametrize("row", ["text", 3, None, ["a", "b"]])
def test_a_row_that_is_not_an_object_is_refused(write, row):
    assert refusal(write([INSTRUCTION, row])).where.endswith("row 2")


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        (TURNS[:1], "ends with the assistant's; this has 1 of them, the last the user's"),
        (TURNS[1:], "at least two turns"),
        ([], "this has none"),
        ("text", "'messages' is text, not a list"),
        (None, "'messages' is null or missing"),
        ([TURNS[0], "text"], "turn 2 is text"),
        ([*TURNS, {"role": "user", "content": "and?"}], "the last the user's"),
        ([TURNS[0], {"role": "assistant"}], "content of turn 2 is null or missing"),
        ([TURNS[0], {"role": "assistant", "content": ""}], "last turn, the assistant's, is empty"),
        ([TURNS[0], {"role": "assistant", "content": "\ud800"}], "turn 2 holds text that is not valid"),
        ([{"speaker": "a", "text": "b"}, TURNS[1]], "turn 1 has no role; its keys are speaker, text"),
    ],
)
def test_a_chat_is_turns_that_end_with_the_assistant(write, messages, what):
    assert what in refusal(write([{"messages": messages}])).what


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_file_without_rows_is_refused(write, name):
    assert "no rows" in refusal(write("[]" if name == "rows.json" else "\n", name)).what


def test_a_json_file_holds_a_list(write):
    assert "not a list" in refusal(write({"rows": [INSTRUCTION]})).what


def test_broken_json_is_located_by_line(write):
    assert "line 3" in refusal(write('[\n{"prompt": "a"},\n{"prompt" "b"}\n]')).what


def test_broken_jsonl_is_located_by_line_of_the_file(write):
    text = json.dumps(COMPLETION)
    what = refusal(write(f"{text}\n\n{text[:-1]}\n", "rows.jsonl")).what
    assert "line 3" in what
    assert "line 1" not in what


def test_a_folder_stands_for_every_train_file_inside(write, tmp_path):
    row = {"prompt": "a", "completion": "b"}
    write([{**row, "prompt": "one"}], "data/boolq/train.json")
    write(json.dumps({**row, "prompt": "two"}), "data/piqa/deep/train.jsonl")
    write([{**row, "prompt": "never"}], "data/piqa/test.json")
    rows = read_sources([str(tmp_path / "data")])
    assert sorted(r.prompt for r in rows) == ["one", "two"]


def test_sources_keep_their_order(write):
    first, second = write([COMPLETION], "b.json"), write([INSTRUCTION], "a.json")
    assert source_files([str(first), str(second)]) == [first, second]
    assert [type(r) for r in read_sources([str(first), str(second)])] == [CompletionRow, InstructionRow]


def test_a_folder_without_train_files_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no train\.json"):
        read_sources([str(tmp_path)])


@pytest.mark.parametrize("source", ["none.json", "data/none.json", "./a/b", "/none/at/all", "word"])
def test_a_missing_source_is_named(source):
    with pytest.raises(DataError, match="no such file or folder") as caught:
        read_sources([source])
    assert caught.value.where == source
