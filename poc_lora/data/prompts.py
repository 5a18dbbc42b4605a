"""Prompt templates, and tokenisation of rows with the boundary between prompt and answer."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from poc_lora.config import Learn
from poc_lora.data.bounded import map_bounded
from poc_lora.data.chats import ChatTemplate, RenderedRow, common_prefix
from poc_lora.data.formats import ChatRow, CompletionRow, InstructionRow, Row
from poc_lora.data.limits import require_length
from poc_lora.data.rows import BadRows
from poc_lora.errors import DataError, ModelError

LONGEST_ROW = 2048  # tokens, where a run does not say
# Template name -> for training and for evaluation -> without an input and with one. `llm-adapters` is what that project
# trains and evaluates with to the byte (github.com/HZQ950419/LLM-Adapters, 6e05a24): its two differ in white space.
TEMPLATES: dict[str, dict[str, dict[str, str]]] = json.loads(
    Path(__file__).with_name("templates.json").read_text(encoding="utf-8")
)


@dataclass(frozen=True)
class Example:
    """One tokenised row, which ends with EOS unless it was truncated.

    ids: its tokens.
    supervised: the spans of tokens that have a loss, as (start, end), in order; token 0 never has one.
    """

    ids: tuple[int, ...]
    supervised: tuple[tuple[int, int], ...]


@dataclass
class Encoded:
    """The examples of a data set, and how many rows did not fit."""

    examples: list[Example]
    answers: list[Example]  # the same with a loss on the answers alone, whatever is learnt
    rows: list[Row]  # the row of each example
    lengths: list[int]  # tokens of every row before truncation, dropped ones too
    truncated: int  # rows truncated to max_length that keep a part of what is learnt
    dropped: int  # rows left out because truncation removes all answers

    @classmethod
    def empty(cls) -> "Encoded":
        """Returns what there is of no rows."""
        return cls([], [], [], [], 0, 0)


def render_prompt(instruction: str, input: str, template: str, *, purpose: str = "evaluation") -> str:
    """Returns the text before the answer, for `training` or `evaluation`. Braces in the row are not replaced."""
    text = TEMPLATES[template][purpose]["with_input" if input else "alone"]
    head, _, tail = text.partition("{instruction}")
    middle, _, end = tail.partition("{input}")
    return head + instruction + (middle + input + end if input else tail)


def row_limit(max_length: int | Literal["auto"], context: int | None) -> int:
    """Returns the tokens that rows are truncated to: `auto` is `LONGEST_ROW`, or the base's context if shorter."""
    return min(context or LONGEST_ROW, LONGEST_ROW) if max_length == "auto" else max_length


def encode_rows(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str,
    max_length: int,
    learn: Learn = "all",
    now: datetime | None = None,
    bad: BadRows | None = None,
) -> Encoded:
    """Tokenise rows as prompt + answer + EOS.

    An answer starts at the first token where the text up to its end differs from the text before it, so a token with
    the end of the prompt and the start of the answer belongs to the answer.

    Args:
        rows: The rows.
        tokenizer: The base model's tokenizer.
        template: The prompt template's name, a key of `TEMPLATES`.
        max_length: Rows are truncated to this many tokens, and dropped if that removes all their answers.
        learn: The tokens with a loss: those of the `last` answer, of every turn of the `assistant`, or `all`.
        now: The time for chat templates that write a date, so that rows do not depend on the day; default: now.
        bad: Where rows that the chat template does not fit are added.

    Raises:
        ModelError: The tokenizer has no EOS token, or no chat template for rows that are chats.
        DataError: There are no rows, nor bad ones; without `bad`, also if the chat template does not fit one.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no EOS token, so an answer could not end", where="model.name")
    if not rows and not (bad and bad.count):
        raise DataError("there are no training rows", where="data.train")
    problems = BadRows() if bad is None else bad
    texts, used = [], []
    with _rendered_chats(rows, tokenizer, learn, now or datetime.now()) as rendered_chats:
        for row in rows:
            try:
                if isinstance(row, ChatRow):
                    found = next(rendered_chats)
                else:
                    found = _render(row, template, str(tokenizer.eos_token))
                if isinstance(found, DataError):
                    raise found
                require_length(found.text, row.where)
                texts.append(found)
                used.append(row)
            except DataError as problem:
                problems.add(problem)
    if bad is None:
        problems.raise_if_any()
    encoded = Encoded.empty()
    chats = [isinstance(row, ChatRow) for row in used]
    for row, (ids, spans) in zip(used, _tokenise(tokenizer, texts, chats), strict=True):
        encoded.lengths.append(len(ids))
        if spans[0][0] >= max_length:
            encoded.dropped += 1
            continue
        encoded.truncated += len(ids) > max_length
        kept = tuple(ids[:max_length])
        answers = tuple((start, min(end, max_length)) for start, end in spans if start < max_length)
        encoded.examples.append(Example(kept, ((1, len(kept)),) if learn == "all" else answers))
        encoded.answers.append(Example(kept, answers))
        encoded.rows.append(row)
    return encoded


@contextlib.contextmanager
def _rendered_chats(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, learn: Learn, now: datetime
) -> Iterator[Iterator[RenderedRow | DataError]]:
    """Yield an iterator over the rows that are chats, rendered by the tokenizer's template at the time `now`."""
    chat_template = ChatTemplate(tokenizer)
    chats = [row for row in rows if isinstance(row, ChatRow)]
    with (
        _stopped_clock(now),
        contextlib.closing(map_bounded(lambda row: chat_template.render(row, learn), chats)) as rendered,
    ):
        yield rendered


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


