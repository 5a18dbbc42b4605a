"""A chat as text: the tokenizer's chat template applied to its turns, and where in the text the learned turns stand."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from poc_lora.config import Learn
from poc_lora.data.formats import METADATA, ChatRow, carries, leave_out
from poc_lora.errors import DataError, ModelError
from poc_lora.files import read_text

MAX_TEMPLATE_BYTES = 2**20
Turn = dict[str, Any]
# Keys that tie a tool's answer to its call, which most templates leave to the order of the turns.
LINKS = dict.fromkeys(("tool", "function", "ipython"), frozenset({"name", "tool_call_id"}))


@dataclass(frozen=True)
class RenderedRow:
    """A row as text. `answers` are its spans of characters that are to be learnt, in order; at least one."""

    text: str
    answers: tuple[tuple[int, int], ...]


class ChatTemplate:
    """The tokenizer's chat template, with what it was found not to use of a turn."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._unused: dict[Any, list[str]] = {}  # by what a template can tell turns apart by

    def render(self, row: ChatRow, learn: Learn) -> RenderedRow:
        """Render a chat.

        Args:
            row: The chat.
            learn: Which turns are answers: the last, or each of the assistant's; with `all`, the last.

        Raises:
            ModelError: The tokenizer has no chat template, or one that is not valid Jinja.
            DataError: The template refuses the chat, leaves out something that carries content, or writes a turn
                otherwise once others follow, so that its place cannot be told.
        """
        if self._tokenizer.chat_template is None:
            raise ModelError(
                "the row is a chat, but the base's tokenizer has no chat template",
                where=row.where,
                fix="take the base's instruct model, or give a template: data.chat_template: FILE.jinja",
            )
        learned = _learned_turns(row, learn)
        try:
            whole = self._text(row, row.messages)
        except TemplateSyntaxError as problem:
            raise ModelError(
                f"the chat template is not valid Jinja: line {problem.lineno}: {problem.message}",
                where="data.chat_template",
                fix="correct the file, or if it is not set, the template of the base's tokenizer",
            ) from problem
        except Exception as problem:  # a template runs on the row, and can fail in any way
            raise DataError(f"the tokenizer's chat template refuses the row: {problem}", where=row.where) from problem
        self._require_used(row)
        spans = tuple(self._place(row, i, whole) for i in learned)
        return RenderedRow(whole[: max(spans[-1][1], len(whole.rstrip("\n")))], spans)

    def _text(self, row: ChatRow, turns: Sequence[Turn], *, prompt: bool = False) -> str:
        """The text of some turns; with `prompt`, and of the beginning of the assistant's next turn."""
        options: Any = {"tools": list(row.tools)} if row.tools else {}
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    list(turns), tokenize=False, add_generation_prompt=prompt, **options
                )
            )
        except Exception:
            if not any("tool_calls" in turn for turn in turns):
                raise
            written = [_with_written_arguments(turn) for turn in turns]  # as some templates take them
            return str(
                self._tokenizer.apply_chat_template(written, tokenize=False, add_generation_prompt=prompt, **options)
            )

    def _place(self, row: ChatRow, i: int, whole: str) -> tuple[int, int]:
        """The span of turn i's answer in the text: after the prompt for it, up to and with the mark of its end."""
        turns, name, is_last = row.messages, _name(row, i), i == len(row.messages) - 1
        try:
            before = self._text(row, turns[:i])
            prompt = self._text(row, turns[:i], prompt=True)
            through = whole if is_last else self._text(row, turns[: i + 1])
        except Exception as problem:
            raise DataError(
                f"the chat template cannot write the chat up to {name}, so its place cannot be told: {problem}",
                where=row.where,
                fix=None if is_last else "give the turn weight 0, or set data.learn: last",
            ) from problem
        start, end = common_prefix(prompt, whole), through.rstrip("\n")
        own = common_prefix(before, prompt)  # without the mark of a chat's end that some templates write
        content = str(turns[i]["content"]).rstrip()
        if not whole.startswith(end):
            end = end.removesuffix(str(self._tokenizer.eos_token)).rstrip("\n")
            if content and end.endswith(content):
                end = ""  # the end of the turn is marked otherwise once others follow
        if start < own or not end or not whole.startswith(end):
            other = "the turns before it otherwise than in its prompt" if is_last else "it otherwise once others follow"
            split = "" if is_last else "set data.learn: last and give each of the assistant's turns its own row, or "
            raise DataError(
                f"the place of {name} cannot be told: the chat template writes {other}",
                where=row.where,
                fix=f"{split}set data.chat_template to a template that does not look ahead, such as those of "
                "TRL's get_training_chat_template",
            )
        if _squeezed(content) not in _squeezed(whole[own : len(end)]):
            raise DataError(
                f"the chat template leaves out a part of the content of {name}, which is to be learnt",
                where=row.where,
                fix="take out of the rows what the template leaves out, such as <think>...</think>, or set "
                "data.chat_template to a template that writes it",
            )
        return start, max(start, len(end))

    def _require_used(self, row: ChatRow) -> None:
        """Refuse what carries content and can be changed without changing the text."""
        turns, found = row.messages, []
        for i, turn in enumerate(turns):
            around = [turns[j]["role"] if 0 <= j < len(turns) else None for j in (i - 1, i, i + 1)]
            filled = frozenset(key for key, value in turn.items() if carries(value))
            shape = (*around, filled, len(turn.get("tool_calls", ())), bool(row.tools))
            if shape not in self._unused:
                self._unused[shape] = self._unused_keys(row, i)
            found += [(key, i) for key in self._unused[shape]]
        if found:
            key, i = found[0]
            raise DataError(
                f"the chat template does not write '{key}' of {_name(row, i)}",
                where=row.where,
                fix=f"use a chat template that does, or leave it out: {leave_out([f'messages.{key}'])}"
                if key != "content"
                else "use a chat template that does, or take it out of the row",
            )
        if row.tools:
            if "tools" not in self._unused:
                self._unused["tools"] = ["tools"] * self._same(ChatRow(turns), row)
            if self._unused["tools"]:
                raise DataError(
                    "the chat template does not write the row's tools",
                    where=row.where,
                    fix=f"use a chat template that does, or leave them out: {leave_out(['tools'])}",
                )

    def _unused_keys(self, row: ChatRow, i: int) -> list[str]:
        """The keys of turn i that the template does not write, be the turn inside the chat or its last."""
        turns, turn = row.messages, row.messages[i]
        metadata = {"role", *METADATA, *LINKS.get(turn["role"], ())}
        keys = [key for key, value in turn.items() if key not in metadata and carries(value)]
        unused = []
        for key in keys:
            lesser = [{k: v for k, v in turn.items() if k != key}]
            if key == "content":  # other text, since templates expect some
                lesser = [{**turn, key: turn[key] + " and more"}]
            if key == "tool_calls" and len(turn[key]) > 1:  # each of them counts
                lesser = [{**turn, key: turn[key][:j] + turn[key][j + 1 :]} for j in range(len(turn[key]))]
            for other in lesser:
                rest = [*turns[:i], other, *turns[i + 1 :]]
                without = replace(row, messages=tuple(rest))
                if self._same(without, row) and self._same(_up_to(without, i), _up_to(row, i)):
                    unused.append(key)
                    break
        return unused

    def _same(self, changed: ChatRow, row: ChatRow) -> bool:
        """Whether the template writes both chats alike, or cannot write this one at all."""
        try:
            expected = self._text(row, row.messages)
        except Exception:
            return True
        try:
            return self._text(changed, changed.messages) == expected
        except Exception:
            return False


