"""Answers questions with a loaded model by the protocols `label` and `generate`, batch by batch, shared over ranks."""

import contextlib
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from poc_lora.artifacts.run_folder import RESULTS
from poc_lora.data.prompts import TEMPLATES, render_prompt
from poc_lora.distributed import Ranks
from poc_lora.errors import Interrupted, PocLoraError, RunError
from poc_lora.evaluation.answers import Answer, AnswerFile, Item, check_numbers
from poc_lora.evaluation.protocols.generate import NEW_TOKENS, generate_answers
from poc_lora.evaluation.protocols.label import ANSWER_PREFIX, answered, encode, label_answers
from poc_lora.evaluation.variants import Variants, activate_variants
from poc_lora.models.sharding import all_reduce_max
from poc_lora.models.vocabulary import may_exceed, require_embeddings
from poc_lora.progress import progress_bar

QUESTIONS_PER_BATCH = 256  # answered, then saved: what an interruption costs
BATCHES_PER_RANK = 2  # at least, with several ranks: none is left without work for long


@dataclass(frozen=True)
class Protocol:
    """A protocol and its settings: how prompts are made, and how answers are read."""

    name: str  # label or generate
    prompt: str  # the template
    beams: int = 1  # for generate; 1 is greedy

    def answers(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        items: Sequence[Item],
        *,
        copies: int,
        ranks: Ranks | None = None,
    ) -> list[list[Answer]]:
        """The answers of each of the `copies` variants that the model computes together: [copies][n].

        `ranks` that share a sharded base answer the same questions by `label`, together.
        """
        questions = [item.question for item in items]
        if self.name == "generate":
            return generate_answers(model, tokenizer, questions, prompt=self.prompt, beams=self.beams, copies=copies)
        return label_answers(model, tokenizer, questions, prompt=self.prompt, copies=copies, ranks=ranks)

    def require_embeddings(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item]
    ) -> None:
        """Raise ModelError, which names the token, if a question has a token without an embedding in the model."""
        if not may_exceed(model, tokenizer):
            return
        if self.name == "label":
            texts = [text for item in items for text in answered(item.question, self.prompt)]
        else:
            texts = [render_prompt(item.question.instruction, item.question.input, self.prompt) for item in items]
        require_embeddings(model, tokenizer, encode(tokenizer, texts), where="--data")

    @property
    def settings(self) -> dict[str, Any]:
        """What answers depend on, apart from model and question."""
        own = {"beams": self.beams, "new_tokens": NEW_TOKENS} if self.name == "generate" else {"prefix": ANSWER_PREFIX}
        template = hashlib.sha256(repr(TEMPLATES[self.prompt]["evaluation"]).encode()).hexdigest()
        return {"protocol": self.name, "prompt": self.prompt, "template": template[:16]} | own


@dataclass(frozen=True)
class Evaluator:
    """Answers questions with all variants of a model.

    Ranks share the questions; on a sharded base they answer every batch together.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    protocol: Protocol
    ranks: Ranks
    sharded: bool = False

    def answer(
        self, variants: Variants, files: Mapping[str, AnswerFile], subset_slots: Mapping[str, Sequence[int]]
    ) -> None:
        """Answer the questions without an answer in `files`, shared over the ranks, and add all answers to `files`.

        Args:
            variants: The base model's adapters and merge.
            files: By variant and subset, its questions and the answers known so far. The ensemble's file is left alone.
            subset_slots: By the name of a subset, the slots of its adapters.

        Raises:
            Interrupted: A rank was asked to stop; raised on all ranks.
            AdapterError, ModelError: Scores are NaN.
            RunError: The other ranks' answers cannot be read.
        """
        asked = {name: file for name, file in files.items() if name != "ensemble"}
        stopped = None
        try:
            self._answer_share(variants, asked, subset_slots)
        except Interrupted as problem:
            stopped = problem
        # A rank that had nothing left to answer learns here that others were stopped before their end.
        if any(self.ranks.gather(stopped is not None)):
            stopped = stopped or Interrupted("another rank was stopped", fix="the same command resumes")
            raise self.ranks.mark_shared(stopped)
        with self.ranks.raise_on_all():
            for file in asked.values():
                file.read()
                if missing := sum(item not in file.answers for item in file.items):
                    raise RunError(
                        f"{missing} answers cannot be read back",
                        where=file.path,
                        fix="the same command asks for them again; all processes need the same folder",
                    )

    def _answer_share(
        self, variants: Variants, files: Mapping[str, AnswerFile], subset_slots: Mapping[str, Sequence[int]]
    ) -> None:
        """Answer this rank's share, variant by variant, and save every batch."""
        total = sum(len(file.items) for file in files.values())
        with (
            progress_bar(total, "evaluating", hidden=self.ranks.process_index > 0) as progress,
            contextlib.closing(activate_variants(self.model, variants, subsets=subset_slots)) as steps,
        ):
            for names in steps:
                own = [files[name] for name in names]
                note = names[0] if len(names) == 1 else "adapters"
                missing = [item for item in own[0].items if any(item not in file.answers for file in own)]
                progress.advance((len(own[0].items) - len(missing)) * len(own), note)
                for batch, answers in self.answer_batches(names, missing):
                    if answers:
                        # Where results.json is present, all other files are of the same evaluation.
                        (variants.out / RESULTS).unlink(missing_ok=True)
                        for file, given in zip(own, answers, strict=True):
                            file.append(batch, given)
                    progress.advance(len(batch) * len(own), note)

    def answer_batches(
        self, names: Sequence[str], items: Sequence[Item]
    ) -> Iterator[tuple[list[Item], list[list[Answer]]]]:
        """Answer questions in batches.

        Args:
            names: The variants that the model computes now; several of them packed, adapter-major.
            items: The questions, the same on every rank.

        Yields:
            Every batch with each variant's answers, [len(names)][n], or with [] if it is another rank's.

        Raises:
            Interrupted, AdapterError, ModelError: As in `answer`.
        """
        if self.sharded:
            for batch in _batches(items, QUESTIONS_PER_BATCH):
                self._heartbeat(names)
                answers = self._answers(names, batch, self.ranks)
                yield batch, answers if self.ranks.process_index == 0 else []
            return
        share = math.ceil(len(items) / (BATCHES_PER_RANK * self.ranks.size))
        size = QUESTIONS_PER_BATCH if self.ranks.size == 1 else max(1, min(QUESTIONS_PER_BATCH, share))
        for number, batch in enumerate(_batches(items, size)):
            if number % self.ranks.size == self.ranks.process_index:
                self._heartbeat(names)
                yield batch, self._answers(names, batch)
            else:
                yield batch, []

    def _heartbeat(self, names: Sequence[str]) -> None:
        """Show that this rank is alive. Raises Interrupted if it, or where the base is sharded any, is to stop."""
        stop = self.ranks.stop.is_set()
        if all_reduce_max([stop])[0] if self.sharded else stop:
            raise Interrupted("stopped; the answers so far are kept", fix="the same command resumes from there")
        self.ranks.heartbeat(f"evaluating {', '.join(names)}")

    def _answers(self, names: Sequence[str], batch: Sequence[Item], ranks: Ranks | None = None) -> list[list[Answer]]:
        answers = self.protocol.answers(self.model, self.tokenizer, batch, copies=len(names), ranks=ranks)
        try:
            for name, own in zip(names, answers, strict=True):
                check_numbers(name, batch, own)
        except PocLoraError as problem:
            if ranks:
                self.ranks.mark_shared(problem)
            raise
        return answers


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
