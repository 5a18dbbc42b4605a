"""Prompt templates, and rows turned into token ids with the boundary between prompt and answer."""

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

from poc_lora.data.rows import ChatRow, CompletionRow, InstructionRow, Row
from poc_lora.errors import DataError, ModelError

# Template name -> for training and for evaluation -> without an input and with one. `llm-adapters` is what that project
# trains and evaluates with to the byte (github.com/HZQ950419/LLM-Adapters, 6e05a24): its two differ in white space.
TEMPLATES: dict[str, dict[str, dict[str, str]]] = json.loads(
    Path(__file__).with_name("templates.json").read_text(encoding="utf-8")
)


@dataclass(frozen=True)
class Example:
    """One tokenised row: `ids[answer_start:]` is the answer, which ends with EOS unless it was cut off."""

    ids: tuple[int, ...]
    answer_start: int


@dataclass(frozen=True)
class Encoded:
    """The usable examples of a data set and what happened to the rest."""

    examples: list[Example]
    shortened: int  # rows cut to max_length that keep a part of their answer
    lost: int  # rows left out because the cut took their whole answer


def render_prompt(instruction: str, input: str, template: str, *, purpose: str = "evaluation") -> str:
    """The text before the answer, for `training` or `evaluation`. Braces in the row are left alone."""
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
    """Tokenise rows as prompt + answer + EOS, at most `max_length` tokens each.

    The boundary is found on tokens: the answer starts where the tokens of prompt + answer leave those of
    the prompt alone, so a token that holds the end of one and the start of the other counts as answer.
    A row whose whole answer is cut off teaches nothing of the task: it is left out and counted.
    now: what chat templates that write a date take for the time, so that rows are the same on another day; default,
    the time of the call.
    Raises ModelError for a tokenizer without EOS or, for chats, without a chat template, and DataError for a
    chat that the template refuses.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no EOS token, so an answer could not end", where="model.name")
    with _stopped_clock(now or datetime.now()):
        pairs = [_texts(row, tokenizer, template, f"data.train, row {number}") for number, row in enumerate(rows, 1)]
    if not pairs:
        raise DataError("there are no training rows", where="data.train")
    chats = [isinstance(row, ChatRow) for row in rows]
    prompt_ids = _tokenise(tokenizer, [prompt for prompt, _ in pairs], chats)
    whole_ids = _tokenise(tokenizer, [prompt + answer for prompt, answer in pairs], chats)
    examples, shortened, lost = [], 0, 0
    for prompt, whole in zip(prompt_ids, whole_ids, strict=True):
        start = max(1, _common_prefix(prompt, whole))  # nothing comes before the first token to predict it from
        if whole[-1:] != [tokenizer.eos_token_id]:
            whole = [*whole, tokenizer.eos_token_id]
        if start >= max_length:
            lost += 1
            continue
        shortened += len(whole) > max_length
        examples.append(Example(tuple(whole[:max_length]), start))
    return Encoded(examples, shortened, lost)


@contextlib.contextmanager
def _stopped_clock(now: datetime) -> Iterator[None]:
    """Within the block chat templates take `now` for the time.

    transformers gives them one function that reads the clock, and takes no other in its place.
    """

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
    except TemplateError as problem:  # templates refuse roles, or orders of roles, that the model does not know
        raise DataError(f"the tokenizer's chat template refuses the row: {problem}", where=where) from problem
    shared = _common_prefix(prompt, whole)
    return whole[:shared], whole[shared:].rstrip("\n")


def _tokenise(tokenizer: PreTrainedTokenizerBase, texts: list[str], chats: list[bool]) -> list[list[int]]:
    """Token ids of each text; a chat template writes its own special tokens, so none are added to it."""
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
