"""What `check` shows of a run before it starts: a row with its loss mask, lengths, the learning rate, and warnings."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from transformers import PreTrainedTokenizerBase

from poc_lora.config import OptimSection, RunConfig
from poc_lora.data.batches import supervised_tokens
from poc_lora.data.prompts import Example
from poc_lora.errors import visible
from poc_lora.optim.schedules import learning_rate, warmup_length
from poc_lora.training.data import TrainingData

MAX_PIECES = 12  # of a row that is shown
MAX_CHARACTERS = 300  # of a piece
MAX_UNKNOWN = 0.01  # a larger share of unknown tokens is warned of
LOSS = {
    "all": "every token but the first",
    "last": "the answer; of a chat the last turn",
    "assistant": "the answer; of a chat every turn of the assistant",
}


def row_preview(rows: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Returns a row as lines, one a piece with a loss or without: its tokens, and its text in quotes.

    Args:
        rows: Training rows; the first of those with the most answers is shown.
        tokenizer: Decodes them.
    """
    row = max(rows, key=lambda row: len(row.supervised))
    places = sorted({0, len(row.ids), *(place for span in row.supervised for place in span)})
    starts = {start for start, _ in row.supervised}
    lines = []
    for start, end in pairwise(places):
        text = str(tokenizer.decode(list(row.ids[start:end]), clean_up_tokenization_spaces=False))
        label = "loss   " if start in starts else "no loss"
        lines.append(f"{'>' if start in starts else ' '} {label} {end - start:>5,} tokens  '{_shortened(text)}'")
    if len(lines) > MAX_PIECES:
        lines = [*lines[:MAX_PIECES], f"  and {len(lines) - MAX_PIECES} more parts"]
    return lines


def _shortened(text: str) -> str:
    half = MAX_CHARACTERS // 2
    if len(text) > MAX_CHARACTERS + half:
        text = f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"
    return visible(text)


def lengths_in_words(lengths: Sequence[int], max_length: int) -> str:
    """Returns quantiles of the rows' lengths before truncation."""
    ordered = sorted(lengths)
    half, most, nearly = (ordered[math.ceil(share * len(ordered) / 100) - 1] for share in (50, 90, 99))
    return (
        f"median {half:,}, 90 % up to {most:,}, 99 % up to {nearly:,}, longest {ordered[-1]:,}; "
        f"data.max_length is {max_length:,}"
    )


def unknown_tokens(rows: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> float | None:
    """Returns the share of unknown tokens, which stand for text not in the vocabulary; None if there is none such."""
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        return None
    return sum(row.ids.count(unknown) for row in rows) / max(1, sum(len(row.ids) for row in rows))


def learning_rate_in_words(config: RunConfig, steps: int) -> str:
    """Returns how the learning rate rises and falls over a run of so many steps."""
    optim, lr = config.optim, config.in_words("optim.lr")
    warmup = warmup_length(optim.warmup_steps, steps)
    if warmup >= steps:
        return f"rises from step 1 to the last, {steps}, where it is {_share_of_peak(optim, steps):.0%} of {lr}"
    rise = f"rises to {lr} in {warmup} steps, " if warmup else f"starts at {lr}, "
    if optim.schedule == "constant":
        return rise + f"then stays there up to step {steps}"
    return rise + f"then falls linearly to 0 after step {steps}"


def _share_of_peak(optim: OptimSection, steps: int) -> float:
    """The largest learning rate of a run, as a share of optim.lr."""
    top = min(warmup_length(optim.warmup_steps, steps), steps - 1)
    return learning_rate(optim.schedule, top, peak=1.0, warmup_steps=optim.warmup_steps, total_steps=steps)


def warnings(config: RunConfig, data: TrainingData, unknown: float | None) -> list[str]:
    """Returns warnings of what would waste the run, each with its remedy.

    Args:
        config: The run's configuration.
        data: Its rows.
        unknown: The share of unknown tokens.
    """
    return list(_warnings(config, data, unknown))


def _warnings(config: RunConfig, data: TrainingData, unknown: float | None) -> Iterator[str]:
    if cut := data.truncated + data.dropped:
        lost = f", {data.dropped:,} of them without any answer and left out" if data.dropped else ""
        yield (
            f"{cut:,} of {len(data.lengths):,} rows are cut at {data.max_length:,} tokens{lost}: their answers end "
            f"early; raise data.max_length (the longest row has {max(data.lengths):,}) or shorten them"
        )
    optim, rows, M, steps = config.optim, len(data.train), config.adapters.count, data.total_steps
    if (share := _share_of_peak(optim, steps)) < 0.999:
        yield (
            f"the learning rate reaches only {share:.0%} of optim.lr: warm-up takes "
            f"{optim.warmup_steps} steps and the run has {steps}; set optim.warmup_steps to auto"
        )
    if rows < M * config.train.batch_size:
        yield (
            f"{rows:,} training rows are fewer than one step of all adapters takes ({M} times "
            f"{config.train.batch_size}), so an epoch is only {_counted(data.order.steps_per_epoch, 'step')} and the "
            f"run {_counted(steps, 'step')}; lower train.batch_size or raise train.epochs"
        )
    if unknown is not None and unknown > MAX_UNKNOWN:
        yield (
            f"{unknown:.1%} of all tokens stand for text that the base's tokenizer does not know: it cannot learn that "
            "text; choose a base whose tokenizer knows it"
        )
    trained = {row.ids for row in data.train}
    if known := sum(row.ids in trained for row in data.validation):
        yield (
            f"{known:,} of {len(data.validation):,} held-out rows are the same as training rows, so their losses say "
            "little about new rows; take repeated rows out"
        )
    if not sum(supervised_tokens(row) for row in data.validation):
        yield (
            "no rows are held out, so nothing will say whether the merge is better than an adapter; set data.validation"
        )


def _counted(n: int, word: str) -> str:
    return f"{n:,} {word}{'s' * (n != 1)}"
