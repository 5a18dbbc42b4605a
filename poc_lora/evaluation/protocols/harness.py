"""The `harness` protocol: lm-eval scores every answer by its log-likelihood, on its own tasks or on local JSON.

The local tasks are in the folder `tasks`; they ask what the `label` protocol asks, with the same prompt, and so choose
the same labels. Equal scores go to the first label in both. Where scores differ by rounding alone the choices may
differ too: lm-eval adds the tokens that all labels share, `label` leaves them out, so a difference below float32's
resolution of the larger sum is a tie here and not there.
"""

import contextlib
import importlib.util
import json
import logging
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from poc_lora.adapters.adapter import Adapter
from poc_lora.artifacts.run_folder import RESULTS
from poc_lora.data.commonsense import Benchmark, find_benchmarks, read_questions
from poc_lora.data.prompts import TEMPLATES, render_prompt
from poc_lora.errors import AdapterError, DataError, Interrupted, ModelError, PocLoraError, RequestError, first_line
from poc_lora.evaluation.protocols.label import ANSWER_PREFIX
from poc_lora.evaluation.results import adapter_key
from poc_lora.files import write_atomic
from poc_lora.lora.bank import AdapterBank
from poc_lora.progress import progress_bar

TASKS_FOLDER = Path(__file__).with_name("tasks")  # for lm_eval --include_path
BATCH_SIZE = 16  # lm-eval computes logits for every token of a batch

# Folder name -> lm-eval's own task, whose data come from the Hub.
HUB_TASKS = {
    "social_i_qa": "social_iqa",
    "piqa": "piqa",
    "winogrande": "winogrande",
    "openbookqa": "openbookqa",
    "ARC-Challenge": "arc_challenge",
    "ARC-Easy": "arc_easy",
    "boolq": "boolq",
    "hellaswag": "hellaswag",
}


@dataclass(frozen=True)
class TaskScores:
    """What lm-eval found for one thing on one task of n questions with up to k answers.

    metrics: by lm-eval's names, such as `acc,none` and `acc_stderr,none` ("N/A" for a single question).
    """

    metrics: dict[str, Any]
    log_probs: Tensor  # [n, k] of the answers, -inf where there is none
    answers: Tensor  # [n], the index of the right one
    shortened: Tensor  # [n], scored with its prompt cut on the left, as lm-eval does with what exceeds the context


def local_task(benchmark: Benchmark) -> str:
    """The name of our task of a benchmark, such as poc_lora_siqa."""
    return "poc_lora_" + benchmark.short.lower().replace("-", "_")


def load_tasks(benchmarks: Sequence[Benchmark], *, data: Path | None, prompt: str = "clean") -> dict[str, Any]:
    """lm-eval's task objects: folder name to task.

    data: the folder of BENCHMARK/test.json files for our tasks, asked with the template `prompt`; None takes lm-eval's
    own tasks, with its own prompts, whose data come from the Hub. Raises RequestError where lm-eval is missing, and
    DataError.
    """
    require_lm_eval()
    from lm_eval.tasks import TaskManager

    with _contained():
        if data is None:
            manager = TaskManager()
            return {b.folder: _load_hub_task(manager, HUB_TASKS[b.folder]) for b in benchmarks}
        metadata = {"data": str(data), "prompt": prompt}
        manager = TaskManager(include_path=TASKS_FOLDER, include_defaults=False, metadata=metadata)
        return {b.folder: manager.load([local_task(b)])["tasks"][local_task(b)] for b in benchmarks}


