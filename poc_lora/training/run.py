"""The run folder of a training run: created once, resumed with the same settings, never overwritten.

config.yaml  run.json  metrics.jsonl  checkpoints/  adapters/  merged/  eval/
"""

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from poc_lora.adapters.adapter import Adapter, write_adapter
from poc_lora.artifacts.metrics_line import MetricsLine, read_metrics
from poc_lora.artifacts.run_folder import RunFolder
from poc_lora.artifacts.run_info import NO_FILES, SUPERVISED_TOKENS, RunInfo
from poc_lora.config import RunConfig, changed_keys, dump_yaml, load_config
from poc_lora.data.chats import read_chat_template
from poc_lora.data.formats import Row
from poc_lora.data.rows import write_rows
from poc_lora.environment import environment
from poc_lora.errors import CheckpointError, RunError
from poc_lora.files import require_place, sync, system_errors_as, write_atomic
from poc_lora.training.checkpoint import Commit, newest_commit
from poc_lora.training.data import chat_template, file_digests
from poc_lora.training.placement import Progress

# Keys that may change on resume: trained adapters do not depend on them.
RESUMABLE = ("adapters.count", "adapters.per_device", "checkpoint.", "output", "track", "train.validate_every")


class Run:
    """A run folder and what training writes into it. Nothing is written before `begin`.

    Attributes:
        folder: The run folder.
        commit: The commit to resume, if any.
        problems: A line for each newer commit that is damaged.
        info: The content of run.json; None in a new run.
        beside_adapters: Further files of every adapter's folder, by name: the tokenizer, if its template is ours.
    """

    def __init__(self, folder: Path, commit: Commit | None, problems: list[str], info: RunInfo | None):
        self.folder = folder
        self.paths = RunFolder(folder)
        self.commit = commit
        self.problems = problems
        self.info = info
        self.beside_adapters: dict[str, bytes] = {}

    def begin(self, config: RunConfig, *, held_out: Sequence[Row], chat_template: str | None, **info: Any) -> None:
        """Write config.yaml, run.json and the held-out rows, and remove what a killed process left half written.

        Args:
            config: The run's configuration.
            held_out: The validation rows.
            chat_template: The text of `data.chat_template`, if it is set.
            **info: Fields of `RunInfo`, beside those of the environment.
        """
        paths = self.paths
        write_atomic(paths.config, dump_yaml(config))
        self.update_info(**environment(), **info)
        if held_out:
            write_rows(paths.held_out, held_out)
        if chat_template is not None:
            write_atomic(paths.chat_template, chat_template)
        for aside in (*paths.checkpoints.glob(".*"), *paths.adapters.glob(".*")):
            shutil.rmtree(aside, ignore_errors=True)
        written = (paths.config, paths.info, paths.metrics, paths.held_out, paths.chat_template)
        for aside in (a for p in written for a in self.folder.glob(f".{p.name}.*")):
            aside.unlink()
        self._drop_repeated_metrics({} if self.commit is None else self.commit.progress)

    def update_info(self, **changes: Any) -> None:
        """Change fields of run.json."""
        self.info = (self.info or RunInfo()).model_copy(update=changes)
        self.info.write(self.paths.info)

    def log(self, lines: list[dict[str, Any]]) -> None:
        """Append lines to metrics.jsonl. Raises CheckpointError if they cannot be written."""
        text = "".join(json.dumps(line) + "\n" for line in lines)
        try:
            with self.paths.metrics.open("a") as out:
                out.write(text)
        except OSError as problem:
            raise CheckpointError(
                f"{len(text):,} bytes could not be added: {problem.strerror}",
                where=self.paths.metrics,
                fix="the run folder was moved or removed while the run was in it: start again"
                if not self.folder.is_dir()
                else "make room or repair the folder; --resume continues from the last commit",
            ) from problem

    def sync_metrics(self) -> None:
        """Flush metrics.jsonl to the disk."""
        if self.paths.metrics.exists():
            sync(self.paths.metrics)

    def _drop_repeated_metrics(self, progress: Mapping[int, Progress]) -> None:
        """Remove metric lines of steps and validations that the resumed run will repeat."""
        if not self.paths.metrics.exists():
            return
        lines = read_metrics(self.paths.metrics, max_bytes=2**40)
        write_atomic(self.paths.metrics, "".join(text + "\n" for text, line in lines if _is_final(line, progress)))

    def write_adapter(self, number: int, adapter: Adapter) -> None:
        """Write a trained adapter in PEFT format, in place of one that a killed process had written."""
        folder = self.paths.adapter(number)
        if folder.exists():
            shutil.rmtree(folder)
        write_adapter(adapter, folder, extra_files=self.beside_adapters)


