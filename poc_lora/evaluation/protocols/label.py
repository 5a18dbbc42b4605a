"""The `label` protocol: the answer is the label with the largest probability after "the correct answer is".

For a question with context c and label l the score is log p(" " + l | c), summed over its tokens. What all labels
share at the start, context included, is run once; where they differ in one last token, one forward pass per question
gives every label. The head runs in float32 whatever the model's dtype: in bfloat16 labels would tie by rounding. Ties
go to the label named first.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from poc_lora.data.commonsense import Question
from poc_lora.data.prompts import render_prompt
from poc_lora.devices import by_device
from poc_lora.errors import DataError
from poc_lora.evaluation.answers import Answer
from poc_lora.models.forward import logits_at
from poc_lora.models.load import context_length
from poc_lora.models.prefix_cache import run_prefix

ANSWER_PREFIX = "the correct answer is"
TOKENS_PER_BATCH = {"cpu": 8_192, "cuda": 16_384}  # padded, over all adapters of the pack; more leave a CPU's cache
HEAD_ROWS = 16_384  # of the head's weights, in float32 at once: bounds the memory that they take
MIN_PREFIX = 16  # tokens that all rows share, from which on they are run once
QUESTIONS_PER_CALL = 2_048  # tokenised at once: bounds the memory that Python lists of tokens take


@dataclass(frozen=True)
class PreparedQuestions:
    """n questions of up to k labels as token rows (longest first), and what to read from each row.

    A read is the log-probability of one token after one column of one row; a label's score is the sum of the reads
    that carry its slot, question * k + label.
    """

    tokens: Tensor  # [all tokens], the rows one after another
    starts: Tensor  # [rows + 1], where each row starts in `tokens`
    first_read: Tensor  # [rows + 1], where each row's reads start
    read_column: Tensor  # [reads]
    read_token: Tensor  # [reads]
    read_slot: Tensor  # [reads]
    answers: Tensor  # [n], the index of the right label
    label_exists: Tensor  # [n, k]
    too_long: Tensor  # [n], the prompt does not fit the model's context

    @property
    def rows(self) -> int:
        return len(self.starts) - 1


def prepare(
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt: str,
    max_length: int | None = None,
) -> PreparedQuestions:
    """Tokenise `questions` under the prompt template `prompt`.

    A question that needs more than `max_length` tokens is kept and marked `too_long`; it has no rows.
    """
    k = max(len(q.labels) for q in questions)
    rows: list[tuple[list[int], list[tuple[int, int, int]]]] = []  # tokens; reads as (column, token, slot)
    too_long = torch.zeros(len(questions), dtype=torch.bool)
    for i, sequences in enumerate(_tokenise(questions, tokenizer, prompt)):
        if max_length is not None and max(map(len, sequences)) - 1 > max_length:  # the last token is not run
            too_long[i] = True
        else:
            _check_apart(questions[i], sequences)
            rows += _rows_of(sequences, i * k)
    rows.sort(key=lambda row: -len(row[0]))
    reads = [read for _, row_reads in rows for read in row_reads]
    column, token, slot = torch.tensor(reads, dtype=torch.int64).view(-1, 3).T.contiguous()
    return PreparedQuestions(
        tokens=torch.tensor([t for row, _ in rows for t in row], dtype=torch.int64),
        starts=_offsets([len(row) for row, _ in rows]),
        first_read=_offsets([len(row_reads) for _, row_reads in rows]),
        read_column=column,
        read_token=token,
        read_slot=slot,
        answers=torch.tensor([q.answer_index for q in questions]),
        label_exists=torch.arange(k) < torch.tensor([len(q.labels) for q in questions])[:, None],
        too_long=too_long,
    )


def label_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    prompt: str,
    copies: int = 1,
) -> list[list[Answer]]:
    """What each of `copies` models answers to every question, [copies][n]: see `score_labels`."""
    prepared = prepare(questions, tokenizer, prompt=prompt, max_length=context_length(model))
    log_probs = score_labels(model, prepared, copies=copies)
    chosen, too_long = log_probs.argmax(-1).tolist(), prepared.too_long.tolist()

    def answer(copy: int, i: int) -> Answer:
        if too_long[i]:
            return Answer(None, too_long=True)
        labels = questions[i].labels
        values = log_probs[copy, i, : len(labels)].tolist()
        return Answer(labels[chosen[copy][i]], log_probs=tuple(round(value, 6) for value in values))

    return [[answer(copy, i) for i in range(len(questions))] for copy in range(copies)]


@torch.inference_mode()
def score_labels(
    model: PreTrainedModel,
    prepared: PreparedQuestions,
    *,
    copies: int = 1,
    tokens_per_batch: int | None = None,
    advance: Callable[[int], object] = lambda rows: None,
) -> Tensor:
    """Log-probabilities of the labels, float32 on the CPU [copies, n, k]; -inf where a label or a score is absent.

    copies: how often the model wants each batch, one after another: M for a bank of M adapters, whose rows are
    adapter-major, else 1. advance: called after each batch with the number of rows done.
    """
    n, k = prepared.label_exists.shape
    if model.device.type == "cpu":
        _keep_freed_memory()
    scores = torch.zeros(copies, n * k, device=model.device)
    P = _prefix_length(prepared)
    past = run_prefix(model, prepared.tokens[:P], copies) if P >= MIN_PREFIX else None
    P = P if past else 0
    tokens = tokens_per_batch or by_device(TOKENS_PER_BATCH, model.device.type)
    for first, last in _batches(prepared, max(1, tokens // copies)):
        ids = _padded(prepared, first, last)[:, P:]  # [b, T]
        b, T = ids.shape
        reads = slice(int(prepared.first_read[first]), int(prepared.first_read[last]))
        row = torch.arange(b).repeat_interleave(prepared.first_read[first : last + 1].diff())
        position, where = torch.unique(row * T + prepared.read_column[reads] - P, return_inverse=True)  # read by many
        rows = (torch.arange(copies)[:, None] * b + position // T).flatten()
        columns = (position % T).repeat(copies)
        token, slot, where = (
            x.to(model.device) for x in (prepared.read_token[reads], prepared.read_slot[reads], where)
        )
        ids, rows, columns = (x.to(model.device) for x in (ids.repeat(copies, 1), rows, columns))
        with _head_in_float32(model):
            logits = logits_at(model, ids, rows, columns, past=past).float().view(copies, len(position), -1)
        scores.index_add_(1, slot, logits[:, where, token] - logits.logsumexp(-1)[:, where])
        advance(last - first)
    scored = prepared.label_exists & ~prepared.too_long[:, None]
    return scores.cpu().view(copies, n, k).masked_fill_(~scored, -torch.inf)


@contextlib.contextmanager
def _head_in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Within the block a linear head of another dtype gives float32 logits, and what scales or caps them sees those."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or not head.weight.is_floating_point() or head.weight.dtype == torch.float32:
        yield
        return

    def forward(hidden: Tensor) -> Tensor:
        x = hidden.float()
        parts = [x @ rows.float().T for rows in head.weight.split(HEAD_ROWS)]
        logits = torch.cat(parts, dim=-1)
        return logits if head.bias is None else logits + head.bias.float()

    before = head.forward
    head.forward = forward  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        head.forward = before  # type: ignore[method-assign]


def _tokenise(
    questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, prompt: str
) -> Iterator[list[list[int]]]:
    """For every question the tokens of context + " " + label, one list per label."""
    eos = tokenizer.eos_token_id
    for at in range(0, len(questions), QUESTIONS_PER_CALL):
        part = questions[at : at + QUESTIONS_PER_CALL]
        contexts = [render_prompt(q.instruction, q.input, prompt) + ANSWER_PREFIX for q in part]
        texts = [f"{context} {label}" for context, q in zip(contexts, part, strict=True) for label in q.labels]
        encoded = iter(
            tokenizer(texts, padding=False, truncation=False, return_attention_mask=False, verbose=False)["input_ids"]
        )
        for q in part:
            # Some tokenizers end every text with EOS; the label is not the end of the answer that is scored.
            yield [ids[:-1] if ids[-1] == eos else ids for ids in (next(encoded) for _ in q.labels)]


def _check_apart(question: Question, sequences: list[list[int]]) -> None:
    seen: dict[tuple[int, ...], str] = {}
    for label, tokens in zip(question.labels, map(tuple, sequences), strict=True):
        if tokens in seen:
            raise DataError(
                f"the tokenizer cannot tell the labels {seen[tokens]!r} and {label!r} apart",
                where=question.instruction,
                fix="use labels that the base model's tokenizer knows",
            )
        seen[tokens] = label


def _rows_of(sequences: list[list[int]], slot: int) -> list[tuple[list[int], list[tuple[int, int, int]]]]:
    """The fewest rows that give each sequence its log-probability after what all of them share.

    A sequence needs the model run on all its tokens but the last. A run that begins another one is not repeated, so
    labels that differ in their last token only need one row.
    """
    # A label whose tokens begin another's ("answer1", "answer10") keeps its last token out of the shared part, so
    # both are scored on it and the longer one on more: the longer is never above the shorter, as with any
    # log-likelihood of continuations.
    shared = min(_shared_length(sequences), min(map(len, sequences)) - 1)
    if shared < 1:
        raise DataError("the tokenizer leaves nothing before the label", fix="use a prompt with text in it")
    rows: list[tuple[list[int], list[tuple[int, int, int]]]] = []
    for label in sorted(range(len(sequences)), key=lambda j: -len(sequences[j])):
        tokens = sequences[label]
        run = tokens[:-1]
        reads = [(c, tokens[c + 1], slot + label) for c in range(shared - 1, len(run))]
        for row, row_reads in rows:
            if row[: len(run)] == run:
                row_reads += reads
                break
        else:
            rows.append((run, reads))
    return rows


def _keep_freed_memory() -> None:
    """Have glibc keep what each layer frees for the next one; it learns how much from a large block that is freed.

    Otherwise pages go back to the system and are taken anew, which took a fifth of the time of a small model.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)  # the largest block that it learns from has 32 MB


