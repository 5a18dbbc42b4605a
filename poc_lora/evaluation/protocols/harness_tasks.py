"""The tasks of the `harness` protocol: lm-eval's own, or local ones on the questions of BENCHMARK/test.json files.

The local tasks are in the folder `tasks`. They ask what the `label` protocol asks, with the same prompt, and so choose
the same labels; both protocols resolve ties to the first label. Choices can differ where scores differ by rounding
alone: lm-eval sums the tokens that all labels share too, so that a difference below float32's resolution of that larger
sum is a tie there and not in `label`.
"""

import contextlib
import importlib.util
import io
import logging
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from poc_lora.data.commonsense import Benchmark, find_benchmarks
from poc_lora.data.prompts import TEMPLATES, render_prompt
from poc_lora.data.questions import read_questions
from poc_lora.errors import DataError, RequestError, first_line
from poc_lora.evaluation.protocols.label import ANSWER_PREFIX

SEED = 1234  # lm-eval's, of NumPy, torch and the examples before a question
TASKS_FOLDER = Path(__file__).with_name("tasks")  # for lm_eval --include_path


def local_task(benchmark: Benchmark) -> str:
    """The name of the local task of a benchmark, such as poc_lora_siqa."""
    return "poc_lora_" + benchmark.short.lower().replace("-", "_")


def load_tasks(benchmarks: Sequence[Benchmark], *, data: Path | None, prompt: str = "clean") -> dict[str, Any]:
    """Load an lm-eval task for each benchmark, by its folder's name.

    Args:
        data: The folder of BENCHMARK/test.json files, for the local tasks. None takes lm-eval's own tasks, with their
            own prompts and with data from the Hub.
        prompt: The prompt template of the local tasks.

    Raises:
        RequestError: lm-eval is not installed.
        DataError: The questions cannot be read or loaded.
    """
    require_lm_eval("--protocol harness")
    from lm_eval.tasks import TaskManager

    for benchmark in benchmarks:
        if not benchmark.lm_eval:
            fix = "take --protocol label, which gives lm-eval's accuracies, or name others with --benchmarks"
            raise RequestError("the protocol harness knows the eight benchmarks", where=benchmark.folder, fix=fix)
    with quiet_lm_eval():
        if data is None:
            manager = TaskManager()
            return {b.folder: _load_hub_task(manager, b.lm_eval) for b in benchmarks}
        metadata = {"data": str(data), "prompt": prompt}
        manager = TaskManager(include_path=TASKS_FOLDER, include_defaults=False, metadata=metadata)
        return {b.folder: manager.load([local_task(b)])["tasks"][local_task(b)] for b in benchmarks}


def require_lm_eval(where: str) -> None:
    """Raises RequestError if lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise RequestError("lm-eval is not installed", where=where, fix="pip install 'poc-lora[harness]'")


def _load_hub_task(manager: Any, name: str) -> Any:
    try:
        task = manager.load([name])["tasks"][name]
    except Exception as problem:  # the libraries raise many kinds, nearly all because the Hub cannot be reached
        raise DataError(
            f"lm-eval cannot load its task '{name}': {first_line(problem)}",
            where="its data, on the Hugging Face Hub",
            fix="check the network (once loaded, they are cached), or score local files with --data DIR",
        ) from problem
    if task.get_config("num_fewshot") is None:
        task.set_config("num_fewshot", 0)
    return task


def local_dataset(*, benchmark: str, data: str | None = None, prompt: str = "clean", **_: Any) -> dict[str, Any]:
    """The questions of `<data>/<benchmark>/test.json`; called by lm-eval for the tasks' YAML files.

    Args:
        benchmark: From the YAML file.
        data, prompt: From lm-eval's metadata, which has more keys.

    Raises:
        RequestError: If `data` is missing or there is no such prompt template.
        DataError: If the questions cannot be read.
    """
    import datasets

    (found,) = find_benchmarks([benchmark])
    if data is None:
        raise RequestError(
            "the task does not know where its questions are",
            where=local_task(found),
            fix="""add --metadata '{"data": "DIR"}', the folder of BENCHMARK/test.json files""",
        )
    if prompt not in TEMPLATES:
        raise RequestError(f"no prompt template is called {prompt!r}", fix=f"known: {', '.join(TEMPLATES)}")
    questions = read_questions(Path(data).expanduser(), found)
    if questions[0].form != "labels":
        raise RequestError("the local tasks of lm-eval are of labels", where=benchmark, fix="take --protocol label")
    rows = [
        {
            "context": render_prompt(q.instruction, q.input, prompt) + ANSWER_PREFIX,
            "labels": list(q.labels),
            "answer": q.answer,
        }
        for q in questions
    ]
    return {"test": datasets.Dataset.from_list(rows)}


@contextlib.contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Within the block lm-eval shows no notices and starts no processes.

    The global random streams, which some of its tasks draw from, begin there as its command line begins them, and are
    afterwards as they were. The processes of its bootstraps would inherit this one's handlers of signals and not end.
    """
    from lm_eval.api import task

    logger, one_process = logging.getLogger("lm_eval"), "DISABLE_MULTIPROC"
    level, bar, others = logger.level, task.tqdm, os.environ.get(one_process)
    numbers, arrays = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    logger.setLevel(logging.ERROR)
    task.tqdm = lambda docs, **_: docs
    os.environ[one_process] = "1"
    try:
        with torch.random.fork_rng(devices), contextlib.redirect_stdout(io.StringIO()):
            random.seed(0)
            np.random.seed(SEED)  # noqa: NPY002
            torch.manual_seed(SEED)
            yield
    finally:
        logger.setLevel(level)
        task.tqdm = bar
        os.environ.pop(one_process)
        os.environ.update({} if others is None else {one_process: others})
        random.setstate(numbers)
        np.random.set_state(arrays)  # noqa: NPY002
