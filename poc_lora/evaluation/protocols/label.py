"""The `label` protocol: the answer is the label with the largest probability after "the correct answer is".

For a question with context c and label l the score is log p(" " + l | c), summed over its tokens. The tokens that all
labels share at the start, context included, are run once; where labels differ in their last token only, one forward
pass per question scores all of them. The head runs in float32 whatever the model's dtype: in bfloat16 labels would tie
by rounding. Ties go to the label named first.

Choices of free text are scored as lm-eval scores them: the context is the prompt alone, and all tokens after it count.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from poc_lora.data.prompts import render_prompt
from poc_lora.data.questions import Question
from poc_lora.devices import by_device, grouped_sums, without_waiting
from poc_lora.distributed import Ranks
from poc_lora.errors import DataError
from poc_lora.evaluation.answers import Answer
from poc_lora.models.forward import logits_at
from poc_lora.models.load import context_length
from poc_lora.models.prefix_cache import run_prefix
from poc_lora.models.sharding import all_reduce_sum

ANSWER_PREFIX = "the correct answer is"
TOKENS_PER_BATCH = {"cpu": 8_192, "cuda": 16_384}  # padded, over all copies; more leave a CPU's cache
HEAD_ROWS = 16_384  # of the head's weights converted to float32 at once, which bounds their memory
MIN_PREFIX = 16  # a shorter prefix of all rows is not worth a run of its own


@dataclass(frozen=True)
class PreparedQuestions:
    """n questions of up to k labels as rows of tokens (longest first), and what to read from each row.

    A read is the log-probability of one token after one column of one row. A label's score is the sum of the reads with
    its slot, question * k + label.
    """

    tokens: Tensor  # [all tokens], the rows one after another
    starts: Tensor  # [rows + 1], where each row starts in `tokens`
    first_read: Tensor  # [rows + 1], where each row's reads start
    read_column: Tensor  # [reads]
    read_token: Tensor  # [reads]
    read_slot: Tensor  # [reads]
    answers: Tensor  # [n], the index of the right label
    label_exists: Tensor  # [n, k]
    too_long: Tensor  # [n], the prompt does not fit the context

    @property
    def rows(self) -> int:
        return len(self.starts) - 1


def prepare(
    questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, *, prompt: str, max_length: int | None = None
) -> PreparedQuestions:
    """Tokenise questions (at least one) under a prompt template.

    A question that needs more than `max_length` tokens is marked `too_long` and has no rows.

    Raises:
        DataError: If the tokenizer encodes two labels of a question alike.
    """
    k = max(len(q.labels) for q in questions)
    rows: list[tuple[list[int], list[tuple[int, int, int]]]] = []  # tokens; reads as (column, token, slot)
    too_long = torch.zeros(len(questions), dtype=torch.bool)
    encoded = iter(encode(tokenizer, [text for q in questions for text in answered(q, prompt)]))
    free = [q for q in questions if q.form != "labels"]
    contexts = iter(encode(tokenizer, [context_of(q, prompt).rstrip() for q in free]) if free else [])
    for i, question in enumerate(questions):
        sequences = [next(encoded) for _ in question.labels]  # of context + " " + label
        before = None if question.form == "labels" else len(next(contexts))
        if max_length is not None and max(map(len, sequences)) - 1 > max_length:  # the last token is not run
            too_long[i] = True
        else:
            _check_distinct(question, sequences)
            rows += _rows_of(sequences, i * k, before)
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
    ranks: Ranks | None = None,
) -> list[list[Answer]]:
    """Answer questions by the label protocol: `prepare`, then `score_labels`. Returns [copies][n] answers."""
    prepared = prepare(questions, tokenizer, prompt=prompt, max_length=context_length(model))
    log_probs = score_labels(model, prepared, copies=copies, ranks=ranks)
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
    model: PreTrainedModel, prepared: PreparedQuestions, *, copies: int = 1, ranks: Ranks | None = None
) -> Tensor:
    """Compute the log-probabilities of the labels.

    Args:
        model: In eval mode.
        prepared: The questions.
        copies: How often the model expects each batch to be repeated: M for a bank of M packed adapters
            (adapter-major), otherwise 1.
        ranks: Where they share a sharded base, so that all must run it equally often: each batch is split over them.
            A collective operation then, with the same questions on every rank.

    Returns:
        Log-probabilities, float32 on the CPU [copies, n, k]; -inf for labels that do not exist or have no score.
    """
    n, k = prepared.label_exists.shape
    if model.device.type == "cpu":
        _keep_freed_memory()
    scores = torch.zeros(copies, n * k, device=model.device)
    P = _prefix_length(prepared)
    past = run_prefix(model, prepared.tokens[:P], copies) if P >= MIN_PREFIX else None
    P = P if past else 0
    budget = by_device(TOKENS_PER_BATCH, model.device.type) // copies
    rank, size = (ranks.process_index, ranks.size) if ranks else (0, 1)
    for start, end in batch_ranges(prepared.starts.diff().tolist(), budget * size):
        first, last = (start + (end - start) * r // size for r in (rank, rank + 1))
        own = last > first
        if not own:  # run a row of another rank's along
            first, last = start, start + 1
        ids = _padded(prepared, first, last)[:, P:]  # [b, T]
        b, T = ids.shape
        reads = slice(int(prepared.first_read[first]), int(prepared.first_read[last]))
        row = torch.arange(b).repeat_interleave(prepared.first_read[first : last + 1].diff())
        position, where = torch.unique(row * T + prepared.read_column[reads] - P, return_inverse=True)  # read by many
        rows = (torch.arange(copies)[:, None] * b + position // T).flatten()
        columns = (position % T).repeat(copies)
        parts = (ids.repeat(copies, 1), rows, columns, where, prepared.read_token[reads], prepared.read_slot[reads])
        ids, rows, columns, where, token, slot = (without_waiting(part, model.device) for part in parts)
        with head_in_float32(model):
            logits = logits_at(model, ids, rows, columns, past=past).float().view(copies, len(position), -1)
        if own:
            scores += grouped_sums(logits[:, where, token] - logits.logsumexp(-1)[:, where], slot, n * k)
    if size > 1:
        all_reduce_sum(scores)  # each is one rank's
    scored = prepared.label_exists & ~prepared.too_long[:, None]
    return scores.cpu().view(copies, n, k).masked_fill_(~scored, -torch.inf)


@contextlib.contextmanager
def head_in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Within the block a linear head computes its logits in float32, before anything scales or caps them."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call, unused-ignore]
    if not isinstance(head, nn.Linear) or not head.weight.is_floating_point() or head.weight.dtype == torch.float32:
        yield
        return

    def forward(hidden: Tensor) -> Tensor:
        x = hidden.float()
        parts = [x @ rows.float().T for rows in torch.split(head.weight, HEAD_ROWS)]
        logits = torch.cat(parts, dim=-1)
        return logits if head.bias is None else logits + head.bias.float()

    before = head.forward
    head.forward = forward  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        head.forward = before  # type: ignore[method-assign]


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Tokenise texts, without the EOS that some tokenizers add: what follows the text is still to be predicted."""
    encoded = tokenizer(list(texts), padding=False, truncation=False, return_attention_mask=False, verbose=False)
    return [ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids for ids in encoded["input_ids"]]


