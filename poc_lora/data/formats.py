"""The formats of a training row, told apart by its columns:

instruction / input / output     the LLM-Adapters and Alpaca format, for a prompt template
prompt / completion              text that is used as it is
text                             the same without a prompt: all of it is the answer
question / choices / answer      as `eval` scores it (data/questions.py): the right choice is the answer
messages, or conversations       a chat for the tokenizer's chat template, with `tools` and `system` beside it;
                                 turns are role/content or ShareGPT's from/value

A column that carries content and that the row's format does not use is refused: it would be dropped without a word.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from poc_lora.errors import DataError
from poc_lora.files import unique_keys

# Columns, and keys of turns, that say where a row comes from: left out without a word. Known from public data sets.
METADATA = frozenset(
    "id idx index uuid hash prompt_id conversation_id source dataset split category topic language lang url license "
    "timestamp".split()
)
# Format -> the columns that it uses, and those that repeat them: the label in LLM-Adapters, Alpaca's rendered prompt.
FORMATS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "chat": (("messages", "tools", "system"), ()),
    "question/choices/answer": (("question", "prompt", "choices", "answer"), ()),
    "prompt/completion": (("prompt", "completion"), ()),
    "text": (("text",), ()),
    "instruction/input/output": (("instruction", "input", "output"), ("answer", "text")),
}
SHAREGPT_ROLES = {
    **dict(human="user", user="user", gpt="assistant", assistant="assistant", system="system"),
    **dict(tool="tool", observation="tool", function_response="tool", function_call="assistant"),
}


@dataclass(frozen=True)
class InstructionRow:
    instruction: str
    input: str
    output: str
    where: str = field(default="", compare=False, repr=False)


@dataclass(frozen=True)
class CompletionRow:
    """Text as it is. A text that is learnt whole has an empty prompt."""

    prompt: str
    completion: str
    where: str = field(default="", compare=False, repr=False)


@dataclass(frozen=True)
class ChatRow:
    """A chat that ends with the assistant's turn.

    messages: turns with at least a role and a content, as chat templates take them.
    tools: JSON schemas of the functions that the assistant may call.
    unlearned: indices of the turns with weight 0.
    """

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()
    unlearned: frozenset[int] = frozenset()
    where: str = field(default="", compare=False, repr=False)


Row = InstructionRow | CompletionRow | ChatRow


def parse_row(row: Any, where: str, columns: Mapping[str, str | None] | None = None) -> Row:
    """Read one row.

    Args:
        row: What the file holds.
        where: The file and the row's number, for errors and as the row's place.
        columns: The configuration's `data.columns`.

    Raises:
        DataError: The row fits no format, or carries content that its format does not use.
    """
    if not isinstance(row, dict):
        raise DataError("a row is not an object with columns", where=where)
    row = _rename(row, columns or {}, where)
    if "messages" not in row and "conversations" in row:
        row = {"messages" if name == "conversations" else name: value for name, value in row.items()}
    kind = _format(row, where)
    parsed = _parse(row, kind, where)
    _require_used(row, kind, where)
    return parsed


def _parse(row: dict[str, Any], kind: str, where: str) -> Row:
    if kind == "chat":
        return _parse_chat(row, where)
    if kind == "prompt/completion":
        return CompletionRow(_text(row, "prompt", kind, where), _text(row, "completion", kind, where), where)
    if kind == "text":
        return CompletionRow("", _text(row, "text", kind, where), where)
    if kind == "question/choices/answer":
        return _parse_choices(row, kind, where)
    extra = "" if row.get("input") is None else row["input"]
    if not _is_text(extra):
        raise DataError(f"the column 'input' of an {kind} row is not text", where=where)
    return InstructionRow(_text(row, "instruction", kind, where), extra, _text(row, "output", kind, where), where)


def as_columns(row: Row) -> dict[str, Any]:
    """Returns columns from which `parse_row` reads an equal row."""
    if isinstance(row, InstructionRow):
        return {"instruction": row.instruction, "input": row.input, "output": row.output}
    if isinstance(row, CompletionRow):
        return {"prompt": row.prompt, "completion": row.completion} if row.prompt else {"text": row.completion}
    turns = [{**turn, "weight": 0} if i in row.unlearned else turn for i, turn in enumerate(row.messages)]
    return {"messages": turns} | ({"tools": list(row.tools)} if row.tools else {})


def carries(value: Any) -> bool:
    """Whether a value says anything; libraries fill the columns that a row lacks with null."""
    return bool(value.strip()) if isinstance(value, str) else value not in (None, [], {})


def _rename(row: dict[str, Any], columns: Mapping[str, str | None], where: str) -> dict[str, Any]:
    """Apply `data.columns`, whose keys are columns, or COLUMN.KEY for a key of a chat's turns."""
    for name, new in columns.items():
        column, _, key = name.partition(".")
        if name not in row and key and isinstance(row.get(column), list):
            row = row | {column: [_moved(turn, {key: new}, where) for turn in row[column]]}
    return _moved(row, {name: new for name, new in columns.items() if name in row}, where) if columns else row