def read_chat_template(path: Path) -> str:
    """Read the file of `data.chat_template`. Raises DataError."""
    text = read_text(path, error=DataError, max_bytes=MAX_TEMPLATE_BYTES)
    if not text.strip():
        raise DataError("the chat template is empty", where=path, fix="write a Jinja template, or unset it")
    return text


def common_prefix(a: Sequence[object], b: Sequence[object]) -> int:
    """Returns how many first elements two sequences share."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def _learned_turns(row: ChatRow, learn: Learn) -> list[int]:
    last, weightless = len(row.messages) - 1, sorted(row.unlearned)
    fix = "set data.learn: assistant, which learns the assistant's turns but those with weight 0"
    if learn == "all" and weightless:
        raise DataError(f"{_name(row, weightless[0])} has weight 0, but data.learn is all", where=row.where, fix=fix)
    if learn == "last" and last in row.unlearned:
        raise DataError("the last turn has weight 0, but data.learn is last", where=row.where, fix=fix)
    if learn != "assistant":
        return [last]
    learned = [i for i, turn in enumerate(row.messages) if turn["role"] == "assistant" and i not in row.unlearned]
    if not learned:
        raise DataError("every turn of the assistant has weight 0, so nothing is to be learnt", where=row.where)
    if learned[0] == 0:
        raise DataError(
            "the chat begins with the assistant's turn, so there is no prompt for it",
            where=row.where,
            fix="give that turn weight 0, or set data.learn: last",
        )
    return learned


def _with_written_arguments(turn: Turn) -> Turn:
    if "tool_calls" not in turn:
        return turn
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        for call in turn["tool_calls"]
    ]
    return {**turn, "tool_calls": calls}


def _up_to(row: ChatRow, i: int) -> ChatRow:
    return replace(row, messages=row.messages[: i + 1])


def _name(row: ChatRow, i: int) -> str:
    return f"turn {i + 1} ({row.messages[i]['role']})"


def _squeezed(text: str) -> str:
    """The text without white space, which templates trim."""
    return "".join(text.split())
