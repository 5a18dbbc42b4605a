"""The formats of a row as people write them: what is read, and what is refused by name because it would be lost."""

import json

import pytest

from poc_lora.data.formats import ChatRow, CompletionRow, InstructionRow, as_columns, parse_row
from poc_lora.data.prompts import TEMPLATES, render_prompt
from poc_lora.data.questions import Question
from poc_lora.errors import DataError
from poc_lora.evaluation.protocols.label import answered

INSTRUCTION = {"instruction": "Add.", "input": "1 2", "output": "3"}
COMPLETION = {"prompt": "1 + 2 =", "completion": " 3"}
TURNS = [{"role": "user", "content": "1 + 2?"}, {"role": "assistant", "content": "3"}]
CHAT = {"messages": TURNS}
FUNCTION = {"name": "weather", "arguments": {"city": "Paris"}}
CALL = {"type": "function", "function": FUNCTION}
SCHEMA = {"name": "weather", "parameters": {"type": "object", "properties": {}}}


def refusal(row, columns=None):
    with pytest.raises(DataError) as caught:
        parse_row(row, "rows.json, row 7", columns)
    assert caught.value.where == "rows.json, row 7"
    return caught.value


def chat(*more, **columns):
    """A chat of one question and these turns."""
    return parse_row({"messages": [TURNS[0], *more], **columns}, "")


@pytest.mark.parametrize(
    ("row", "column", "kind"),
    [
        ({**INSTRUCTION, "system": "Be brief."}, "system", "instruction/input/output"),
        ({**INSTRUCTION, "history": [["a", "b"]]}, "history", "instruction/input/output"),
        ({**INSTRUCTION, "weight": 0}, "weight", "instruction/input/output"),
        ({**COMPLETION, "system": "Be brief."}, "system", "prompt/completion"),
        ({**COMPLETION, "instruction": "Add."}, "instruction", "prompt/completion"),
        ({**COMPLETION, "answer": "3"}, "answer", "prompt/completion"),
        ({**COMPLETION, "label": False}, "label", "prompt/completion"),
        ({**CHAT, "prompt": "1 + 2?"}, "prompt", "chat"),
        ({**CHAT, "rejected": TURNS}, "rejected", "chat"),
        ({**CHAT, "documents": [{"title": "a"}]}, "documents", "chat"),
        ({**CHAT, "images": ["a.png"]}, "images", "chat"),
        ({**CHAT, "score": 0.5}, "score", "chat"),
    ],
)
def test_a_column_that_carries_content_and_is_not_used_is_refused_by_name(row, column, kind):
    problem = refusal(row)
    assert f"the column '{column}' carries content that the row's format, {kind}, does not use" == problem.what
    assert f"data.columns: {{{column}: null}}" in problem.fix
    assert parse_row(row, "", {column: None}) == parse_row({k: v for k, v in row.items() if k != column}, "")


def test_a_text_alone_is_learnt_whole():
    row = parse_row({"text": "Once upon a time.", "id": 3, "prompt": None}, "")
    assert row == CompletionRow("", "Once upon a time.")
    assert parse_row(as_columns(row), "") == row
    problem = refusal({"text": "A film to see.", "label": 1})
    assert problem.what == "the column 'label' carries content that the row's format, text, does not use"
    assert "'text' is empty or not text" in refusal({"text": ["a"]}).what


def test_all_unused_columns_are_named_at_once():
    problem = refusal({**CHAT, "score": 1, "model": "x", "id": 3})
    assert "the columns 'score', 'model' carry content" in problem.what
    assert "data.columns: {score: null, model: null}" in problem.fix


@pytest.mark.parametrize("value", [None, "", " \n", [], {}])
def test_a_column_without_content_is_none(value):
    assert parse_row({**CHAT, "system": value, "tools": value, "history": value}, "") == ChatRow(tuple(TURNS))
    assert parse_row({**INSTRUCTION, "messages": value}, "") == InstructionRow("Add.", "1 2", "3")


@pytest.mark.parametrize(
    "row",
    [
        {**INSTRUCTION, "answer": "3", "id": 1, "category": "sums"},
        {**INSTRUCTION, "text": "Below is an instruction ...", "source": "alpaca"},
        {**COMPLETION, "id": 1, "source": "x", "url": "http://a"},
        {**CHAT, "id": "a", "source": "x", "category": "b", "prompt_id": "c"},
    ],
)
def test_known_metadata_is_let_through(row):
    parse_row(row, "")