def _moved(row: Any, names: Mapping[str, str | None], where: str) -> Any:
    if not isinstance(row, dict):
        return row
    moved = {name: value for name, value in row.items() if name not in names}
    for name, new in names.items():
        if new is not None and name in row:
            if carries(moved.get(new)):
                raise DataError(
                    f"data.columns maps {name!r} to {new!r}, which the row has already",
                    where=where,
                    fix=f"map {new!r} to another column, or to null",
                )
            moved[new] = row[name]
    return moved


def _format(row: dict[str, Any], where: str) -> str:
    filled = {name for name, value in row.items() if carries(value)}
    for names in (filled, row.keys()):
        if "choices" in names and names & {"question", "prompt"}:
            return "question/choices/answer"
        for kind, own in (("chat", "messages"), ("prompt/completion", "prompt completion")):
            if names & set(own.split()):
                return kind
        if names & {"instruction", "output"}:
            return "instruction/input/output"
        if "text" in names:  # of other rows it is metadata, or refused
            return "text"
    raise DataError(
        f"columns {', '.join(map(repr, row)) or 'none'} fit none of the formats",
        where=where,
        fix="rows have instruction/input/output, prompt/completion, question/choices/answer, messages (ShareGPT: "
        "conversations) or text; data.columns: {THEIR_COLUMN: OUR_COLUMN} renames theirs",
    )


def _require_used(row: dict[str, Any], kind: str, where: str) -> None:
    used, repeated = FORMATS[kind]
    unused = [name for name, value in row.items() if name not in {*used, *repeated, *METADATA} and carries(value)]
    if unused:
        fix = f"leave them out: {leave_out(unused)}"
        if {"system", "history", "tools"} & set(unused):
            fix = f"write the row as messages, which can have tools and a system turn, or {fix}"
        raise DataError(
            f"{_listed('column', unused)} content that the row's format, {kind}, does not use", where=where, fix=fix
        )


def leave_out(names: list[str]) -> str:
    """Returns the setting that leaves out these columns."""
    return "data.columns: {" + ", ".join(f"{name}: null" for name in names) + "}"


def _listed(word: str, names: list[str]) -> str:
    return f"the {word}{'s' if len(names) > 1 else ''} {', '.join(map(repr, names))} carr" + (
        "y" if len(names) > 1 else "ies"
    )


def _text(row: dict[str, Any], column: str, kind: str, where: str) -> str:
    if column not in row:
        raise DataError(
            f"the column '{column}' is missing from a {kind} row", where=where, fix=f"its columns are {', '.join(row)}"
        )
    text = row[column]
    if isinstance(text, str) and text and _is_text(text):
        return text
    chat = isinstance(text, list) and text and all(isinstance(turn, dict) for turn in text)
    raise DataError(
        f"the column '{column}' is empty or not text" + (", but a list of turns" if chat else ""),
        where=where,
        fix=f"a {kind} row has text; write a chat as one column, messages" if chat else None,
    )


