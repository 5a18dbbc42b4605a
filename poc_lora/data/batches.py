"""Which rows each adapter sees at each step, and how they are packed into tensors."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from poc_lora import rng
from poc_lora.data.prompts import Example

BUCKET_STEPS = 16  # rows of one length range: enough for this many steps
PAD_MULTIPLE = 8


class BatchOrder:
    """The order in which adapters see the rows: a function of (seed, adapter, step) and nothing else.

    Every row is seen once an epoch. With `group_by_length` rows are sorted into buckets of similar length;
    which bucket a step draws from is common to all adapters (so that little is padded), and which of its
    rows are drawn is each adapter's own.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, *, group_by_length: bool):
        self.batch_size, self.seed = batch_size, seed
        if group_by_length:
            by_length = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
            width = BUCKET_STEPS * batch_size
            self.buckets = [by_length[i : i + width] for i in range(0, len(by_length), width)]
        else:
            self.buckets = [list(range(len(lengths)))]
        self.steps_per_epoch = sum(-(-len(bucket) // batch_size) for bucket in self.buckets)
        self._drawn: dict[int, tuple[int, list[list[int]]]] = {}  # adapter -> the epoch it is in, and its batches

    def rows(self, adapter: int, step: int) -> list[int]:
        """The row numbers of one adapter's batch at one optimizer step."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if adapter not in self._drawn or self._drawn[adapter][0] != epoch:
            self._drawn[adapter] = (epoch, self._draw_epoch(adapter, epoch))
        return self._drawn[adapter][1][within]

    def _draw_epoch(self, adapter: int, epoch: int) -> list[list[int]]:
        batches = []
        for number, bucket in enumerate(self.buckets):
            stream = rng.key(self.seed, adapter, "order", epoch, f"bucket {number}")
            order = [bucket[i] for i in rng.permutation(len(bucket), stream)]
            batches += [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        steps = rng.permutation(len(batches), rng.key(self.seed, 0, "step order", epoch))  # alike for all adapters
        return [batches[i] for i in steps]


@dataclass(frozen=True)
class MicroBatch:
    """Rows of all adapters in one tensor, adapter-major, and the positions that carry a loss."""

    input_ids: Tensor  # [M·b, T], padded on the right
    row: Tensor  # [n] row of each predicting position
    column: Tensor  # [n] column of each predicting position
    target: Tensor  # [n] the token to predict there
    slot: Tensor  # [n] the adapter it belongs to
    examples: list[int]  # [M·b] example numbers
    real_tokens: int


def micro_batches(
    examples: Sequence[Example],
    rows_per_slot: Sequence[Sequence[int]],
    *,
    tokens: int,
    at_least: int = 1,
    train_on_prompt: bool,
    pad_id: int,
    device: torch.device,
) -> Iterator[MicroBatch]:
    """The parts of `cut_rows` as tensors."""
    for part in cut_rows(examples, rows_per_slot, tokens=tokens, at_least=at_least):
        chosen = [i for rows in part for i in rows]
        yield _pack(examples, chosen, len(part[0]), train_on_prompt=train_on_prompt, pad_id=pad_id, device=device)


def cut_rows(
    examples: Sequence[Example], rows_per_slot: Sequence[Sequence[int]], *, tokens: int, at_least: int = 1
) -> list[list[Sequence[int]]]:
    """Cut one step's rows (equally many for each adapter) into parts of at most `tokens` tokens, padding counted.

    A part has equally many rows of every adapter, at least one. Rows go by falling length, so that a part's rows
    are alike; a step's gradient is a sum over rows, whose order does not matter. `at_least` so many parts are made, as
    far as there are rows.
    """
    by_length = [sorted(rows, key=lambda i: -len(examples[i].ids)) for rows in rows_per_slot]
    count, bounds = len(by_length[0]), [0]
    while bounds[-1] < count:
        longest = padded_length(max(len(examples[rows[bounds[-1]]].ids) for rows in by_length))
        bounds.append(min(count, bounds[-1] + max(1, tokens // (longest * len(by_length)))))
    while len(bounds) - 1 < min(at_least, count):
        start, end = max(pairwise(bounds), key=lambda part: part[1] - part[0])
        bounds = sorted([*bounds, (start + end) // 2])
    return [[rows[start:end] for rows in by_length] for start, end in pairwise(bounds)]


def supervised_tokens(example: Example, *, train_on_prompt: bool) -> int:
    """How many tokens of an example are predicted under the loss; the first token never is."""
    return len(example.ids) - (1 if train_on_prompt else example.answer_start)


def _pack(
    examples: Sequence[Example],
    chosen: list[int],
    rows_per_adapter: int,
    *,
    train_on_prompt: bool,
    pad_id: int,
    device: torch.device,
) -> MicroBatch:
    lengths = torch.tensor([len(examples[i].ids) for i in chosen])
    first = torch.ones_like(lengths) if train_on_prompt else torch.tensor([examples[i].answer_start for i in chosen])
    T = padded_length(int(lengths.max()))
    input_ids = torch.full((len(chosen), T), pad_id)
    for row, i in enumerate(chosen):
        input_ids[row, : len(examples[i].ids)] = torch.tensor(examples[i].ids)
    position = torch.arange(T)
    learnt = (position >= first[:, None]) & (position < lengths[:, None])
    rows, columns = learnt.nonzero(as_tuple=True)
    return MicroBatch(
        input_ids=input_ids.to(device),
        row=rows.to(device),
        column=(columns - 1).to(device),
        target=input_ids[rows, columns].to(device),
        slot=(rows // rows_per_adapter).to(device),
        examples=chosen,
        real_tokens=int(lengths.sum()),
    )


def padded_length(length: int) -> int:
    """The width of a batch whose longest row has `length` tokens."""
    return -(-length // PAD_MULTIPLE) * PAD_MULTIPLE