def test_columns_are_renamed_and_left_out():
    row = {"context": "1 2", "question": "Add.", "response": "3", "hints": "none"}
    columns = {"question": "instruction", "context": "input", "response": "output", "hints": None}
    assert parse_row(row, "", columns) == InstructionRow("Add.", "1 2", "3")
    swapped = {"prompt": " 3", "completion": "1 + 2 ="}
    assert parse_row(swapped, "", {"prompt": "completion", "completion": "prompt"}) == parse_row(COMPLETION, "")
    assert parse_row({"dialog": TURNS}, "", {"dialog": "messages"}) == ChatRow(tuple(TURNS))
    assert parse_row({"a.b": "1 + 2 =", "completion": " 3"}, "", {"a.b": "prompt"}) == CompletionRow("1 + 2 =", " 3")


def test_keys_of_turns_are_renamed_and_left_out():
    spoken = [{"speaker": "user", "text": "1 + 2?", "mood": "calm"}, {"speaker": "assistant", "text": "3"}]
    columns = {"messages.speaker": "role", "messages.text": "content", "messages.mood": None}
    assert parse_row({"messages": spoken}, "", columns) == ChatRow(tuple(TURNS))
    assert "messages.THEIR_KEY" in refusal({"messages": spoken}).fix


def test_two_columns_do_not_become_one():
    assert (
        "maps 'answer' to 'output', which the row has already"
        in refusal({**INSTRUCTION, "answer": "3"}, {"answer": "output"}).what
    )
    assert "already" in refusal({"a": "x", "b": "y"}, {"a": "prompt", "b": "prompt"}).what


@pytest.mark.parametrize("answer", [1, " in a barn"])
def test_the_right_choice_is_the_answer_where_eval_looks_for_it(answer):
    row = {"question": "Where?", "choices": ["in the attic", " in a barn"], "answer": answer}
    assert parse_row(row, "") == InstructionRow("Where?", "", " in a barn")
    prompted = {**row, "prompt": "It is", "question": None}
    assert parse_row(prompted, "") == CompletionRow("It is", " in a barn")
    assert parse_row({**prompted, "answer": 0}, "") == CompletionRow("It is", " in the attic")
    assert parse_row({**prompted, "answer": 0, "prompt": "It is\n"}, "") == CompletionRow("It is\n", "in the attic")
    for template in TEMPLATES:
        question = Question("Where?", "", tuple(row["choices"]), " in a barn", "question")
        prompt = render_prompt("Where?", "", template, purpose="training")
        if template != "llm-adapters":  # its two prompts differ in white space
            assert prompt + " in a barn" == answered(question, template)[1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answer": 2}, "'2' is none of the 2 choices"),
        ({"answer": None}, "'None' is none of"),
        ({"answer": True}, "'True' is none of"),
        ({"choices": {"text": ["a", "b"]}}, "not a list of texts"),
        ({"choices": ["a", " "]}, "not a list of texts"),
        ({"prompt": "It is"}, "both 'question' and 'prompt'"),
        ({"label": 3}, "the column 'label' carries content"),
    ],
)
def test_choices_that_cannot_be_used_are_refused(change, said):
    assert said in refusal({"question": "Where?", "choices": ["a", "b"], "answer": 0, **change}).what


@pytest.mark.parametrize(
    "row",
    [
        INSTRUCTION,
        {"instruction": "Add.", "output": "3"},
        COMPLETION,
        CHAT,
        {"messages": [*TURNS, *TURNS], "tools": [SCHEMA], "system": "Be brief."},
        {"messages": [{**TURNS[0], "name": "Ann"}, {**TURNS[1], "weight": 0}, *TURNS]},
        {"messages": [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [CALL]}, TURNS[1]]},
        {"question": "Where?", "choices": ["a", "b"], "answer": 1},
    ],
)
def test_the_columns_of_a_row_read_back_as_the_row(row):
    parsed = parse_row(row, "")
    written = json.loads(json.dumps(as_columns(parsed)))
    assert parse_row(written, "") == parsed


@pytest.mark.parametrize("name", ["conversations", "messages"])
def test_sharegpt_is_a_chat(name):
    said = [("system", "Be brief."), ("human", "1 + 2?"), ("gpt", "3")]
    row = {name: [{"from": who, "value": what, "weight": None} for who, what in said]}
    assert parse_row(row, "") == ChatRow(({"role": "system", "content": "Be brief."}, *TURNS))
    row[name][0]["from"] = "bing"
    problem = refusal(row)
    assert "turn 1 is from 'bing'" in problem.what
    assert "human" in problem.fix


