"""The `harness` protocol: lm-eval scores every label by its log-likelihood, one variant after another."""

import contextlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from poc_lora.artifacts.run_folder import RESULTS
from poc_lora.data.commonsense import find_benchmarks
from poc_lora.data.questions import Question, read_questions
from poc_lora.errors import Interrupted
from poc_lora.evaluation.answers import Answer, Item, check_numbers
from poc_lora.evaluation.protocols.harness_tasks import quiet_lm_eval
from poc_lora.evaluation.variants import Variants, activate_variants
from poc_lora.files import write_atomic
from poc_lora.progress import progress_bar


@dataclass(frozen=True)
class TaskScores:
    """lm-eval's scores of one variant on the n questions of one task, which have up to k labels."""

    log_probs: Tensor  # [n, k] of the labels, -inf for missing ones
    answers: Tensor  # [n], the index of the right one
    truncated: Tensor  # [n], the prompt was cut on the left, as lm-eval does with what exceeds the context


def harness_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, Any],
    variants: Variants,
    *,
    data: Path | None,
    limit: int | None = None,
    stop: threading.Event | None = None,
) -> tuple[list[Item], dict[str, dict[Item, Answer]]]:
    """Score the base, every adapter and the merge by lm-eval.

    lm-eval's own results of a variant are written to `OUT/harness/VARIANT` as soon as it is scored, and an earlier
    results.json is removed.

    Args:
        model: The base model, without a bank.
        tasks: From `load_tasks`.
        data: The folder of the local tasks' questions; None for lm-eval's own tasks.
        limit: Only the first questions of each task.
        stop: Set to stop between answers.

    Returns:
        The questions, and for every variant but the ensemble its answers. A question that exceeds the context has an
        answer too, to its truncated prompt, which is marked `too_long`.

    Raises:
        AdapterError, ModelError: If scores are not numbers.
        Interrupted: If `stop` was set.
    """
    items: list[Item] = []
    answers: dict[str, dict[Item, Answer]] = {}
    requests = sum(len(t.doc_to_choice(doc)) for t in tasks.values() for doc in islice(t.eval_docs, limit))
    count = 1 + len(variants.adapters) + (variants.merged is not None or variants.exact_average)
    with (
        progress_bar(count * requests, "evaluating") as progress,
        contextlib.closing(activate_variants(model, variants, packed=False)) as steps,
    ):
        for (name,) in steps:

            def on_progress(answers: int, name: str = name) -> None:
                if stop is not None and stop.is_set():
                    raise Interrupted(f"stopped while lm-eval scored {name}", fix="the same command starts again")
                progress.advance(answers, name)

            scores, results = score_tasks(model, tokenizer, tasks, limit=limit, on_progress=on_progress)
            items = items or _items(data, scores)
            answers[name] = {item: _answer(item, scores[item.benchmark]) for item in items}
            check_numbers(name, items, list(answers[name].values()))
            (variants.out / RESULTS).unlink(missing_ok=True)
            _write(variants.out / "harness" / name, results)
    return items, answers


def score_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, Any],
    *,
    limit: int | None = None,
    on_progress: Callable[[int], object] = lambda _: None,
) -> tuple[dict[str, TaskScores], dict[str, Any]]:
    """Score the variant that `model` computes now. lm-eval's cache is not used: it cannot tell adapters apart.

    Args:
        model, tokenizer, tasks, limit: As in `harness_answers`.
        on_progress: As for `LoadedModel`.

    Returns:
        The scores by benchmark folder, and lm-eval's own results.
    """
    from lm_eval.evaluator import evaluate

    from poc_lora.evaluation.protocols.harness_model import LoadedModel

    names = {folder: task.config.task for folder, task in tasks.items()}
    with quiet_lm_eval():
        wrapped = LoadedModel(model, tokenizer, on_progress)
        task_dict = {"tasks": {names[folder]: task for folder, task in tasks.items()}}
        results = evaluate(lm=wrapped, task_dict=task_dict, limit=limit, log_samples=True)
    scores = {}
    for folder, task in tasks.items():
        samples = results["samples"][names[folder]]
        rows = [torch.tensor([log_prob for log_prob, _ in sample["filtered_resps"]]) for sample in samples]
        scores[folder] = TaskScores(
            log_probs=torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-torch.inf),
            answers=torch.tensor([_right_choice(task, sample) for sample in samples]),
            truncated=torch.tensor([(names[folder], sample["doc_id"]) in wrapped.truncated for sample in samples]),
        )
    return scores, results


def _right_choice(task: Any, sample: dict[str, Any]) -> int:
    # Where every choice has a context of its own, lm-eval has the text that follows as the target.
    right = task.doc_to_text(sample["doc"]) if task.multiple_input else sample["target"]
    return right if isinstance(right, int) else int(task.doc_to_choice(sample["doc"]).index(right))


def _items(data: Path | None, scores: Mapping[str, TaskScores]) -> list[Item]:
    """The questions that were asked; for lm-eval's own tasks, stand-ins with as many labels."""
    items = []
    for folder, found in scores.items():
        if data is not None:
            questions = read_questions(data, find_benchmarks([folder])[0], limit=len(found.answers))
        else:
            counts = (~found.log_probs.isneginf()).sum(1).tolist()
            numbered = [tuple(map(str, range(1, count + 1))) for count in counts]
            pairs = zip(numbered, found.answers.tolist(), strict=True)
            questions = [Question("", "", labels, labels[right]) for labels, right in pairs]
        items += [Item(folder, "test", row, question) for row, question in enumerate(questions, start=1)]
    return items


def _answer(item: Item, scores: TaskScores) -> Answer:
    labels = item.question.labels
    row = scores.log_probs[item.row - 1, : len(labels)].tolist()
    return Answer(labels[row.index(max(row))], too_long=bool(scores.truncated[item.row - 1]), log_probs=tuple(row))


def _write(folder: Path, results: dict[str, Any]) -> None:
    """Write lm-eval's results.json and a samples file per task, in its formats but without the date in the names."""
    from lm_eval.utils import handle_non_serializable

    (folder / "results.json").unlink(missing_ok=True)  # where it is present, the rest is of the same evaluation
    for task, samples in results["samples"].items():
        write_samples(folder / f"samples_{task}.jsonl", samples)
    summary = {key: value for key, value in results.items() if key != "samples"}
    text = json.dumps(summary, default=handle_non_serializable, ensure_ascii=False, indent=2)
    write_atomic(folder / "results.json", text + "\n")


def write_samples(path: Path, samples: Sequence[dict[str, Any]]) -> None:
    """Write the samples of a task, from lm-eval's results, in the format of its `--log_samples`."""
    from lm_eval.utils import handle_non_serializable, sanitize_list

    lines = []
    for sample in samples:
        arguments = {
            f"gen_args_{i}": {f"arg_{j}": part for j, part in enumerate(argument)}
            for i, argument in enumerate(sample["arguments"])
        }
        shown = {
            "arguments": arguments,
            "resps": sanitize_list(sample["resps"]),
            "filtered_resps": sanitize_list(sample["filtered_resps"]),
            "target": str(sample["target"]),
        }
        lines.append(json.dumps(sample | shown, default=handle_non_serializable, ensure_ascii=False) + "\n")
    write_atomic(path, "".join(lines))
