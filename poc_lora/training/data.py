"""The rows of a run: read, tokenised, split, and put into the order in which each adapter draws them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from poc_lora import rng
from poc_lora.artifacts.run_info import CHAT_TEMPLATE, SUPERVISED_TOKENS, TOKENIZED_ROWS
from poc_lora.config import DataSection, RunConfig
from poc_lora.data.batches import BatchOrder, padded_length
from poc_lora.data.chats import read_chat_template
from poc_lora.data.formats import ChatRow, Row
from poc_lora.data.prompts import Encoded, Example, encode_rows, row_limit
from poc_lora.data.rows import BadRows, read_sources, source_files
from poc_lora.errors import ConfigError, DataError
from poc_lora.files import sha256_file

MAX_HELD_OUT = 120  # rows that `data.validation: auto` holds out


@dataclass(frozen=True)
class TrainingData:
    """Tokenised rows, split into training and validation, and the order in which they are drawn."""

    train: list[Example]
    validation: list[Example]  # with a loss on the answers alone
    held_out: list[Row]  # the same rows as they were read
    order: BatchOrder
    total_steps: int
    max_length: int  # tokens that rows were truncated to
    lengths: list[int]  # tokens of every row before that
    truncated: int
    dropped: int
    skipped: int  # rows that could not be used
    chats: bool  # whether most training rows are chats
    files: dict[str, str]  # path, and the keys in NO_FILES -> sha256
    validation_files: dict[str, str]  # the same of data.validation_files

    @property
    def longest(self) -> int:
        """Tokens of the longest row, padded as in a batch."""
        return padded_length(max(len(e.ids) for e in (*self.train, *self.validation)))


def prepare_data(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int | None = None,
    now: datetime | None = None,
) -> TrainingData:
    """Read, tokenise and split the rows of a run.

    Args:
        config: The run's configuration.
        tokenizer: The base model's tokenizer, with the chat template of `data.chat_template`.
        context: The base model's context length in tokens, if it has one.
        now: The time that chat templates which write a date see; see `encode_rows`.

    Raises:
        DataError: Rows cannot be read or used, or none are left to train on.
        ConfigError: `data.max_length` exceeds the context; `train.keep` is `best` and no rows are held out.
    """
    section = config.data
    max_length = row_limit(section.max_length, context)
    if context is not None and max_length > context:
        raise ConfigError(
            f"rows of {max_length} tokens do not fit the base model's context of {context}",
            where="data.max_length",
            fix=f"lower it to {context} or less",
        )
    bad = BadRows()

    def encode(sources: Sequence[str]) -> Encoded:
        rows = read_sources(sources, columns=section.columns, bad=bad)
        return encode_rows(
            rows,
            tokenizer,
            template=section.prompt,
            max_length=max_length,
            learn=section.learn,
            now=now,
            bad=bad,
        )

    encoded = encode(section.train)
    own = encode(section.validation_files) if section.validation_files else Encoded.empty()
    if not section.skip_bad_rows:
        bad.raise_if_any()
    files, own_files = file_digests(section.train), file_digests(section.validation_files)
    if twice := [path for path, digest in own_files.items() if digest in files.values()]:
        what = f"{twice[0]} is trained on too, so its loss says little about new rows"
        raise DataError(what, where="data.validation_files", fix="take it out of data.train, or out of here")
    order = rng.permutation(len(encoded.examples), rng.key(config.adapters.seed, 0, "validation split"))
    held_out = _held_out(section, len(order))
    problem = None
    if len(order) <= held_out:
        problem = f"{len(order)} usable rows leave none to train on once {held_out} are held out"
    elif section.validation_files and not own.answers:
        problem = "data.validation_files has no usable rows"
    if problem:
        lost = f"{encoded.dropped + own.dropped} rows lost their whole answer to data.max_length={max_length}"
        raise DataError(
            f"{problem} ({lost}" + (f", {bad.count} are bad: {bad.first[0].what}" if bad.count else "") + ")",
            where="data",
            fix="lower data.validation, raise data.max_length, or give more rows",
        )
    if config.train.keep == "best" and not (held_out or own.answers):
        raise ConfigError(
            f"`best` chooses by validation losses, but of {len(order)} rows `data.validation: auto` holds out none",
            where="train.keep",
            fix="set data.validation to a number of rows, or train.keep to last",
        )
    chosen = sorted(order[:held_out])
    train = [encoded.examples[i] for i in sorted(order[held_out:])]
    batches = BatchOrder(
        [len(e.ids) for e in train],
        config.train.batch_size,
        config.adapters.seed,
        group_by_length=section.group_by_length,
    )
    steps = config.train.max_steps or max(1, round(batches.steps_per_epoch * (config.train.epochs or 0)))
    return TrainingData(
        train=train,
        validation=[*(encoded.answers[i] for i in chosen), *own.answers],
        held_out=[*(encoded.rows[i] for i in chosen), *own.rows],
        order=batches,
        total_steps=steps,
        max_length=max_length,
        lengths=encoded.lengths + own.lengths,
        truncated=encoded.truncated + own.truncated,
        dropped=encoded.dropped + own.dropped,
        skipped=bad.count,
        chats=2 * sum(isinstance(row, ChatRow) for row in encoded.rows) > len(encoded.rows),
        files=files | _tokens(encoded.examples) | _template(config, tokenizer),
        validation_files=own_files | (_tokens(own.answers) if own.answers else {}),
    )


def chat_template(config: RunConfig) -> str | None:
    """Returns the text of `data.chat_template`, if it is set. Raises DataError if it cannot be read."""
    path = config.data.chat_template
    return None if path is None else read_chat_template(Path(path).expanduser())


def _held_out(section: DataSection, rows: int) -> int:
    """How many of so many training rows are held out."""
    if section.validation_files:
        return 0
    return min(MAX_HELD_OUT, rows // 10) if section.validation == "auto" else section.validation


def file_digests(sources: Sequence[str]) -> dict[str, str]:
    """The SHA-256 of every file of rows among the sources, by its path."""
    return {str(path): sha256_file(path) for path in source_files(sources)}


def _tokens(examples: Sequence[Example]) -> dict[str, str]:
    return {
        TOKENIZED_ROWS: _digest([e.ids for e in examples]),
        SUPERVISED_TOKENS: _digest([e.supervised for e in examples]),
    }


def _template(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    return {CHAT_TEMPLATE: _digest([(tokenizer.chat_template,)])} if config.data.chat_template else {}


def _digest(rows: list[tuple[Any, ...]]) -> str:
    return hashlib.sha256(repr(rows).encode()).hexdigest()