def require_lm_eval() -> None:
    """Raises RequestError where the harness protocol cannot be used because lm-eval is missing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise RequestError(
            "the harness protocol needs lm-eval", where="--protocol", fix="pip install 'poc-lora[harness]'"
        )


def _load_hub_task(manager: Any, name: str) -> Any:
    try:
        task = manager.load([name])["tasks"][name]
    except Exception as problem:  # the libraries raise many kinds, nearly all of which mean that the Hub is far
        raise DataError(
            f"lm-eval cannot load its task '{name}': {first_line(problem)}",
            where="its data, on the Hugging Face Hub",
            fix="check the network (once loaded, they are cached), or score local files with --data DIR",
        ) from problem
    if task.get_config("num_fewshot") is None:
        task.set_config("num_fewshot", 0)
    return task


def local_dataset(*, benchmark: str, data: str | None = None, prompt: str = "clean", **_: Any) -> dict[str, Any]:
    """The questions of `<data>/<benchmark>/test.json`, as our tasks' YAML asks for them.

    `data` and `prompt` are the metadata that lm-eval was given; it adds keys of its own. Raises RequestError and
    DataError.
    """
    import datasets

    if data is None:
        raise RequestError(
            "the task was not told where its questions are",
            where=local_task(find_benchmarks([benchmark])[0]),
            fix="""add --metadata '{"data": "DIR"}', the folder of BENCHMARK/test.json files""",
        )
    if prompt not in TEMPLATES:
        raise RequestError(f"no prompt template is called {prompt!r}", fix=f"known: {', '.join(TEMPLATES)}")
    rows = [
        {
            "context": render_prompt(q.instruction, q.input, prompt) + ANSWER_PREFIX,
            "labels": list(q.labels),
            "answer": q.answer,
        }
        for q in read_questions(Path(data).expanduser(), find_benchmarks([benchmark])[0])
    ]
    return {"test": datasets.Dataset.from_list(rows)}


def score_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, Any],
    *,
    adapters: Mapping[str, Adapter],
    merged: Adapter | None = None,
    limit: int | None = None,
    batch_size: int = BATCH_SIZE,
    out: Path | None = None,
    stop: threading.Event | None = None,
) -> dict[str, dict[str, TaskScores]]:
    """Score the base, every adapter and the merge, one after another over one base: thing to folder to scores.

    model: the base, without a bank. tasks: of `load_tasks`. adapters: name to adapter. merged: their merge; without
    one, the exact average of several. limit: the first so many questions of each task. batch_size: rows a batch. out:
    `OUT/harness/THING` is written as soon as it is scored, and results of before are removed. stop: may be set while
    this runs. Every process that calls it does all the work. Raises AdapterError, or ModelError for the base, where
    scores are not numbers, and Interrupted.
    """
    found: dict[str, dict[str, TaskScores]] = {}
    things = 1 + len(adapters) + (merged is not None or len(adapters) > 1)
    with progress_bar(things * _requests(tasks, limit), "evaluating") as progress:

        def score(thing: str) -> None:
            def advance(requests: int) -> None:
                if stop is not None and stop.is_set():
                    raise Interrupted(f"stopped while lm-eval scored {thing}", fix="the same command starts again")
                progress.advance(requests, thing)

            scores, written = score_tasks(
                model,
                tokenizer,
                tasks,
                limit=limit,
                batch_size=batch_size,
                advance=advance,
            )
            _check_finite(thing, scores)
            if out is not None:
                (out / RESULTS).unlink(missing_ok=True)
                _write(out / "harness" / thing, written)
            found[thing] = scores

        with _bank(model, list(adapters.values())) as bank:
            with bank.disabled():
                score("base")
            for slot, name in enumerate(adapters):
                with bank.only(slot):
                    score(adapter_key(name))
            if merged is None and len(adapters) > 1:
                with bank.merged():
                    score("merged")
        if merged is not None:
            # A bank of its own: beside them its rank, the sum of theirs, would pad every adapter.
            with _bank(model, [merged]) as bank, bank.only(0):
                score("merged")
    return found


def score_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, Any],
    *,
    limit: int | None = None,
    batch_size: int = BATCH_SIZE,
    advance: Callable[[int], object] = lambda requests: None,
) -> tuple[dict[str, TaskScores], dict[str, Any]]:
    """Score the model as it is now on tasks of `load_tasks`: folder to scores, and lm-eval's own results.

    lm-eval's cache of answers is not used: it cannot tell adapters apart. No seed is set. advance: called with 1 for
    every answer scored.
    """
    from lm_eval.evaluator import evaluate

    from poc_lora.evaluation.protocols.harness_model import LoadedModel

    names = {folder: task.config.task for folder, task in tasks.items()}
    with _contained():
        seen = LoadedModel(model, tokenizer, batch_size=batch_size, advance=advance)
        results = evaluate(
            lm=seen,
            task_dict={"tasks": {names[folder]: task for folder, task in tasks.items()}},
            limit=limit,
            log_samples=True,
        )
    return {
        folder: _task_scores(task, names[folder], results, seen.shortened) for folder, task in tasks.items()
    }, results


def _task_scores(task: Any, name: str, results: dict[str, Any], shortened: set[tuple[str, int]]) -> TaskScores:
    samples = results["samples"][name]
    answers = []
    for sample in samples:
        # Where every answer makes a context of its own, lm-eval has what follows as the target.
        right = task.doc_to_text(sample["doc"]) if task.multiple_input else sample["target"]
        answers.append(right if isinstance(right, int) else task.doc_to_choice(sample["doc"]).index(right))
    rows = [torch.tensor([log_prob for log_prob, _ in sample["filtered_resps"]]) for sample in samples]
    return TaskScores(
        metrics={metric: value for metric, value in results["results"][name].items() if "," in metric},
        log_probs=torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-torch.inf),
        answers=torch.tensor(answers),
        shortened=torch.tensor([(name, sample["doc_id"]) in shortened for sample in samples]),
    )


def _requests(tasks: Mapping[str, Any], limit: int | None) -> int:
    return sum(len(task.doc_to_choice(doc)) for task in tasks.values() for doc in islice(task.eval_docs, limit))


def _check_finite(thing: str, scores: Mapping[str, TaskScores]) -> None:
    for benchmark, found in scores.items():
        if found.log_probs.isnan().any():
            kind: type[PocLoraError] = ModelError if thing == "base" else AdapterError
            raise kind(
                "the scores are not numbers",
                where=f"{thing} on {benchmark}",
                fix="try float32; an adapter that has diverged must be left out",
            )


def _write(folder: Path, results: dict[str, Any]) -> None:
    """lm-eval's results.json and a samples file per task, in its formats; names are without its date."""
    from lm_eval.utils import handle_non_serializable, sanitize_list

    def dump(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, default=handle_non_serializable, ensure_ascii=False, indent=indent) + "\n"

    (folder / "results.json").unlink(missing_ok=True)  # where it stands, the rest is of the same evaluation
    for task, samples in results["samples"].items():
        lines = [
            sample
            | {
                "arguments": {
                    f"gen_args_{i}": {f"arg_{j}": part for j, part in enumerate(argument)}
                    for i, argument in enumerate(sample["arguments"])
                },
                "resps": sanitize_list(sample["resps"]),
                "filtered_resps": sanitize_list(sample["filtered_resps"]),
                "target": str(sample["target"]),
            }
            for sample in samples
        ]
        write_atomic(folder / f"samples_{task}.jsonl", "".join(map(dump, lines)))
    write_atomic(
        folder / "results.json", dump({key: value for key, value in results.items() if key != "samples"}, indent=2)
    )


@contextlib.contextmanager
def _bank(model: PreTrainedModel, adapters: list[Adapter]) -> Iterator[AdapterBank]:
    bank = AdapterBank.from_adapters(model, adapters)
    try:
        yield bank
    finally:
        bank.remove()


@contextlib.contextmanager
def _contained() -> Iterator[None]:
    """Keep lm-eval's notices and bars, one a task and model, out of the way of our own, and its draws to itself.

    It draws from Python's global stream whenever it looks up a task's name.
    """
    from lm_eval.api import task

    logger = logging.getLogger("lm_eval")
    level, bar, drawn = logger.level, task.tqdm, random.getstate()
    logger.setLevel(logging.ERROR)
    task.tqdm = lambda docs, **_: docs
    try:
        yield
    finally:
        logger.setLevel(level)
        task.tqdm = bar
        random.setstate(drawn)
