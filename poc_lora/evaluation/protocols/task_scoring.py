"""Scores the variant that the model computes on one task of lm-eval, and saves the scores for the next evaluation."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from poc_lora.artifacts.schema import LARGEST
from poc_lora.artifacts.task_scores import Score, TaskScore
from poc_lora.errors import AdapterError, ModelError, PocLoraError, RequestError, RunError, first_line
from poc_lora.evaluation.protocols.harness import write_samples
from poc_lora.evaluation.protocols.harness_tasks import SEED, quiet_lm_eval


@dataclass(frozen=True)
class PreparedTask:
    """A task of lm-eval and what it asks.

    Attributes:
        name: As in lm-eval's results.
        task: lm-eval's object.
        limit: Only the first documents; None for all.
        requests: How many answers the model gives.
        asked: A hash of the task's configuration and of all requests: prompts (without a chat template), documents and
            settings.
    """

    name: str
    task: Any
    limit: int | None
    requests: int
    asked: str

    def key(self, settings: Mapping[str, Any]) -> str:
        """A hash of the task and of `settings`, which is what else the scores depend on."""
        return _hash([self.asked, dict(settings)])


def prepare_task(name: str, task: Any, limit: int | None) -> PreparedTask:
    """Build a task's requests, to count and to compare them. Raises RequestError if its own code fails."""
    with _lm_eval_on(name, name):
        task.set_fewshot_seed(SEED)
        task.build_all_requests(limit=limit)
        requests = [[r.request_type, r.args, r.doc] for r in task.instances]
        asked = _hash([task.dump_config(), requests])
        count = sum(r.repeats or 1 for r in task.instances)
    return PreparedTask(name, task, limit, count, asked)


def score_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prepared: PreparedTask,
    *,
    variant: str,
    key: str,
    apply_chat_template: bool = False,
    on_progress: Callable[[int], object],
) -> tuple[TaskScore, list[dict[str, Any]]]:
    """Score the variant that `model` computes now on one task.

    Args:
        variant: Its name, for errors.
        key: Of the scores.
        apply_chat_template: Ask in the tokenizer's chat template.
        on_progress: As for `LoadedModel`.

    Returns:
        The scores, and lm-eval's samples: a dictionary for each document and filter.

    Raises:
        AdapterError, ModelError: Log-likelihoods are NaN.
        RequestError: The task's own code fails.
    """
    from lm_eval.evaluator import evaluate

    from poc_lora.evaluation.protocols.harness_model import LoadedModel

    task, name = prepared.task, prepared.name
    with _lm_eval_on(name, f"{variant} on {name}"):
        wrapped = LoadedModel(model, tokenizer, on_progress)
        task.set_fewshot_seed(SEED)
        found = evaluate(
            lm=wrapped,
            task_dict={"tasks": {name: task}},
            limit=prepared.limit,
            log_samples=True,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=apply_chat_template,
        )
    samples: list[dict[str, Any]] = found["samples"][name]
    _check_numbers(variant, name, samples)
    results = found["results"][name]
    metrics = {str(k): v for k, v in results.items() if "," in k and "_stderr," not in k and isinstance(v, Real)}
    score = TaskScore(
        key=key,
        documents=found["n-samples"][name]["effective"],
        truncated=len(wrapped.truncated),
        metrics={k: Score(number(v), number(results.get(error_key(k)))) for k, v in metrics.items()},
        scores=_scores(task, samples),
    )
    return score, samples


def read_score(folder: Path, task: str, key: str) -> TaskScore | None:
    """Returns the scores that an earlier evaluation saved under the same key; None if there are none."""
    try:
        found = TaskScore.read_if_there(_path(folder, task))
    except RunError:  # damaged: it is asked again
        return None
    return found if found is not None and found.key == key else None


def write_score(folder: Path, task: str, score: TaskScore, samples: Sequence[dict[str, Any]]) -> None:
    """Write lm-eval's samples, then the scores: if the scores are there, both are complete."""
    path = _path(folder, task)
    path.unlink(missing_ok=True)
    write_samples(path.with_name(f"samples_{path.stem}.jsonl"), samples)
    score.write(path)


def check_room(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[PreparedTask]) -> None:
    """Raises RequestError for a task that generates more tokens than the model's context has."""
    from poc_lora.evaluation.protocols.harness_model import LoadedModel

    with quiet_lm_eval():
        wrapped = LoadedModel(model, tokenizer, lambda _: None)
        for prepared in tasks:
            for request in prepared.task.instances[:1]:
                if request.request_type == "generate_until":
                    wrapped.new_tokens(prepared.name, request.args[1])


@contextmanager
def _lm_eval_on(task: str, where: str) -> Iterator[None]:
    """Turn what a task's own code, or a library that it needs, raises into an error with the task's name."""
    try:
        with quiet_lm_eval():
            yield
    except (PocLoraError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as problem:
        what = f"lm-eval's task {task} failed: {type(problem).__name__}: {first_line(problem)}"
        fix = "see whether lm-eval itself runs it on this machine; some tasks need packages of their own"
        raise RequestError(what, where=where, fix=fix) from problem


def _check_numbers(variant: str, task: str, samples: Sequence[Mapping[str, Any]]) -> None:
    answers = (answer for sample in samples for given in sample["resps"] for answer in given)
    values = (answer[0] if isinstance(answer, tuple | list) else answer for answer in answers)
    if any(isinstance(value, float) and math.isnan(value) for value in values):
        error = ModelError if variant == "base" else AdapterError
        fix = "try --dtype float32" + ("" if variant == "base" else ", or leave the adapter out: it has diverged")
        raise error("log-likelihoods are not numbers", where=f"{variant} on {task}", fix=fix)


def error_key(key: str) -> str:
    """lm-eval's key of a metric's standard error: "acc,none" -> "acc_stderr,none"."""
    metric, _, filter_name = key.partition(",")
    return f"{metric}_stderr,{filter_name}"


def number(value: Any) -> float:
    """A number of lm-eval; NaN for "N/A" and for what is too large to show, as the perplexity of a diverged model."""
    return float(value) if isinstance(value, Real) and abs(float(value)) <= LARGEST else math.nan


def _scores(task: Any, samples: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """The values of each document, of metrics that are their mean."""
    from lm_eval.api.metrics import mean

    found: dict[str, list[float]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            if task.aggregation().get(metric, mean) is mean:
                found.setdefault(f"{metric},{sample['filter']}", []).append(float(sample[metric]))
    documents = len({sample["doc_id"] for sample in samples})
    return {k: values for k, values in found.items() if len(values) == documents and all(map(math.isfinite, values))}


def _path(folder: Path, task: str) -> Path:
    return folder / f"{re.sub(r'[^A-Za-z0-9_.+-]', '_', task)}.json"


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", text).encode()).hexdigest()