def test_sharegpt_tools_are_calls_and_answers():
    said = [("human", "1 + 2?"), ("function_call", json.dumps(FUNCTION)), ("observation", "17"), ("gpt", "3")]
    row = {"conversations": [{"from": who, "value": what} for who, what in said], "tools": json.dumps([SCHEMA])}
    parsed = parse_row(row, "")
    assert parsed.messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert parsed.messages[2] == {"role": "tool", "content": "17"}
    assert parsed.tools == ({"type": "function", "function": SCHEMA},)
    row["conversations"][1]["value"] = "call it"
    assert "the function call of turn 2: not valid JSON" in refusal(row).what


def test_whole_turns_are_kept():
    turn = {"role": "assistant", "content": "3", "reasoning_content": "add them", "name": "Ann"}
    assert chat(turn).messages[-1] == turn
    assert chat({**turn, "tool_calls": [], "audio": None}).messages[-1] == turn


@pytest.mark.parametrize(
    "call", [CALL, FUNCTION, {**CALL, "function": {**FUNCTION, "arguments": json.dumps(FUNCTION["arguments"])}}]
)
def test_tool_calls_are_as_transformers_documents_them(call):
    parsed = chat({"role": "assistant", "content": None, "tool_calls": [call]})
    assert parsed.messages[-1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}


@pytest.mark.parametrize("arguments", ["", None, {}, "{}"])
def test_a_call_may_have_no_arguments(arguments):
    call = {"function": {"name": "now", "arguments": arguments}}
    (parsed,) = chat({"role": "assistant", "tool_calls": [call]}).messages[-1]["tool_calls"]
    assert parsed["function"]["arguments"] == {}


@pytest.mark.parametrize(
    ("calls", "what"),
    [
        ("weather", "the tool_calls of turn 2 are text, not a list"),
        (["weather"], "a tool call of turn 2 has no function with a name"),
        ([{"function": {"arguments": {}}}], "no function with a name"),
        ([{"name": "f", "arguments": "city=Paris"}], "the arguments of 'f' in turn 2: not valid JSON"),
        ([{"name": "f", "arguments": '{"a": 1, "a": 2}'}], "in turn 2: not valid JSON: the key 'a' is repeated"),
        ([{"name": "f", "arguments": "[1]"}], "the arguments of 'f' in turn 2 are a list, not an object"),
    ],
)
def test_calls_that_cannot_be_read_are_refused(calls, what):
    assert what in refusal({"messages": [TURNS[0], {"role": "assistant", "tool_calls": calls}]}).what


@pytest.mark.parametrize(
    ("tools", "what"),
    [
        ("weather", "the column 'tools': not valid JSON"),
        ('"weather"', "the column 'tools' is not a list"),
        (SCHEMA, "the column 'tools' is not a list"),
        (["weather"], "the column 'tools' is not a list"),
    ],
)
def test_tools_that_cannot_be_read_are_refused(tools, what):
    assert what in refusal({**CHAT, "tools": tools}).what


def test_a_list_of_text_parts_is_joined():
    parts = [{"type": "text", "text": "3"}, {"type": "text", "text": " it is", "image": None}]
    assert chat({"role": "assistant", "content": parts}).messages[-1]["content"] == "3 it is"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (None, "the content of turn 1 is null or missing, not text"),
        (3, "the content of turn 1 is a number, not text"),
        ({"text": "a"}, "the content of turn 1 is an object, not text"),
        ([{"type": "image", "url": "a"}], "the content of turn 1 has a part that is of type 'image'"),
        (["a"], "the content of turn 1 has a part that is text"),
        ([{"type": "text"}], "a part of the content of turn 1 has no text"),
        ([{"type": "text", "text": "a", "cache_control": {"type": "x"}}], "has 'cache_control' beside its text"),
    ],
)
def test_content_that_is_no_text_is_refused_by_what_it_is(content, what):
    assert what in refusal({"messages": [{"role": "user", "content": content}, TURNS[1]]}).what


def test_a_system_column_is_the_first_turn():
    system = {"role": "system", "content": "Be brief."}
    assert parse_row({**CHAT, "system": "Be brief."}, "") == ChatRow((system, *TURNS))
    weighted = [TURNS[0], {**TURNS[1], "weight": 0}, *TURNS]
    assert parse_row({"messages": weighted, "system": "Be brief."}, "").unlearned == {2}
    assert parse_row({"messages": [system, *TURNS], "system": "Be brief. "}, "") == ChatRow((system, *TURNS))
    assert "differ" in refusal({"messages": [system, *TURNS], "system": "Be kind."}).what
    assert "'system' is a list" in refusal({**CHAT, "system": ["a"]}).what


def test_a_chat_in_two_columns_is_told_where_it_belongs():
    problem = refusal({"prompt": TURNS[:1], "completion": TURNS[1:]})
    assert "but a list of turns" in problem.what
    assert "messages" in problem.fix