def _render(row: InstructionRow | CompletionRow, template: str, eos: str) -> RenderedRow:
    if isinstance(row, InstructionRow):
        prompt, answer = render_prompt(row.instruction, row.input, template, purpose="training"), row.output
    else:
        prompt, answer = row.prompt, row.completion
    if answer.rstrip("\n").endswith(eos):  # rendered beforehand, with the line end that chat templates write after EOS
        answer = answer.rstrip("\n")
    return RenderedRow(prompt + answer, ((len(prompt), len(prompt + answer)),))


def _tokenise(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[RenderedRow], chats: Sequence[bool]
) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
    """Yields each row's tokens, EOS at the end, and the spans of its answers.

    No special tokens are added to chats, whose templates write their own, and none to texts that have them already.
    """
    pieces = []  # whole texts, and up to where answers start and end inside them
    for row in rows:
        places = {place for span in row.answers for place in span} - {len(row.text)}
        pieces.append([row.text, *(row.text[:place] for place in sorted(places))])
    ids: dict[tuple[str, bool], list[int]] = {}
    for chat in (False, True):
        chosen = [text for texts, is_chat in zip(pieces, chats, strict=True) if is_chat == chat for text in texts]
        if chosen:
            encoded = tokenizer(chosen, add_special_tokens=not chat)["input_ids"]
            ids |= {(text, chat): list(tokens) for text, tokens in zip(chosen, encoded, strict=True)}
    front, behind = _added_tokens(tokenizer)
    for row, chat in zip(rows, chats, strict=True):
        whole = ids[row.text, chat]
        own = len(front) if front and not chat and whole[len(front) : 2 * len(front)] == front else 0
        ends = len(behind) if behind and not chat and whole[-2 * len(behind) : -len(behind)] == behind else 0
        whole = whole[own : len(whole) - ends]  # a text that was rendered beforehand has its own
        spans = []
        for first, last in row.answers:
            start = common_prefix(ids[row.text[:first], chat][own:], whole)
            through = ids[row.text[:last], chat][own:]
            end = common_prefix(through, whole)
            spans.append((max(1, start), end + (end < len(through))))  # a token with the end of the answer is its own
        if whole[-1:] != [tokenizer.eos_token_id]:
            whole = [*whole, tokenizer.eos_token_id]
        if row.answers[-1][1] == len(row.text):
            spans[-1] = (spans[-1][0], len(whole))
        yield whole, spans


def _added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer adds in front of a text, and behind it."""
    bare, whole = (list(tokenizer("a", add_special_tokens=added)["input_ids"]) for added in (False, True))
    for at in range(len(whole) - len(bare) + 1):
        if bare and whole[at : at + len(bare)] == bare:
            return whole[:at], whole[at + len(bare) :]
    return [], []
