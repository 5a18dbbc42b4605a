"""Rows from files in three formats; every refusal names the file and the row or line."""

import csv
import gzip
import io
import json
import sys

import pytest

from poc_lora.data.formats import ChatRow, CompletionRow, InstructionRow
from poc_lora.data.rows import BadRows, read_sources, source_files
from poc_lora.errors import DataError

INSTRUCTION = {"instruction": "Add.", "input": "1 2", "output": "3", "answer": "3"}
COMPLETION = {"prompt": "1 + 2 =", "completion": " 3"}
TURNS = [{"role": "user", "content": "1 + 2?"}, {"role": "assistant", "content": "3"}]


def read_file(path):
    return read_sources([str(path)])


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


@pytest.mark.parametrize("value", [3, 0, False, ["a"], "half a pair \udc00"])
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


def test_a_json_file_may_hold_lines(write):
    lines = f"{json.dumps(COMPLETION)}\n{json.dumps(INSTRUCTION)}\n"
    assert read_file(write(lines)) == [CompletionRow("1 + 2 =", " 3"), InstructionRow("Add.", "1 2", "3")]
    assert "line 2" in refusal(write(f"{json.dumps(COMPLETION)}\n{{")).what


def test_broken_json_is_located_by_line(write):
    assert "line 3" in refusal(write('[\n{"prompt": "a"},\n{"prompt" "b"}\n]')).what


def test_broken_jsonl_is_located_by_line_of_the_file(write):
    text = json.dumps(COMPLETION)
    what = refusal(write(f"{text}\n\n{text[:-1]}\n", "rows.jsonl")).what
    assert "line 3" in what
    assert "line 1" not in what


@pytest.mark.parametrize(("name", "text"), [("a.jsonl", "{}\n"), ("a.json", "[{}]")])
def test_a_repeated_key_is_refused_and_not_the_last_one_taken(tmp_path, name, text):
    (tmp_path / name).write_text(text.replace("{}", '{"instruction": "a", "output": "b", "output": "c"}'))
    with pytest.raises(DataError, match="the key 'output' is repeated"):
        read_sources([str(tmp_path / name)])


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


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv"])
def test_a_byte_order_mark_is_no_text(tmp_path, name):
    text = {
        "rows.json": json.dumps([COMPLETION]),
        "rows.jsonl": json.dumps(COMPLETION),
        "rows.csv": "prompt,completion\n1 + 2 =, 3\n",
    }[name]
    (tmp_path / name).write_bytes(text.encode("utf-8-sig"))
    assert read_file(tmp_path / name) == [CompletionRow("1 + 2 =", " 3")]


def test_packed_lines_are_read(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress((json.dumps(COMPLETION) + "\n" + json.dumps(INSTRUCTION)).encode("utf-8-sig")))
    assert read_file(path) == [CompletionRow("1 + 2 =", " 3"), InstructionRow("Add.", "1 2", "3")]
    path.write_bytes(path.read_bytes()[:20])
    assert "cannot be unpacked" in refusal(path).what
    path.write_bytes(gzip.compress(b"\xff\xfe"))
    assert "not UTF-8" in refusal(path).what
    path.write_text("plain")
    assert "cannot be unpacked" in refusal(path).what


def test_other_packed_files_are_refused_by_name(tmp_path):
    path = tmp_path / "rows.json.gz"
    path.write_bytes(gzip.compress(b"[]"))
    assert "no .jsonl.gz" in refusal(path).what


def test_values_of_a_csv_file_are_text_as_they_stand(write):
    """datasets and pandas would read the answers "007", "true" and "NA" as 7, True and nothing."""
    rows = [("Add, then say.", "1 2", "007"), ("Say\nit.", "", "NA"), ("Is it?", "", "true"), ('A "b"', "", "1.0")]
    text = io.StringIO()
    csv.writer(text).writerows([("instruction", "input", "output"), *rows])
    assert read_file(write(text.getvalue(), "rows.csv")) == [InstructionRow(*row) for row in rows]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("prompt,completion\na,b,c\n", "3 values for 2 columns at line 2"),
        ("prompt,completion\na\n", "1 values for 2 columns at line 2"),
        ("prompt,prompt\na,b\n", "stands twice"),
        ('prompt,completion\n"a,b\n', "not valid CSV at line 2"),
        ("prompt,completion\n", "no rows"),
        ("", "no rows"),
        ("prompt;completion\na;b\n", "columns 'prompt;completion' fit none of the formats"),
    ],
)
def test_csv_files_that_cannot_be_read_are_refused(write, text, what):
    assert what in refusal(write(text, "rows.csv")).what


