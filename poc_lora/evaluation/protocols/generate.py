"""The `generate` protocol, the paper's: the model writes its answer, and the first label in it is its choice.

Greedy or by beams, 32 new tokens, prompts padded on the left under an attention mask. What is read is the first of the
question's own labels; LLM-Adapters looks for all labels of a benchmark, which differs only where a model names one that
the question does not offer.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from poc_lora.data.commonsense import Question
from poc_lora.data.prompts import render_prompt
from poc_lora.evaluation.answers import Answer
from poc_lora.models.load import context_length

NEW_TOKENS = 32
TOKENS_PER_BATCH = 16_384  # padded, new ones included, over all adapters of the pack and all beams


@torch.inference_mode()
def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    prompt: str,
    beams: int = 1,
    copies: int = 1,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    advance: Callable[[int], object] = lambda questions: None,
) -> list[list[Answer]]:
    """The answers of each of `copies` models to every question: [copies][n].

    copies: how often the model wants each batch, one after another: M for a bank of M adapters, whose rows are
    adapter-major, else 1. beams: 1 is greedy. advance: called after each batch with the number of its questions.
    """
    answers: list[list[Answer]] = [[Answer(None, too_long=True)] * len(questions) for _ in range(copies)]
    prompts = _tokenise(questions, tokenizer, prompt)
    room = context_length(model)
    fitting = [i for i, ids in enumerate(prompts) if room is None or len(ids) + NEW_TOKENS <= room]
    advance(len(questions) - len(fitting))
    settings = _settings(model, tokenizer, beams)
    for batch in _batches(
        sorted(fitting, key=lambda i: -len(prompts[i])), prompts, tokens_per_batch // copies // beams
    ):
        width = len(prompts[batch[0]])
        ids = torch.full((len(batch), width), int(settings.pad_token_id))
        mask = torch.zeros_like(ids)
        for row, i in enumerate(batch):
            ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, width - len(prompts[i]) :] = 1
        with _own_settings(model, settings):
            written = model.generate(  # type: ignore[operator]
                input_ids=ids.repeat(copies, 1).to(model.device),
                attention_mask=mask.repeat(copies, 1).to(model.device),
            )
        texts = tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)
        for at, text in enumerate(texts):
            i = batch[at % len(batch)]
            answers[at // len(batch)][i] = Answer(first_label(text, questions[i].labels), text=text)
        advance(len(batch))
    return answers


def first_label(text: str, labels: Sequence[str]) -> str | None:
    """The label that occurs first in a text, the longest of those that start there; None if none does."""
    pattern = "|".join(re.escape(label) for label in sorted(labels, key=len, reverse=True))
    found = re.search(pattern, text)
    return found[0] if found else None


def _settings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, beams: int) -> GenerationConfig:
    """Nothing of the base's own generation settings but what ends a text: some of them sample."""
    own = getattr(model, "generation_config", None)
    end = getattr(own, "eos_token_id", None) or tokenizer.eos_token_id
    first_end = end[0] if isinstance(end, list) else end
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else first_end
    return GenerationConfig(
        max_new_tokens=NEW_TOKENS,
        num_beams=beams,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=0 if pad is None else pad,
    )


@contextlib.contextmanager
def _own_settings(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """Within the block the model generates by `settings` alone: what a call leaves open is filled in from its own."""
    before = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = before


def _tokenise(questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[list[int]]:
    texts = [render_prompt(q.instruction, q.input, prompt) for q in questions]
    encoded = tokenizer(texts, padding=False, truncation=False, return_attention_mask=False, verbose=False)["input_ids"]
    # Some tokenizers end every text with EOS, after which nothing would be written.
    return [list(ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids) for ids in encoded]


def _batches(order: Sequence[int], prompts: Sequence[Sequence[int]], tokens: int) -> Iterator[list[int]]:
    """Questions, the longest first, in batches whose padded size stays within `tokens`; at least one each."""
    at = 0
    while at < len(order):
        size = max(1, tokens // (len(prompts[order[at]]) + NEW_TOKENS))
        yield list(order[at : at + size])
        at += size
