"""`evaluate`: the base, every adapter, the merge and the prediction ensemble, scored over one loaded base model."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from poc_lora.data.commonsense import Question, chance_level, find_benchmarks, read_questions
from poc_lora.errors import AdapterError, ModelError, RequestError
from poc_lora.evaluation import scores
from poc_lora.evaluation.label import PreparedQuestions, prepare, score_labels
from poc_lora.evaluation.results import RESULTS_FILE, Results, Scored, adapter_key, summarise
from poc_lora.evaluation.scores import Estimate
from poc_lora.evaluation.targets import Subjects, find_subjects
from poc_lora.files import write_atomic, write_json
from poc_lora.lora.bank import AdapterBank
from poc_lora.lora.base import context_length, load_base
from poc_lora.progress import track


def evaluate(
    targets: Sequence[Path],
    *,
    data: Path,
    base: str | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    benchmarks: Sequence[str] | None = None,
    prompt: str | None = None,
    limit: int | None = None,
    out: Path | None = None,
    seed: int = 0,
    device: torch.device | None = None,
) -> Results:
    """Score one run, or adapters of one base model, on the benchmarks in `data` by the label protocol.

    targets: a run folder, whose config gives base, prompt and dtype where they are not given here; or adapter
    folders, whose base is `base` or the one they name. benchmarks: folder or paper names, default all eight. limit:
    the first so many questions of each. seed: of the bootstrap of the paired differences. out: default `RUN/eval`;
    required for loose adapters. Writes a JSON and a per-question JSONL file for everything scored, then
    results.json.

    Raises RequestError, RunError, AdapterError, DataError or ModelError before any weights are loaded where it can.
    """
    if limit is not None and limit < 1:
        raise RequestError(f"a limit of {limit} questions leaves nothing to score", fix="give a limit of 1 or more")
    subjects = find_subjects(targets, base=base, revision=revision, dtype=dtype, prompt=prompt, out=out)
    questions = {b.folder: read_questions(data, b, limit=limit) for b in find_benchmarks(benchmarks)}
    model, tokenizer = load_base(subjects.base, revision=subjects.revision, dtype=subjects.dtype, device=device)
    prepared = {
        b: prepare(qs, tokenizer, prompt=subjects.prompt, max_length=context_length(model))
        for b, qs in questions.items()
    }
    log_probs = _score(model, subjects, prepared)
    results = summarise(
        log_probs,
        {b: p.answers for b, p in prepared.items()},
        {b: p.too_long for b, p in prepared.items()},
        adapters=list(subjects.adapters),
        seed=seed,
        base_model=subjects.base,
        prompt=subjects.prompt,
        limit=limit,
        chance={b: chance_level(qs) for b, qs in questions.items()},
    )
    _write(subjects, results, questions, prepared, log_probs)
    return results


def _score(
    model: PreTrainedModel, subjects: Subjects, prepared: Mapping[str, PreparedQuestions]
) -> dict[str, dict[str, Tensor]]:
    """The label scores [n, k] of everything: thing to benchmark to scores."""
    adapters = list(subjects.adapters.values())
    passes = 1 + len(adapters) + (subjects.merged is not None)
    with track(passes * sum(p.rows for p in prepared.values()), "evaluating") as progress:

        def score(copies: int, note: str) -> dict[str, Tensor]:
            def advance(rows: int) -> None:
                progress.advance(rows * copies, note)

            return {b: score_labels(model, p, copies=copies, advance=advance) for b, p in prepared.items()}

        single = {}
        if subjects.merged is not None:
            # A bank of its own: in the pack its rank, the sum of theirs, would pad every adapter.
            bank = AdapterBank.from_adapters(model, [subjects.merged])
            single["merged"] = score(1, "merged")
            bank.remove()
        bank = AdapterBank.from_adapters(model, adapters)
        with bank.disabled():
            single["base"] = score(1, "base")
        packed = score(bank.size, "adapters")
        bank.remove()
    log_probs = {thing: {b: x[0] for b, x in parts.items()} for thing, parts in single.items()}
    for slot, name in enumerate(subjects.adapters):
        log_probs[adapter_key(name)] = {b: x[slot] for b, x in packed.items()}
    _check_finite(log_probs, subjects)
    if len(adapters) > 1:
        log_probs["ensemble"] = {b: scores.ensemble(x) for b, x in packed.items()}
    return log_probs


def _check_finite(log_probs: Mapping[str, Mapping[str, Tensor]], subjects: Subjects) -> None:
    for thing, parts in log_probs.items():
        for benchmark, x in parts.items():
            if x.isnan().any():
                where = f"{thing} on {benchmark}"
                if thing == "base":
                    raise ModelError("the base model's scores are not numbers", where=where, fix="try --dtype float32")
                fix = "the adapter has diverged or overflows in this dtype: leave it out, or try float32"
                raise AdapterError("the adapter's scores are not numbers", where=where, fix=fix)


def _write(
    subjects: Subjects,
    results: Results,
    questions: Mapping[str, Sequence[Question]],
    prepared: Mapping[str, PreparedQuestions],
    log_probs: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """One JSON and one JSONL per thing; where results.json stands, the rest is of the same evaluation."""
    (subjects.out / RESULTS_FILE).unlink(missing_ok=True)
    sources = {adapter_key(name): adapter.source for name, adapter in subjects.adapters.items()}
    if subjects.merged is not None:
        sources["merged"] = subjects.merged.source
    found: dict[str, Scored | None] = {adapter_key(name): scored for name, scored in results.adapters.items()}
    found |= {"base": results.base, "merged": results.merged, "ensemble": results.ensemble}
    for thing, scored in found.items():
        if scored is None:
            continue
        lines = (
            json.dumps(line, ensure_ascii=False)
            for b, qs in questions.items()
            for line in _per_question(b, qs, log_probs[thing][b], prepared[b].too_long)
        )
        write_atomic(subjects.out / f"{thing}.jsonl", "".join(f"{line}\n" for line in lines))
        write_json(
            subjects.out / f"{thing}.json",
            {
                "thing": thing,
                "source": sources.get(thing),
                "base_model": results.base_model,
                "protocol": results.protocol,
                "prompt": results.prompt,
                "benchmarks": {
                    b: _plain(e) | {"questions": results.questions[b]} for b, e in scored.benchmarks.items()
                },
                "average": _plain(scored.average),
            },
        )
    write_json(subjects.out / RESULTS_FILE, results.to_json())


def _per_question(
    benchmark: str, questions: Sequence[Question], log_probs: Tensor, too_long: Tensor
) -> Iterator[dict[str, Any]]:
    """`row` counts from 1, as in messages about the file. A question that was too long has no choice and is wrong."""
    chosen = scores.choices(log_probs).tolist()
    rows = zip(questions, chosen, log_probs.tolist(), too_long.tolist(), strict=True)
    for row, (question, choice, values, skipped) in enumerate(rows, start=1):
        label = None if skipped else question.labels[choice]
        yield {
            "benchmark": benchmark,
            "row": row,
            "answer": question.answer,
            "choice": label,
            "correct": label == question.answer,
            "log_probs": None
            if skipped
            else {name: round(x, 6) for name, x in zip(question.labels, values, strict=False)},
        }


def _plain(estimate: Estimate) -> dict[str, float | None]:
    return {"accuracy": estimate.value, "error": None if math.isnan(estimate.error) else estimate.error}
