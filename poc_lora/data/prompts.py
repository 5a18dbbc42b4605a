"""Prompt templates, and tokenisation of rows with the boundary between prompt and answer."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from poc_lora.data.limits import require_length
from poc_lora.data.rows import ChatRow, CompletionRow, InstructionRow, Row
from poc_lora.errors import DataError, ModelError

# Template name -> for training and for evaluation -> without an input and with one. `llm-adapters` is what that project
# trains and evaluates with to the byte (github.com/HZQ950419/LLM-Adapters, 6e05a24): its two differ in white space.
TEMPLATES: dict[str, dict[str, dict[str, str]]] = json.loads(
    Path(__file__).with_name("templates.json").read_text(encoding="utf-8")
)


@dataclass(frozen=True)
class Example:
    """One tokenised row; `ids[answer_start:]` is the answer, which ends with EOS unless it was truncated."""

    ids: tuple[int, ...]
    answer_start: int


@dataclass(frozen=True)
class Encoded:
    """The examples of a data set, and how many rows did not fit."""

    examples: list[Example]
    truncated: int  # rows truncated to max_length that keep a part of their answer
    dropped: int  # rows left out because truncation removes their whole answer


def render_prompt(instruction: str, input: str, template: str, *, purpose: str = "evaluation") -> str:
    """Returns the text before the answer, for `training` or `evaluation`. Braces in the row are not replaced."""
    text = TEMPLATES[template][purpose]["with_input" if input else "alone"]
    head, _, tail = text.partition("{instruction}")
    middle, _, end = tail.partition("{input}")
    return head + instruction + (middle + input + end if input else tail)


def encode_rows(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str,
    max_length: int,
    now: datetime | None = None,
) -> Encoded:
    """Tokenise rows as prompt + answer + EOS.

    The answer starts at the first token where prompt + answer differs from the prompt alone, so a token with the end
    of the prompt and the start of the answer belongs to the answer.

    Args:
        rows: The rows.
        tokenizer: The base model's tokenizer.
        template: The prompt template's name, a key of `TEMPLATES`.
        max_length: Rows are truncated to this many tokens, and dropped if that removes their whole answer.
        now: The time for chat templates that write a date, so that rows do not depend on the day; default: now.

    Raises:
        ModelError: The tokenizer has no EOS token, or no chat template for rows that are chats.
        DataError: There are no rows, or the chat template refuses one.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no EOS token, so an answer could not end", where="model.name")
    with _stopped_clock(now or datetime.now()):
        pairs = [_texts(row, tokenizer, template, f"data.train, row {number}") for number, row in enumerate(rows, 1)]
    if not pairs:
        raise DataError("there are no training rows", where="data.train")
    for number, texts in enumerate(pairs, 1):
        require_length("".join(texts), f"data.train, row {number}")
    chats = [isinstance(row, ChatRow) for row in rows]
    prompt_ids = _tokenise(tokenizer, [prompt for prompt, _ in pairs], chats)
    whole_ids = _tokenise(tokenizer, [prompt + answer for prompt, answer in pairs], chats)
    examples, truncated, dropped = [], 0, 0
    for prompt, whole in zip(prompt_ids, whole_ids, strict=True):
        start = max(1, _common_prefix(prompt, whole))  # the first token cannot be predicted
        if whole[-1:] != [tokenizer.eos_token_id]:
            whole = [*whole, tokenizer.eos_token_id]
        if start >= max_length:
            dropped += 1
            continue
        truncated += len(whole) > max_length
        examples.append(Example(tuple(whole[:max_length]), start))
    return Encoded(examples, truncated, dropped)


@contextlib.contextmanager
def _stopped_clock(now: datetime) -> Iterator[None]:
    """Within the block, chat templates see `now` as the time; transformers has no argument for it."""

    class Stopped(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Any:
            return now

    library: Any = chat_template_utils
    original, library.datetime = library.datetime, Stopped
    try:
        yield
    finally:
        library.datetime = original


def _texts(row: Row, tokenizer: PreTrainedTokenizerBase, template: str, where: str) -> tuple[str, str]:
    if isinstance(row, InstructionRow):
        return render_prompt(row.instruction, row.input, template, purpose="training"), row.output
    if isinstance(row, CompletionRow):
        return row.prompt, row.completion
    if tokenizer.chat_template is None:
        raise ModelError("the rows are chats but the tokenizer has no chat template", where="data.train")
    turns = list(row.messages)
    try:
        prompt = str(tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True))
        whole = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except TemplateError as problem:  # templates refuse unknown roles and orders of roles
        raise DataError(f"the tokenizer's chat template refuses the row: {problem}", where=where) from problem
    shared = _common_prefix(prompt, whole)
    return whole[:shared], whole[shared:].rstrip("\n")


def _tokenise(tokenizer: PreTrainedTokenizerBase, texts: list[str], chats: list[bool]) -> list[list[int]]:
    """Token ids of each text; no special tokens are added to chats, whose templates write their own."""
    ids: list[list[int]] = [[] for _ in texts]
    for chat in (False, True):
        chosen = [i for i, is_chat in enumerate(chats) if is_chat == chat]
        if chosen:
            encoded = tokenizer([texts[i] for i in chosen], add_special_tokens=not chat)["input_ids"]
            for i, tokens in zip(chosen, encoded, strict=True):
                ids[i] = list(tokens)
    return ids


def _common_prefix(a: Sequence[object], b: Sequence[object]) -> int:
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
