"""Finds, checks and loads tasks of lm-eval by their names."""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poc_lora.errors import DataError, RequestError, first_line
from poc_lora.evaluation.protocols.harness_tasks import quiet_lm_eval, require_lm_eval

WHERE = "--harness-tasks"


@dataclass(frozen=True)
class NamedTasks:
    """lm-eval's own objects, as its TaskManager gives them.

    Attributes:
        tasks: By name.
        groups: By name; their members are tasks and other groups.
    """

    tasks: dict[str, Any]
    groups: dict[str, Any]

    def listed(self) -> dict[str, bool]:
        """All groups and tasks, each group before its members -> whether none that has metrics of its own holds it."""
        found: dict[str, bool] = {}

        def add(name: str, listed: bool) -> None:
            found.setdefault(name, listed)
            if name in self.groups:
                for member in self.groups[name].child_names:
                    add(member, listed and not self.groups[name].has_aggregation)

        members = {name for group in self.groups.values() for name in group.child_names}
        for name in (*self.groups, *self.tasks):
            if name not in members:
                add(name, True)
        return found


def load_named_tasks(
    names: Sequence[str], *, num_fewshot: int | None = None, include_path: Path | None = None
) -> NamedTasks:
    """Load tasks, groups and tags of lm-eval, with their data.

    Args:
        names: Glob patterns too, such as `mmlu_*`.
        num_fewshot: Examples before each question, for all tasks that do not fix 0; None takes each task's own number.
        include_path: A folder of YAML files of further tasks. Python functions that they name are run.

    Raises:
        RequestError: A name is not known, or a task runs code of others, or needs pictures or sound.
        DataError: A task's data cannot be loaded.
    """
    require_lm_eval(WHERE)
    from lm_eval.tasks import TaskManager

    if num_fewshot is not None and num_fewshot < 0:
        raise RequestError(f"the number of examples is {num_fewshot}", where="--num-fewshot", fix="give 0 or more")
    if include_path is not None and not include_path.is_dir():
        raise RequestError("no such folder", where=f"--include-path {include_path}", fix="give a folder of YAML files")
    with quiet_lm_eval():
        manager = TaskManager(include_path=None if include_path is None else str(include_path))
        found = list(dict.fromkeys(task for name in names for task in _match(manager, name)))
        if not found:
            raise RequestError("no task was named", where=WHERE, fix="for example: --harness-tasks gsm8k,mmlu")
        for name in found:
            for config in _configs(manager.task_index, name, set()):
                _refuse(config)
        try:
            loaded = manager.load(found)
        except Exception as problem:  # the libraries raise many kinds, most because the Hub cannot be reached
            raise DataError(
                f"lm-eval cannot load {', '.join(found[:5])}: {first_line(problem)}",
                where=WHERE,
                fix="check the network (once loaded, data is cached), or give tasks on local files with --include-path",
            ) from problem
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if own is None or (num_fewshot is not None and own != 0):  # as lm-eval does
            task.set_config("num_fewshot", num_fewshot or 0)
    return NamedTasks(dict(loaded["tasks"]), dict(loaded.get("groups", {})))


def _match(manager: Any, name: str) -> list[str]:
    found: list[str] = manager.match_tasks([name])
    if not found:
        near = difflib.get_close_matches(name, manager.all_tasks, n=3)
        guess = f"did you mean {' or '.join(near)}? " if near else ""
        fix = f"{guess}`lm-eval ls tasks` lists all, and --include-path DIR adds your own"
        raise RequestError(f"lm-eval has no task, group or tag {name!r}", where=WHERE, fix=fix)
    return found


def _configs(index: Any, item: str | dict[str, Any], seen: set[str]) -> Iterator[dict[str, Any]]:
    """The configurations of a task, or of all tasks below a group or tag, before anything of them is loaded."""
    config = dict(item) if isinstance(item, dict) else {}
    name = str(config.get("group") or config.get("task")) if config else str(item)
    entry = index.get(name)
    if entry is not None:
        if name in seen:
            return
        seen.add(name)
        config = {**(entry.cfg or {}), "task": name} | config
        for tagged in sorted(entry.tags) if entry.cfg is None else ():
            yield from _configs(index, tagged, seen)
        members = (entry.cfg or {}).get("task")
    else:
        members = config.get("task")
    if isinstance(members, list):
        for member in members:
            yield from _configs(index, member, seen)
    else:
        yield config


def _refuse(config: dict[str, Any]) -> None:
    """Raises RequestError for a task that this evaluation cannot or must not run."""
    name = config.get("task")
    if (config.get("dataset_kwargs") or {}).get("trust_remote_code"):
        what = f"the task {name} asks to run code from the Hub (trust_remote_code), which is not done here"
        raise RequestError(what, where=WHERE, fix="leave it out, or copy its YAML file without it to --include-path")
    if config.get("unsafe_code"):
        what = f"the task {name} runs the code that the model writes, which is not done here"
        raise RequestError(what, where=WHERE, fix="leave it out, or run it with lm-eval in a sandbox")
    if config.get("doc_to_image") or config.get("doc_to_audio"):
        raise RequestError(f"the task {name} needs pictures or sound", where=WHERE, fix="leave it out")