def _prefix_length(prepared: PreparedQuestions) -> int:
    """How many first tokens all rows share, as far as nothing is read there."""
    if prepared.rows < 2:
        return 0
    ends = prepared.starts[1:].tolist()
    rows = [prepared.tokens[start:end].tolist() for start, end in zip([0, *ends], ends, strict=False)]
    return min(_shared_length(rows), int(prepared.read_column.min()))


def _shared_length(sequences: list[list[int]]) -> int:
    """How many first tokens all sequences share: those of the least and the greatest decide."""
    least, greatest = min(sequences), max(sequences)
    return next((i for i, (a, b) in enumerate(zip(least, greatest, strict=False)) if a != b), len(least))


def _batches(prepared: PreparedQuestions, tokens: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows whose padded size stays within `tokens`; at least one row each."""
    lengths = prepared.starts.diff().tolist()
    first = 0
    while first < len(lengths):
        last = min(len(lengths), first + max(1, tokens // lengths[first]))  # the first is the longest
        yield first, last
        first = last


def _padded(prepared: PreparedQuestions, first: int, last: int) -> Tensor:
    """Rows first to last as [b, T], filled on the right with token 0, which no position read can see."""
    starts = prepared.starts[first:last, None]
    lengths = prepared.starts[first : last + 1].diff()[:, None]
    column = torch.arange(int(lengths.max()))
    return prepared.tokens[(starts + column).clamp(max=len(prepared.tokens) - 1)].where(column < lengths, 0)


def _offsets(sizes: list[int]) -> Tensor:
    return torch.tensor([0, *sizes], dtype=torch.int64).cumsum(0)