def _parse_choices(row: dict[str, Any], kind: str, where: str) -> Row:
    """The row's text up to the right choice, as `eval` scores it."""
    choices, answer = row["choices"], row.get("answer")
    if not isinstance(choices, list) or not all(_is_text(choice) and choice.strip() for choice in choices):
        raise DataError(f"the column 'choices' of a {kind} row is not a list of texts", where=where)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        answer = choices[answer]
    if not isinstance(answer, str) or answer not in choices:
        raise DataError(
            f"the answer {str(answer)[:60]!r} is none of the {len(choices)} choices",
            where=where,
            fix="`answer` is the number of the right choice, from 0, or its text",
        )
    if carries(row.get("question")) and carries(row.get("prompt")):
        raise DataError("the row has both 'question' and 'prompt'", where=where, fix=leave_out(["question"]))
    if not carries(row.get("prompt")):
        return InstructionRow(_text(row, "question", kind, where), "", answer, where)
    prompt = _text(row, "prompt", kind, where)
    space = "" if prompt[-1].isspace() or answer[0].isspace() else " "
    return CompletionRow(prompt, space + answer, where)


def _is_text(value: Any) -> bool:
    """Whether `value` is text that UTF-8 can encode; JSON escapes may contain half of a surrogate pair."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _parse_chat(row: dict[str, Any], where: str) -> ChatRow:
    given = row["messages"]
    if not isinstance(given, list):
        raise DataError(f"'messages' is {_kind(given)}, not a list of turns", where=where)
    parsed = [_parse_turn(turn, f"turn {number}", where) for number, turn in enumerate(given, 1)]
    turns = [turn for turn, _ in parsed]
    unlearned = {i for i, (_, weight) in enumerate(parsed) if weight == 0}
    system = row.get("system")
    if carries(system):
        if not isinstance(system, str) or not _is_text(system):
            raise DataError(f"the column 'system' is {_kind(system)}, not text", where=where)
        if not turns or turns[0]["role"] != "system":
            turns, unlearned = [{"role": "system", "content": system}, *turns], {i + 1 for i in unlearned}
        elif turns[0]["content"].strip() != system.strip():
            raise DataError(
                "the column 'system' and the chat's own system turn differ", where=where, fix=leave_out(["system"])
            )
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        last = f"{len(turns)} of them, the last the {turns[-1]['role']}'s" if turns else "none"
        raise DataError(f"a chat is at least two turns and ends with the assistant's; this has {last}", where=where)
    if not any(carries(value) for name, value in turns[-1].items() if name != "role"):
        raise DataError("the last turn, the assistant's, is empty", where=where)
    return ChatRow(tuple(turns), _parse_tools(row.get("tools"), where), frozenset(unlearned), where)


def _parse_turn(turn: Any, name: str, where: str) -> tuple[dict[str, Any], int]:
    """Returns a turn as chat templates take it, and its weight, 1 unless it has one."""
    if not isinstance(turn, dict):
        raise DataError(f"{name} is {_kind(turn)}, not an object with role and content", where=where)
    if "role" not in turn and "from" in turn:
        turn = _from_sharegpt(turn, name, where)
    if "role" in turn and not isinstance(turn["role"], str):
        raise DataError(f"the role of {name} is {_kind(turn['role'])}, not text", where=where)
    if "role" not in turn:
        raise DataError(
            f"{name} has no role; its keys are {', '.join(turn) or 'none'}",
            where=where,
            fix="turns have role and content, or ShareGPT's from and value; data.columns can rename keys of turns: "
            "{messages.THEIR_KEY: role}",
        )
    weight = turn.get("weight")
    if weight is not None and weight not in (0, 1):
        raise DataError(f"the weight of {name} is {weight!r}, neither 0 nor 1", where=where)
    parsed = {"role": turn["role"], "content": ""}
    for key, value in turn.items():
        if key == "content" or (key not in ("role", "weight") and carries(value)):
            parsed[key] = value
    if "tool_calls" in parsed:
        parsed["tool_calls"] = _parse_calls(parsed["tool_calls"], name, where)
    parsed["content"] = _parse_content(turn.get("content"), name, "tool_calls" in parsed, where)
    _require_utf8(parsed, name, where)
    return parsed, 1 if weight is None else int(weight)


def _from_sharegpt(turn: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    if not isinstance(turn["from"], str) or turn["from"] not in SHAREGPT_ROLES:
        raise DataError(
            f"{name} is from {turn['from']!r}", where=where, fix=f"turns are from {', '.join(SHAREGPT_ROLES)}"
        )
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    if turn["from"] != "function_call":
        return {"role": SHAREGPT_ROLES[turn["from"]], "content": turn.get("value"), **rest}
    calls = _parse_json(turn.get("value"), f"the function call of {name}", where)
    return {"role": "assistant", "tool_calls": calls if isinstance(calls, list) else [calls], **rest}


def _parse_content(content: Any, name: str, beside_calls: bool, where: str) -> str:
    if content is None and beside_calls:
        return ""
    if isinstance(content, list):
        return "".join(_parse_part(part, name, where) for part in content)
    if not isinstance(content, str):
        raise DataError(
            f"the content of {name} is {_kind(content)}, not text",
            where=where,
            fix="only a turn with tool_calls may have null" if content is None else "write it as text",
        )
    return content


def _parse_part(part: Any, name: str, where: str) -> str:
    fix = "content is text, or a list of {type: text, text: ...}"
    if not isinstance(part, dict) or part.get("type") != "text":
        kind = f"of type {part.get('type')!r}" if isinstance(part, dict) else _kind(part)
        raise DataError(f"the content of {name} has a part that is {kind}", where=where, fix=fix)
    more = [key for key, value in part.items() if key not in ("type", "text") and carries(value)]
    if more or not isinstance(part.get("text"), str):
        problem = f"has {', '.join(map(repr, more))} beside its text" if more else "has no text"
        raise DataError(f"a part of the content of {name} {problem}", where=where, fix=fix)
    text: str = part["text"]
    return text


def _parse_calls(calls: Any, name: str, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise DataError(f"the tool_calls of {name} are {_kind(calls)}, not a list", where=where)
    parsed = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"a tool call of {name} has no function with a name", where=where)
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            label = f"the arguments of {function['name']!r} in {name}"
            arguments = _parse_json(arguments, label, where) if arguments.strip() else {}
        if not isinstance(arguments := {} if arguments is None else arguments, dict):
            raise DataError(
                f"the arguments of {function['name']!r} in {name} are {_kind(arguments)}, not an object", where=where
            )
        rest = {} if call is function else {key: value for key, value in call.items() if key != "function"}
        parsed.append({"type": "function", **rest, "function": {**function, "arguments": arguments}})
    return parsed


def _parse_tools(tools: Any, where: str) -> tuple[dict[str, Any], ...]:
    if not carries(tools):
        return ()
    if isinstance(tools, str):
        tools = _parse_json(tools, "the column 'tools'", where)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError("the column 'tools' is not a list of JSON schemas", where=where)
    _require_utf8(tools, "'tools'", where)
    # Some data sets leave out what templates expect around a schema.
    return tuple(
        {"type": "function", "function": tool} if "function" not in tool and "name" in tool else tool for tool in tools
    )


def _parse_json(text: Any, what: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except (TypeError, ValueError, RecursionError) as problem:
        raise DataError(f"{what}: not valid JSON: {getattr(problem, 'msg', problem)}", where=where) from problem


def _require_utf8(value: Any, name: str, where: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except (UnicodeEncodeError, ValueError, RecursionError) as problem:
        raise DataError(f"{name} holds text that is not valid: {problem}", where=where) from problem


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null or missing"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
