"""The `generate` protocol, the paper's: the model generates text, and the first label in it is its choice.

Greedy or with beams, 32 new tokens, prompts padded on the left. The first of the question's own labels counts.
LLM-Adapters searches for all labels of a benchmark, which differs only where a model names one that the question does
not offer.
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from poc_lora.data.prompts import render_prompt
from poc_lora.data.questions import Question
from poc_lora.evaluation.answers import Answer
from poc_lora.evaluation.protocols.label import batch_ranges, encode
from poc_lora.models.load import context_length
from poc_lora.models.vocabulary import embedding_rows

NEW_TOKENS = 32
TOKENS_PER_BATCH = 16_384  # padded, with the new ones, over all copies and beams


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    prompt: str,
    beams: int = 1,
    copies: int = 1,
) -> list[list[Answer]]:
    """Answer questions by the generate protocol.

    Args:
        model: In eval mode.
        prompt: The template.
        beams: 1 is greedy.
        copies: As for `score_labels`.

    Returns:
        The answers of each copy to every question, [copies][n].
    """
    prompts = encode(tokenizer, [render_prompt(q.instruction, q.input, prompt) for q in questions])
    written = generate_texts(model, tokenizer, prompts, beams=beams, copies=copies)

    def answer(question: Question, text: str | None) -> Answer:
        return Answer(None, too_long=True) if text is None else Answer(first_label(text, question.labels), text=text)

    return [[answer(*pair) for pair in zip(questions, texts, strict=True)] for texts in written]


@torch.inference_mode()
def generate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int = NEW_TOKENS,
    beams: int = 1,
    copies: int = 1,
) -> list[list[str | None]]:
    """Generate what follows each prompt.

    Args:
        model: In eval mode.
        prompts: Their tokens.
        new_tokens: The most tokens to generate.
        beams: 1 is greedy.
        copies: As for `score_labels`.

    Returns:
        The new texts [copies][n]; None for prompts that leave no room for so many tokens in the context.
    """
    found: list[list[str | None]] = [[None] * len(prompts) for _ in range(copies)]
    room = context_length(model)
    fitting = [i for i, ids in enumerate(prompts) if room is None or len(ids) + new_tokens <= room]
    fitting.sort(key=lambda i: -len(prompts[i]))
    settings = generation_config(model, tokenizer, beams=beams, new_tokens=new_tokens)
    lengths = [len(prompts[i]) + new_tokens for i in fitting]
    for first, last in batch_ranges(lengths, TOKENS_PER_BATCH // copies // beams):
        batch = fitting[first:last]
        width = len(prompts[batch[0]])
        ids = torch.full((len(batch), width), int(settings.pad_token_id))
        mask = torch.zeros_like(ids)
        for row, i in enumerate(batch):
            ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, width - len(prompts[i]) :] = 1
        ids, mask = (x.repeat(copies, 1).to(model.device) for x in (ids, mask))
        written = generate(model, settings, ids, mask)
        texts = tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)
        for at, text in enumerate(texts):
            found[at // len(batch)][batch[at % len(batch)]] = text
    return found


def first_label(text: str, labels: Sequence[str]) -> str | None:
    """The label that occurs first in a text, the longest of those that start there; None if there is none."""
    pattern = "|".join(re.escape(label) for label in sorted(labels, key=len, reverse=True))
    found = re.search(pattern, text)
    return found[0] if found else None


@torch.inference_mode()
def generate(model: PreTrainedModel, settings: GenerationConfig, ids: Tensor, mask: Tensor) -> Tensor:
    """Generate text after prompts, ids and mask [n, T]. Returns the prompts with the new tokens [n, T + new]."""
    own = model.generation_config
    try:
        model.generation_config = settings  # given as an argument, it would be completed from the model's own
        written: Tensor = model.generate(input_ids=ids, attention_mask=mask)  # type: ignore[operator]
    finally:
        model.generation_config = own
    return written


def generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, beams: int, new_tokens: int = NEW_TOKENS
) -> GenerationConfig:
    """Settings that take only the EOS tokens from the base model's own: some of those sample."""
    own = getattr(model, "generation_config", None)
    end = getattr(own, "eos_token_id", None) or tokenizer.eos_token_id
    first_end = end[0] if isinstance(end, list) else end
    size = embedding_rows(model)
    pad = next((id for id in (tokenizer.pad_token_id, first_end) if id is not None and id < size), 0)
    return GenerationConfig(  # type: ignore[no-untyped-call, unused-ignore]
        max_new_tokens=new_tokens,
        num_beams=beams,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=pad,
    )
