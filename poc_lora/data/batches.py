"""The rows that each adapter gets at each step, and their packing into micro-batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from poc_lora import rng
from poc_lora.data.prompts import Example
from poc_lora.devices import without_waiting

BUCKET_STEPS = 16  # a bucket of rows of similar length is enough for this many steps
PAD_MULTIPLE = 8
PAD = 0  # never attended to, so any token that every base model has will do


class BatchOrder:
    """The order of rows for each adapter: a function of (seed, adapter, step) alone.

    An adapter gets every row once an epoch. With `group_by_length`, rows are sorted into buckets of similar length. At
    each step all adapters draw from the same bucket, which saves padding, but each draws its own rows.

    Args:
        lengths: The tokens of each row.
        batch_size: Rows of one adapter's optimizer step.
        seed: The run's seed.
        group_by_length: Whether to draw batches from buckets of similar length.
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
        # adapter -> its current epoch and that epoch's batches
        self._drawn: dict[int, tuple[int, list[list[int]]]] = {}

    def rows(self, adapter: int, step: int) -> list[int]:
        """Returns the indices of the rows in one adapter's batch at an optimizer step."""
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
        steps = rng.permutation(len(batches), rng.key(self.seed, 0, "step order", epoch))  # the same for all adapters
        return [batches[i] for i in steps]


@dataclass(frozen=True)
class MicroBatch:
    """Rows of all adapters in one tensor, adapter-major, with the n positions that have a loss."""

    input_ids: Tensor  # [M·b, T], padded on the right
    row: Tensor  # [n] row of each position
    column: Tensor  # [n] column of each position
    target: Tensor  # [n] the token to predict there
    slot: Tensor  # [n] the adapter's slot
    examples: list[int]  # [M·b] indices of the rows
    tokens: int  # without padding


def micro_batches(
    examples: Sequence[Example],
    rows_per_slot: Sequence[Sequence[int]],
    *,
    tokens: int,
    at_least: int = 1,
    device: torch.device,
) -> Iterator[MicroBatch]:
    """Yields one step's rows as micro-batches; see `cut_rows` for their sizes.

    Args:
        examples: All rows.
        rows_per_slot: The indices of each adapter's rows in this step, equally many for each.
        tokens: The most tokens of a micro-batch, with padding.
        at_least: The least number of micro-batches.
        device: The device of the tensors.
    """
    for part in cut_rows(examples, rows_per_slot, tokens=tokens, at_least=at_least):
        chosen = [i for rows in part for i in rows]
        yield _pack(examples, chosen, len(part[0]), device=device)


def cut_rows(
    examples: Sequence[Example], rows_per_slot: Sequence[Sequence[int]], *, tokens: int, at_least: int = 1
) -> list[list[Sequence[int]]]:
    """Split one step's rows into parts of at most `tokens` tokens, with padding.

    A part has the same number of rows for each adapter, at least one. Rows are sorted by length, longest first, so that
    a part's rows are of similar length; the step's gradient is a sum over rows, so their order does not matter. There
    are at least `at_least` parts if there are as many rows.
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


def supervised_tokens(example: Example) -> int:
    """The number of an example's tokens that have a loss."""
    return sum(end - start for start, end in example.supervised)


def _pack(examples: Sequence[Example], chosen: list[int], rows_per_adapter: int, *, device: torch.device) -> MicroBatch:
    lengths = torch.tensor([len(examples[i].ids) for i in chosen])[:, None]
    T = padded_length(int(lengths.max()))
    filled = torch.arange(T) < lengths
    supervised = torch.zeros_like(filled)
    for row, i in enumerate(chosen):
        for start, end in examples[i].supervised:
            supervised[row, start:end] = True
    input_ids = torch.full((len(chosen), T), PAD)
    input_ids[filled] = torch.tensor([token for i in chosen for token in examples[i].ids])
    rows, columns = supervised.nonzero(as_tuple=True)
    parts = [input_ids.flatten(), rows, columns - 1, input_ids[rows, columns], rows // rows_per_adapter]
    ids, row, column, target, slot = without_waiting(torch.cat(parts), device).split([len(part) for part in parts])
    return MicroBatch(ids.view(len(chosen), T), row, column, target, slot, chosen, int(lengths.sum()))


def padded_length(length: int) -> int:
    """The padded length of rows, the longest of which has `length` tokens."""
    return -(-length // PAD_MULTIPLE) * PAD_MULTIPLE