def test_a_long_value_of_a_csv_file_is_read(write):
    limit = csv.field_size_limit()
    long = "word " * limit
    assert read_file(write(f"prompt,completion\n{long},b\n", "rows.csv")) == [CompletionRow(long, "b")]
    assert csv.field_size_limit() == limit


def test_parquet_is_read_by_the_datasets_library(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = [
        {"messages": TURNS, "id": 1},
        {"messages": [TURNS[0], {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}]},
    ]
    path = tmp_path / "a [1] * b" / "rows.parquet"  # no pattern
    path.parent.mkdir()
    datasets.Dataset.from_list(rows).to_parquet(path)
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    called, plain = read_file(path)[1], read_file(path)[0]
    assert plain == ChatRow(tuple(TURNS))  # no tool_calls, which the table has as null
    assert called.messages[-1]["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    assert not any(cache.rglob("*.arrow"))  # nothing is copied
    path.write_bytes(b"no parquet")
    assert "the datasets library cannot load it" in refusal(path).what


def test_without_the_datasets_library_the_extra_is_named(tmp_path, monkeypatch, write):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "rows.parquet").write_bytes(b"")
    problem = refusal(tmp_path / "rows.parquet")
    assert "parquet" in problem.what
    assert "poc-lora[hub]" in problem.fix
    with pytest.raises(DataError, match="neither a file nor a folder") as caught:
        read_sources(["org/name"])
    assert "poc-lora[hub]" in caught.value.fix
    assert read_file(write([COMPLETION])) == [CompletionRow("1 + 2 =", " 3")]


@pytest.mark.parametrize(("source", "split"), [("org/name", "train"), ("org/name:test[:2]", "test[:2]")])
def test_a_split_of_the_hub_is_asked_for(monkeypatch, source, split):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(*names, **options):
        asked.append((names, options))
        return [{**COMPLETION, "input": None}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    (row,) = read_sources([source])
    assert asked == [(("org/name",), {"split": split})]
    assert row == CompletionRow("1 + 2 =", " 3")
    assert row.where == f"{source}, row 1"


@pytest.mark.parametrize(
    "source", ["org/rows.parquet", "org/rows.csv", "org/rows.jsonl.gz", "a/b/c:train", "word:train"]
)
def test_a_missing_file_is_no_data_set(source):
    with pytest.raises(DataError, match="no such file or folder"):
        read_sources([source])


def bad_rows(write, n):
    lines = [json.dumps(COMPLETION), *(json.dumps({**COMPLETION, "completion": i}) for i in range(n)), "{"]
    return write("\n".join(lines), "rows.jsonl")


def test_bad_rows_are_told_at_once_and_counted(write):
    path = bad_rows(write, 13)
    with pytest.raises(DataError, match="14 rows cannot be used") as caught:
        read_file(path)
    lines = str(caught.value).split("\n")
    assert lines[1] == f"  - {path}, row 2: the column 'completion' is empty or not text"
    assert lines[10].startswith(f"  - {path}, row 11")
    assert lines[11] == "  - and 4 more"
    assert "data.skip_bad_rows: true" in caught.value.fix


def test_bad_rows_can_be_left_to_the_caller(write):
    bad = BadRows()
    assert read_sources([str(bad_rows(write, 3))], bad=bad) == [CompletionRow("1 + 2 =", " 3")]
    assert bad.count == 4
    assert "not valid JSON at line 5" in bad.first[-1].what


def test_a_column_that_no_row_has_is_a_mistake(write):
    path = write([{"question": "a", "completion": "b", "messages": None}])
    assert read_sources([str(path)], columns={"question": "prompt", "messages.id": None}) == [CompletionRow("a", "b")]
    with pytest.raises(DataError, match="no row has the column 'questoin'") as caught:
        read_sources([str(path)], columns={"question": "prompt", "questoin": None})
    assert caught.value.where == "data.columns"
