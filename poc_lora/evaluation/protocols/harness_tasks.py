"""The tasks of the `harness` protocol: lm-eval's own, or local ones on the questions of BENCHMARK/test.json files.

The local tasks are in the folder `tasks`. They ask what the `label` protocol asks, with the same prompt, and so choose
the same labels; both protocols resolve ties to the first label. Choices can differ where scores differ by rounding
alone: lm-eval sums the tokens that all labels share too, so that a difference below float32's resolution of that larger
sum is a tie there and not in `label`.
"""

import contextlib
import importlib.util
import logging
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from poc_lora.data.commonsense import Benchmark, find_benchmarks
from poc_lora.data.prompts import TEMPLATES, render_prompt
from poc_lora.data.questions import read_questions
from poc_lora.errors import DataError, RequestError, first_line
from poc_lora.evaluation.protocols.label import ANSWER_PREFIX

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
        RequestError: If lm-eval is not installed.
        DataError: If the questions cannot be read or loaded.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise RequestError(
            "the harness protocol needs lm-eval", where="--protocol", fix="pip install 'poc-lora[harness]'"
        )
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
    """Within the block lm-eval shows no notices or progress bars, and its draws leave Python's global stream unchanged.

    It draws from that stream whenever it looks up a task's name.
    """
    from lm_eval.api import task

    logger = logging.getLogger("lm_eval")
    level, bar, state = logger.level, task.tqdm, random.getstate()
    logger.setLevel(logging.ERROR)
    task.tqdm = lambda docs, **_: docs
    try:
        yield
    finally:
        logger.setLevel(level)
        task.tqdm = bar
        random.setstate(state)