def batch_ranges(lengths: Sequence[int], tokens: int) -> Iterator[tuple[int, int]]:
    """Split rows of descending `lengths` into ranges whose padded size stays within `tokens`; at least one row each."""
    first = 0
    while first < len(lengths):
        last = min(len(lengths), first + max(1, tokens // lengths[first]))
        yield first, last
        first = last


def context_of(question: Question, prompt: str) -> str:
    """Returns the text before the answer, under a prompt template."""
    if question.form == "prompt":
        return question.instruction
    rendered = render_prompt(question.instruction, question.input, prompt)
    return rendered + ANSWER_PREFIX if question.form == "labels" else rendered


def answered(question: Question, prompt: str) -> list[str]:
    """Returns the context followed by each label, after a space unless there is white space already."""
    context = context_of(question, prompt)
    return [
        context + ("" if context[-1:].isspace() or label[:1].isspace() else " ") + label for label in question.labels
    ]


def _check_distinct(question: Question, sequences: list[list[int]]) -> None:
    seen: dict[tuple[int, ...], str] = {}
    for label, tokens in zip(question.labels, map(tuple, sequences), strict=True):
        if tokens in seen:
            raise DataError(
                f"the tokenizer cannot tell the labels {seen[tokens]!r} and {label!r} apart",
                where=question.instruction,
                fix="use labels that the base model's tokenizer knows",
            )
        seen[tokens] = label


def _rows_of(
    sequences: list[list[int]], slot: int, context: int | None = None
) -> list[tuple[list[int], list[tuple[int, int, int]]]]:
    """The fewest rows of tokens from which every label's log-probability can be read.

    A label is scored on its tokens after those that all labels share, or, if given, after the first `context` ones.
    That takes a row of all tokens but the last. A row that begins another row is left out, so labels that differ only
    in their last token need one row.
    """
    # "answer1" begins "answer10". The last token of the shorter label is not counted as shared, so both labels are
    # scored on it, and the longer one on more tokens: its score is never above that of the shorter one.
    shared = min(_shared_length(sequences) if context is None else context, min(map(len, sequences)) - 1)
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
    """Free a large block, from which glibc learns to keep the memory that one layer frees for the next one.

    Otherwise pages go back to the system and are allocated again, which took a fifth of the time of a small model.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)  # glibc learns from blocks of up to 32 MB


def _prefix_length(prepared: PreparedQuestions) -> int:
    """How many first tokens all rows share, up to the first column that is read."""
    if prepared.rows < 2:
        return 0
    ends = prepared.starts[1:].tolist()
    rows = [prepared.tokens[start:end].tolist() for start, end in zip([0, *ends], ends, strict=False)]
    return min(_shared_length(rows), int(prepared.read_column.min()))


def _shared_length(sequences: list[list[int]]) -> int:
    """How many first tokens all sequences share, which the first and the last in lexical order show."""
    least, greatest = min(sequences), max(sequences)
    return next((i for i, (a, b) in enumerate(zip(least, greatest, strict=False)) if a != b), len(least))


def _padded(prepared: PreparedQuestions, first: int, last: int) -> Tensor:
    """Rows first to last as [b, T], padded on the right with token 0, which no column that is read attends to."""
    starts = prepared.starts[first:last, None]
    lengths = prepared.starts[first : last + 1].diff()[:, None]
    column = torch.arange(int(lengths.max()))
    return prepared.tokens[(starts + column).clamp(max=len(prepared.tokens) - 1)].where(column < lengths, 0)


def _offsets(sizes: list[int]) -> Tensor:
    return torch.tensor([0, *sizes], dtype=torch.int64).cumsum(0)
