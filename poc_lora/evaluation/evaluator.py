"""Answers questions with a loaded model by the protocols `label` and `generate`, batch by batch, shared over ranks."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from poc_lora.data.prompts import TEMPLATES, render_prompt
from poc_lora.distributed import Ranks
from poc_lora.errors import Interrupted
from poc_lora.evaluation.answers import Answer, Item, check_numbers
from poc_lora.evaluation.protocols.generate import NEW_TOKENS, generate_answers
from poc_lora.evaluation.protocols.label import ANSWER_PREFIX, encode, label_answers
from poc_lora.models.vocabulary import may_exceed, require_embeddings

QUESTIONS_PER_BATCH = 256  # answered, then saved: what an interruption costs
BATCHES_PER_RANK = 2  # at least, where there are several ranks: none is left without work for long


@dataclass(frozen=True)
class Protocol:
    """How questions are put and answers are read."""

    name: str  # label or generate
    prompt: str  # the template
    beams: int = 1  # for generate; 1 is greedy

    def answers(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], *, copies: int
    ) -> list[list[Answer]]:
        """The answers of each of the `copies` variants that the model computes together: [copies][n]."""
        questions = [item.question for item in items]
        if self.name == "generate":
            return generate_answers(model, tokenizer, questions, prompt=self.prompt, beams=self.beams, copies=copies)
        return label_answers(model, tokenizer, questions, prompt=self.prompt, copies=copies)

    def require_embeddings(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item]
    ) -> None:
        """Raise ModelError, which names the token, if a question holds one that the model has no embedding of."""
        if not may_exceed(model, tokenizer):
            return  # as almost always
        prompts = [render_prompt(item.question.instruction, item.question.input, self.prompt) for item in items]
        if self.name == "label":
            labels = [item.question.labels for item in items]
            prompts = [f"{p}{ANSWER_PREFIX} {label}" for p, own in zip(prompts, labels, strict=True) for label in own]
        require_embeddings(model, tokenizer, encode(tokenizer, prompts), where="--data")

    @property
    def settings(self) -> dict[str, Any]:
        """What answers depend on, apart from model and question."""
        own = {"beams": self.beams, "new_tokens": NEW_TOKENS} if self.name == "generate" else {"prefix": ANSWER_PREFIX}
        template = hashlib.sha256(repr(TEMPLATES[self.prompt]["evaluation"]).encode()).hexdigest()
        return {"protocol": self.name, "prompt": self.prompt, "template": template[:16]} | own


@dataclass(frozen=True)
class Evaluator:
    """Puts questions to the variants that a model computes; with several ranks each answers its share."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    protocol: Protocol
    ranks: Ranks

    def answer(self, names: Sequence[str], items: Sequence[Item]) -> Iterator[tuple[list[Item], list[list[Answer]]]]:
        """Answer questions in batches.

        Args:
            names: The variants that the model computes now; several of them packed, adapter-major.
            items: The questions, the same on every rank.

        Yields:
            Every batch with each variant's answers, [len(names)][n], or with [] if it is another rank's.

        Raises:
            Interrupted: Between batches, after a request to stop.
            AdapterError, ModelError: If scores are not numbers.
        """
        share = math.ceil(len(items) / (BATCHES_PER_RANK * self.ranks.size))
        size = QUESTIONS_PER_BATCH if self.ranks.size == 1 else max(1, min(QUESTIONS_PER_BATCH, share))
        for number, batch in enumerate(_batches(items, size)):
            answers: list[list[Answer]] = []
            if number % self.ranks.size == self.ranks.rank:
                if self.ranks.stop.is_set():
                    raise Interrupted("stopped; the answers so far are kept", fix="the same command resumes from there")
                self.ranks.heartbeat(f"evaluating {', '.join(names)}")
                answers = self.protocol.answers(self.model, self.tokenizer, batch, copies=len(names))
                for name, own in zip(names, answers, strict=True):
                    check_numbers(name, batch, own)
            yield batch, answers


def _batches(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    """At most `size` questions of one benchmark, which begin alike, the longest first, so that padding is small.

    The benchmark with the longest question comes first, so that a lack of memory shows at once.
    """
    benchmarks: dict[str, list[Item]] = {}
    for item in sorted(items, key=lambda item: len(item.question.instruction) + len(item.question.input), reverse=True):
        benchmarks.setdefault(item.benchmark, []).append(item)
    for own in benchmarks.values():
        for at in range(0, len(own), size):
            yield own[at : at + size]
