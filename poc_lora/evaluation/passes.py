"""Questions put to models: the base, each adapter, merges of them, in passes over one loaded base model."""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file, extract_commit_hash

from poc_lora.adapters.adapter import CONFIG_NAME, WEIGHTS_NAME
from poc_lora.data.prompts import TEMPLATES
from poc_lora.distributed import Ranks
from poc_lora.errors import AdapterError, Interrupted, ModelError, first_line
from poc_lora.evaluation.answers import Answer, AnswerFile, Item
from poc_lora.evaluation.protocols.generate import NEW_TOKENS, generate_answers
from poc_lora.evaluation.protocols.label import ANSWER_PREFIX, label_answers
from poc_lora.files import sha256_file

QUESTIONS_PER_COMMIT = 256  # answered at once, then kept: what an interruption costs
PARTS_PER_RANK = 2  # at least, where there are several ranks: none is left without work for long

Advance = Callable[[int, str], object]


@dataclass(frozen=True)
class Protocol:
    """How questions are asked and answers read: `label` or `generate`, with a prompt template."""

    name: str
    prompt: str
    beams: int = 1

    def answers(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        questions: Sequence[Item],
        *,
        copies: int,
    ) -> list[list[Answer]]:
        """What each of `copies` models answers to every question: [copies][n]."""
        asked = [item.question for item in questions]
        if self.name == "generate":
            return generate_answers(model, tokenizer, asked, prompt=self.prompt, beams=self.beams, copies=copies)
        return label_answers(model, tokenizer, asked, prompt=self.prompt, copies=copies)

    @property
    def settings(self) -> dict[str, Any]:
        """What answers depend on."""
        own = {"beams": self.beams, "new_tokens": NEW_TOKENS} if self.name == "generate" else {"prefix": ANSWER_PREFIX}
        template = hashlib.sha256(repr(TEMPLATES[self.prompt]["evaluation"]).encode()).hexdigest()
        return {"protocol": self.name, "prompt": self.prompt, "template": template[:16]} | own


@dataclass(frozen=True)
class Asker:
    """Puts questions to a model and keeps the answers; each rank takes every so-manieth part of them."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    protocol: Protocol
    ranks: Ranks
    advance: Advance  # is told of answers, and whose
    began: Callable[[], object] = lambda: None  # called before an answer that is new is kept

    def ask(self, files: Mapping[str, AnswerFile], *, copies: int = 1) -> None:
        """Fill the files of `copies` models, which answer together, one behind the other in every batch.

        Answers that a file holds already are not asked for again. Raises Interrupted where this rank was asked to stop.
        """
        (first, *_) = files.values()
        missing = [item for item in first.items if any(item not in file.answers for file in files.values())]
        note = next(iter(files)) if copies == 1 else "adapters"
        self.advance((len(first.items) - len(missing)) * copies, note)
        share = math.ceil(len(missing) / (PARTS_PER_RANK * self.ranks.size))
        size = QUESTIONS_PER_COMMIT if self.ranks.size == 1 else max(1, min(QUESTIONS_PER_COMMIT, share))
        for number, part in enumerate(_parts(missing, size)):
            if number % self.ranks.size == self.ranks.rank:
                self._stop_if_asked()
                self.ranks.heartbeat(f"asking {note}")
                everyone = self.protocol.answers(self.model, self.tokenizer, part, copies=copies)
                for (thing, file), answers in zip(files.items(), everyone, strict=True):
                    _check_numbers(thing, part, answers)
                    self.began()
                    file.append(part, answers)
            self.advance(len(part) * copies, note)

    def _stop_if_asked(self) -> None:
        if self.ranks.stop.is_set():
            raise Interrupted("stopped; the answers so far are kept", fix="the same command goes on from there")


def _parts(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    """At most `size` each, by benchmark, whose questions begin alike, and the longest first, so that batches are even.

    The benchmark of the longest question comes first: the memory needed shows at once.
    """

    def length(item: Item) -> int:
        return len(item.question.instruction) + len(item.question.input)

    benchmarks: dict[str, list[Item]] = {}
    for item in sorted(items, key=length, reverse=True):
        benchmarks.setdefault(item.benchmark, []).append(item)
    for own in benchmarks.values():
        for at in range(0, len(own), size):
            yield own[at : at + size]


def _check_numbers(thing: str, items: Sequence[Item], answers: Sequence[Answer]) -> None:
    for item, answer in zip(items, answers, strict=True):
        if any(math.isnan(value) for value in answer.log_probs or ()):
            where = f"{thing} on {item.benchmark}"
            if thing == "base":
                raise ModelError("the base model's scores are not numbers", where=where, fix="try --dtype float32")
            fix = "the adapter has diverged or overflows in this dtype: leave it out, or try float32"
            raise AdapterError("the adapter's scores are not numbers", where=where, fix=fix)


def adapter_digest(folder: Path) -> str:
    """What tells two adapters apart: a hash of weights and configuration."""
    return sha256_file(folder / WEIGHTS_NAME) + sha256_file(folder / CONFIG_NAME)


def base_digest(name: str, revision: str | None = None) -> str:
    """What tells two base models apart: a Hub id's commit, and for a folder its files' sizes and times.

    Raises ModelError where there is no such model.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        try:
            config = cached_file(name, "config.json", revision=revision)
        except OSError as problem:
            fix = "give a folder with config.json, or a Hub id org/name"
            raise ModelError(f"no base model '{name}': {first_line(problem)}", where="model.name", fix=fix) from problem
        return f"{name} at {extract_commit_hash(config, None)}"
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.iterdir())]
    return f"{folder.resolve()} {hashlib.sha256(repr(files).encode()).hexdigest()}"
