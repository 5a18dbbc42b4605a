"""The rows of a run: read, tokenised, split, and put into the order in which each adapter draws them."""

import hashlib
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from transformers import PreTrainedTokenizerBase

from poc_lora import rng
from poc_lora.artifacts.run_info import SUPERVISED_TOKENS, TOKENIZED_ROWS
from poc_lora.config import RunConfig
from poc_lora.data.batches import BatchOrder, padded_length
from poc_lora.data.prompts import Example, encode_rows, row_limit
from poc_lora.data.rows import BadRows, read_sources, source_files
from poc_lora.errors import ConfigError, DataError
from poc_lora.files import sha256_file

MAX_HELD_OUT = 120  # rows that `data.validation: auto` holds out


@dataclass(frozen=True)
class TrainingData:
    """Tokenised rows, split into training and validation, and the order in which they are drawn."""

    train: list[Example]
    validation: list[Example]  # with a loss on the answers alone
    order: BatchOrder
    total_steps: int
    max_length: int  # tokens that rows were truncated to
    lengths: list[int]  # tokens of every row before that
    truncated: int
    dropped: int
    skipped: int  # rows that could not be used
    files: dict[str, str]  # path, TOKENIZED_ROWS and SUPERVISED_TOKENS -> sha256

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
        tokenizer: The base model's tokenizer.
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
    encoded = encode_rows(
        read_sources(section.train, columns=section.columns, bad=bad),
        tokenizer,
        template=section.prompt,
        max_length=max_length,
        learn=section.learn,
        now=now,
        bad=bad,
    )
    if not section.skip_bad_rows:
        bad.raise_if_any()
    order = rng.permutation(len(encoded.examples), rng.key(config.adapters.seed, 0, "validation split"))
    held_out = min(MAX_HELD_OUT, len(order) // 10) if section.validation == "auto" else section.validation
    if len(order) <= held_out:
        raise DataError(
            f"{len(order)} usable rows leave none to train on once {held_out} are held out"
            f" ({encoded.dropped} rows lost their whole answer to data.max_length={max_length}"
            + (f", {bad.count} are bad: {bad.first[0].what}" if bad.count else "")
            + ")",
            where="data",
            fix="lower data.validation, raise data.max_length, or give more rows",
        )
    if config.train.keep == "best" and not held_out:
        raise ConfigError(
            f"`best` chooses by validation losses, but of {len(order)} rows `data.validation: auto` holds out none",
            where="train.keep",
            fix="set data.validation to a number of rows, or train.keep to last",
        )
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
        validation=[encoded.answers[i] for i in sorted(order[:held_out])],
        order=batches,
        total_steps=steps,
        max_length=max_length,
        lengths=encoded.lengths,
        truncated=encoded.truncated,
        dropped=encoded.dropped,
        skipped=bad.count,
        files={
            **{str(path): sha256_file(path) for path in source_files(section.train)},
            TOKENIZED_ROWS: _digest([e.ids for e in encoded.examples]),
            SUPERVISED_TOKENS: _digest([e.supervised for e in encoded.examples]),
        },
    )


def _digest(rows: list[tuple[Any, ...]]) -> str:
    return hashlib.sha256(repr(rows).encode()).hexdigest()
