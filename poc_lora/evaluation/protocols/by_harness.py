"""An evaluation by lm-eval in place of our own asking: the same table from its answers."""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from poc_lora.artifacts.results import Results
from poc_lora.data.commonsense import Benchmark, Question, chance_level, read_questions
from poc_lora.evaluation.answers import Answer, Item
from poc_lora.evaluation.protocols.harness import TaskScores, load_tasks, score_harness
from poc_lora.evaluation.results import adapter_key, summarise, variant_digests, write_results
from poc_lora.evaluation.statistics import ensemble
from poc_lora.evaluation.variants import Subjects
from poc_lora.models.load import load_base


def evaluate_by_harness(
    subjects: Subjects,
    benchmarks: Sequence[Benchmark],
    data: Path | None,
    *,
    settings: Mapping[str, Any],
    limit: int | None,
    seed: int,
    device: torch.device,
    stop: threading.Event,
) -> Results:
    """Score everything by lm-eval, and write its own files to `OUT/harness/THING` beside ours.

    data: the folder of local questions; None: lm-eval's own tasks, from the Hub, with its own prompts. settings: what
    answers depend on beside question, adapter and prompt. stop: may be set while this runs. Raises as `evaluate`.
    """
    prompt = subjects.prompt if data else "lm-eval's own"
    tasks = load_tasks(benchmarks, data=data, prompt=subjects.prompt)
    model, tokenizer = load_base(
        subjects.base,
        revision=subjects.revision,
        dtype=subjects.dtype,
        quantization=subjects.quantization,
        device=device,
    )
    found = score_harness(
        model,
        tokenizer,
        tasks,
        adapters=subjects.adapters,
        merged=subjects.merged,
        limit=limit,
        out=subjects.out,
        stop=stop,
    )
    items = [item for b in benchmarks for item in _items(b, data, found["base"][b.folder])]
    answers = {thing: dict(zip(items, _answers(items, scores), strict=True)) for thing, scores in found.items()}
    members = [answers[adapter_key(name)] for name in subjects.adapters]
    if len(members) > 1:
        answers["ensemble"] = {item: ensemble(item, [given[item] for given in members]) for item in items}
    by_benchmark = {b.folder: [item.question for item in items if item.benchmark == b.folder] for b in benchmarks}
    results = summarise(
        answers,
        items,
        adapters=list(subjects.adapters),
        control=None,
        seed=seed,
        base_model=subjects.base,
        protocol="harness",
        prompt=prompt,
        limit=limit,
        chance={b: chance_level(questions) for b, questions in by_benchmark.items()},
        subsets=None,
        exact_average=subjects.merged is None and "merged" in answers,
    )
    shared = {**settings, "protocol": "harness", "prompt": prompt}
    write_results(
        subjects, results, {thing: shared | {"adapters": of} for thing, of in variant_digests(subjects).items()}
    )
    return results


def _items(benchmark: Benchmark, data: Path | None, scores: TaskScores) -> list[Item]:
    """The questions that were asked; of lm-eval's own tasks only the numbers of their answers are known here."""
    if data is not None:
        questions = read_questions(data, benchmark, limit=len(scores.answers))
    else:
        counts = (~scores.log_probs.isneginf()).sum(1).tolist()
        numbered = [tuple(map(str, range(1, count + 1))) for count in counts]
        pairs = zip(numbered, scores.answers.tolist(), strict=True)
        questions = [Question("", "", labels, labels[right]) for labels, right in pairs]
    return [Item(benchmark.folder, "test", row, question) for row, question in enumerate(questions, start=1)]


def _answers(items: Sequence[Item], scores: Mapping[str, TaskScores]) -> list[Answer]:
    """What lm-eval found; a question beyond the context has an answer too, to what it left of the prompt."""
    answers = []
    for item in items:
        found, labels = scores[item.benchmark], item.question.labels
        row = found.log_probs[item.row - 1, : len(labels)].tolist()
        shortened = bool(found.shortened[item.row - 1])
        answers.append(Answer(labels[row.index(max(row))], too_long=shortened, log_probs=tuple(row)))
    return answers
