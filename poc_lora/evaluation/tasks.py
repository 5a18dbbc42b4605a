"""`evaluate_tasks`: the base, every adapter and their merge on tasks of lm-eval, over one loaded base model."""

import contextlib
import importlib.metadata
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from poc_lora.artifacts.run_folder import TASK_RESULTS
from poc_lora.artifacts.task_scores import TaskResults, TaskScore
from poc_lora.distributed import open_ranks
from poc_lora.errors import Interrupted, RequestError
from poc_lora.evaluation.protocols.named_tasks import WHERE, load_named_tasks
from poc_lora.evaluation.protocols.task_scoring import (
    PreparedTask,
    check_room,
    prepare_task,
    read_score,
    score_task,
    write_score,
)
from poc_lora.evaluation.task_summary import summarise_tasks
from poc_lora.evaluation.variants import (
    Variants,
    activate_variants,
    adapter_digests,
    base_digest,
    find_variants,
    load_base_of,
)
from poc_lora.files import as_paths, require_place
from poc_lora.models.forward import without_cudnn_attention
from poc_lora.models.load import default_device, load_tokenizer, resolve_dtype
from poc_lora.progress import progress_bar


def evaluate_tasks(
    targets: str | Path | Sequence[str | Path],
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    include_path: str | Path | None = None,
    apply_chat_template: bool = False,
    limit: int | None = None,
    base: str | Path | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    quantization: str | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    device: torch.device | None = None,
) -> TaskResults:
    """Score variants of one base model on any tasks, groups and tags of lm-eval, with its metrics and errors.

    The scores of a variant on each task are saved in `OUT/VARIANT` with lm-eval's samples, so the same call resumes an
    interrupted evaluation. Writes tasks.json at the end.

    Args:
        targets, base, revision, dtype, quantization: As for `evaluate`.
        tasks, num_fewshot, include_path: As for `load_named_tasks`.
        apply_chat_template: Ask in the chat template, a task's description as the system's turn and each example as two
            turns, as lm-eval does. The run's template takes the place of the base's.
        limit: Only the first documents of each task.
        out: The folder for results; default: RUN/eval-tasks. Required for adapters outside a run.
        seed: Of the bootstrap of differences.
        device: Default: the GPU, or the CPU.

    Returns:
        What was written to tasks.json. There is no prediction ensemble: generated texts have no mean.

    Raises:
        RequestError, RunError, AdapterError, DataError, ModelError: Something cannot be evaluated; raised before
            weights are loaded if possible.
        Interrupted: Ctrl-C or SIGTERM.
    """
    device = device or default_device()
    if limit is not None and limit < 1:
        raise RequestError(f"the limit is {limit} documents", where="--limit", fix="give 1 or more")
    with open_ranks(device) as ranks, without_cudnn_attention():
        if ranks.size > 1:
            raise RequestError("lm-eval runs in one process", where=WHERE)
        variants = find_variants(
            as_paths(targets),
            base=None if base is None else str(base),
            revision=revision,
            dtype=dtype,
            quantization=quantization,
            out=None if out is None else Path(out),
            protocol="tasks",
        )
        require_place(variants.out)
        named = load_named_tasks(
            tasks, num_fewshot=num_fewshot, include_path=None if include_path is None else Path(include_path)
        )
        prepared = [prepare_task(name, task, limit) for name, task in named.tasks.items()]
        template = _chat_template(variants) if apply_chat_template else None
        version = importlib.metadata.version("lm_eval")
        settings = {
            "lm_eval": version,
            "base": base_digest(variants.base, variants.revision),
            "dtype": resolve_dtype(variants.dtype, device),
            "quantization": variants.quantization,
        }
        if template is not None:
            settings["chat_template"] = template
        weights = {name: digests for name, digests in variants.digests().items() if name != "ensemble"}
        keys = {
            name: {task.name: task.key(settings | {"adapters": digests}) for task in prepared}
            for name, digests in weights.items()
        }
        found = {
            name: {task: known for task, key in own.items() if (known := read_score(variants.out / name, task, key))}
            for name, own in keys.items()
        }
        if any(found[name].keys() != own.keys() for name, own in keys.items()):
            model, tokenizer = load_base_of(variants, device)
            check_room(model, tokenizer, prepared)
            score = partial(score_task, model, tokenizer, apply_chat_template=apply_chat_template)
            found = _score_missing(model, score, variants, prepared, keys, found, ranks.stop)
    results = TaskResults(
        base_model=variants.base,
        lm_eval=version,
        limit=limit,
        apply_chat_template=apply_chat_template,
        exact_average=variants.exact_average,
        adapter_digests=adapter_digests(weights),
        tasks=summarise_tasks(named, found, adapters=list(variants.adapters), seed=seed),
    )
    results.write(variants.out / TASK_RESULTS)
    return results


def _chat_template(variants: Variants) -> str:
    """The text of the template that lm-eval applies. Raises RequestError if there is none."""
    tokenizer = load_tokenizer(variants.base, revision=variants.revision, chat_template=variants.chat_template)
    if not tokenizer.chat_template:
        fix = "leave it out; or take the base's instruct model, or train with data.chat_template"
        raise RequestError(f"{variants.base} has no chat template", where="--apply-chat-template", fix=fix)
    return str(tokenizer.chat_template)


def _score_missing(
    model: PreTrainedModel,
    score_one: Callable[..., tuple[TaskScore, list[dict[str, Any]]]],
    variants: Variants,
    prepared: Sequence[PreparedTask],
    keys: Mapping[str, Mapping[str, str]],
    known: Mapping[str, Mapping[str, TaskScore]],
    stop: threading.Event,
) -> dict[str, dict[str, TaskScore]]:
    """Score what is not known, variant by variant, and save each task of each. Returns it with what is known."""
    requests = sum(task.requests for task in prepared)
    done = sum(task.requests for task in prepared for scores in known.values() if task.name in scores)
    found = {name: dict(scores) for name, scores in known.items()}
    with (
        progress_bar(len(keys) * requests, "evaluating", done=done) as progress,
        contextlib.closing(activate_variants(model, variants, packed=False)) as steps,
    ):
        for (name,) in steps:
            for task in prepared:
                if task.name in found[name]:
                    continue
                note = f"{name}, {task.name}"

                def on_progress(answers: int, note: str = note) -> None:
                    if stop.is_set():
                        raise Interrupted(
                            f"stopped at {note}; the tasks before are kept", fix="the same command resumes"
                        )
                    progress.advance(answers, note)

                key = keys[name][task.name]
                score, samples = score_one(task, variant=name, key=key, on_progress=on_progress)
                (variants.out / TASK_RESULTS).unlink(missing_ok=True)  # where it is present, all is of one evaluation
                write_score(variants.out / name, task.name, score, samples)
                found[name][task.name] = score
    return found