def _is_final(line: MetricsLine, progress: Mapping[int, Progress]) -> bool:
    """Whether a line is of a step or validation that a run at `progress` will not repeat."""
    nothing = Progress(0)
    if line.kept:
        return all(progress.get(adapter, nothing).status != "training" for adapter in line.members or ())
    if line.members is None:
        return isinstance(line.adapter, int) and line.step <= progress.get(line.adapter, nothing).step
    return all(line.step <= progress.get(adapter, nothing).validated for adapter in line.members)


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Create the folder and lock it against other training processes; both are removed if no run begins.

    The system releases the lock when the process ends, even if it is killed.

    Raises:
        RequestError: Another process holds the lock, or the folder cannot be created.
    """
    paths = RunFolder(folder)
    require_place(folder)
    with system_errors_as(RunError, "cannot be written", folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(paths.lock, blocking=False)
        try:
            lock.acquire()
        except Timeout as problem:
            raise RunError(
                "another process trains in this run folder",
                where=folder,
                fix="wait for it, or set output to another folder",
            ) from problem
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # not empty, or removed while the run was in it
            if not paths.is_run:  # no run came to be
                paths.lock.unlink(missing_ok=True)
                folder.rmdir()
        lock.release()


def find_run(config: RunConfig, *, resume: bool) -> Run:
    """Find the run that `config` starts or resumes; nothing is written yet.

    Args:
        config: The run's configuration.
        resume: Resume the run in `config.output`; if there is none, start it, so that one command does both.

    Returns:
        The run, with the commit to resume, if any.

    Raises:
        RunError: The folder is in use, or the settings of a resumed run differ in more than `RESUMABLE`.
        CheckpointError: The run has commits, but none is intact.
    """
    folder = Path(config.output)
    require_place(folder)
    paths = RunFolder(folder)
    if not resume or not paths.is_run:
        if folder.exists() and (not folder.is_dir() or any(not p.name.startswith(".") for p in folder.iterdir())):
            raise RunError(
                "the run folder is not empty" + (", and holds no run" if resume else ""),
                where=folder,
                fix=("" if resume else "resume it with --resume, or ") + "set output to another folder",
            )
        return Run(folder, None, [], None)
    before = load_config(paths.config)
    changed = changed_keys(before, config)
    fixed = ("train.validate_every",) if before.train.keep == "best" else ()  # the steps to choose among
    refused = {k: v for k, v in changed.items() if not k.startswith(RESUMABLE) or k in fixed}
    if config.adapters.count < before.adapters.count:
        refused["adapters.count"] = (before.adapters.count, config.adapters.count)
    if refused:
        raise RunError(
            "a resumed run must keep its settings, but these differ: "
            + "; ".join(f"{k} was {old!r}, is {new!r}" for k, (old, new) in refused.items()),
            where=folder,
            fix="undo the change, or start a new run in another folder",
        )
    commit, problems = newest_commit(paths.checkpoints)
    return Run(folder, commit, problems, RunInfo.read_if_there(paths.info))


def require_same_files(run: Run, config: RunConfig) -> None:
    """As `require_same_rows`, of the files alone, for a run that has ended and is not to be tokenised again."""
    if run.info is None:
        return
    files = [run.info.data_sha256, run.info.validation_sha256]
    known = [{key: digest for key, digest in own.items() if key in NO_FILES} for own in files]
    section = config.data
    require_same_rows(run, known[0] | file_digests(section.train), known[1] | file_digests(section.validation_files))
    saved = RunFolder(run.folder).chat_template
    if saved.is_file() and read_chat_template(saved) != chat_template(config):
        what = "the chat template has changed since the run began"
        raise RunError(what, where=f"data.chat_template of {run.folder}", fix="restore it, or start a new run")


def require_same_rows(run: Run, files: Mapping[str, str], validation_files: Mapping[str, str]) -> None:
    """Raise RunError, saying what has changed, if a run is resumed on other rows than it began with.

    Args:
        run: The run to resume.
        files: Checksums of the training files by path, and of the tokenised rows under the keys `NO_FILES`.
        validation_files: The same of `data.validation_files`.
    """
    if run.info is None:
        return
    _require_same(run, "training", run.info, run.info.data_sha256, files)
    _require_same(run, "validation", run.info, run.info.validation_sha256, validation_files)


def _require_same(run: Run, kind: str, info: RunInfo, before: Mapping[str, str], files: Mapping[str, str]) -> None:
    if SUPERVISED_TOKENS not in before:  # a run of before it was recorded
        files = {path: digest for path, digest in files.items() if path != SUPERVISED_TOKENS}
    if before == files:
        return
    changed = sorted(path for path in before.keys() | files.keys() if before.get(path) != files.get(path))
    changed_files = [path for path in changed if path not in NO_FILES]
    if changed_files:
        what = f"the {kind} files have changed since the run began: {', '.join(changed_files)}"
        fix = "restore them, or start a new run"
    else:
        then, now = info.versions, environment()["versions"]
        others = [
            f"{name} was {then.get(name)}, is {now.get(name)}"
            for name in ("transformers", "tokenizers", "datasets")
            if then.get(name) != now.get(name)
        ]
        what = (
            f"the {kind} files are unchanged, but their tokens, or which of them have a loss, are not those that the"
            " run began with: the tokenizer,"
            f" its chat template or a data set of the Hub has changed{'; ' + ', '.join(others) if others else ''}"
        )
        fix = "restore the tokenizer and the versions recorded in run.json, or start a new run"
    raise RunError(what, where=run.folder, fix=fix)
