"""Kills a training run inside its every write, fsync and rename, one run for each, and lets each go on.

    python -m tests.training.crash CONFIG FOLDER

Each run is a fork of this process, which has imported everything and trained nothing; it ends by `os._exit`, as if by
kill -9: no cleanup runs. Prints the kill points as JSON: those after which the run did not end as the uninterrupted one
did have a "problem".
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import peft.tuners.lora  # noqa: F401  (training imports it late; each fork would do so again)
import torch

from poc_lora.adapters import adapter
from poc_lora.config import load_config
from poc_lora.training import checkpoint
from poc_lora.training.run import Run
from poc_lora.training.train import train

KILLED = 9


class Killer:
    """Ends the process at kill point number `at`, and says which that was."""

    def __init__(self, at: int, report: int):
        self.at, self.report, self.passed = at, report, 0

    def point(self, name: str, before: Callable[[], None] = lambda: None) -> None:
        if self.passed == self.at:
            self.at = -1  # what comes before the end has points of its own
            before()
            os.write(self.report, name.encode())
            os._exit(KILLED)
        self.passed += 1

    def arm(self) -> None:
        """Put kill points into everything that makes a run's files, which come in one order here.

        Commits write one file at a time, and training waits for them.
        """
        checkpoint.FILES_AT_ONCE = 1
        start = checkpoint.Commits.start

        def start_and_wait(commits, *arguments):
            start(commits, *arguments)
            commits.wait()

        checkpoint.Commits.start = start_and_wait
        for name in ("fsync", "rename", "replace"):
            self._wrap(os, name)
        self._wrap_save(checkpoint, "_write_state")
        self._wrap_save(adapter, "save_file")
        self._wrap_fdopen()
        log = Run.log

        def log_half(run, lines):
            def half():
                text = "".join(json.dumps(line) + "\n" for line in lines)
                with (run.folder / "metrics.jsonl").open("a") as out:
                    out.write(text[: len(text) // 2])

            self.point("metrics", half)
            log(run, lines)

        Run.log = log_half

    def _wrap(self, module, name):
        original = getattr(module, name)

        def wrapped(*arguments, **keywords):
            self.point(f"before {name}")
            result = original(*arguments, **keywords)
            self.point(f"after {name}")
            return result

        setattr(module, name, wrapped)

    def _wrap_save(self, module, name):
        original = getattr(module, name)

        def save_half(*arguments, **keywords):
            path = next(argument for argument in arguments if isinstance(argument, Path))

            def half():
                original(*arguments, **keywords)
                os.truncate(path, os.path.getsize(path) // 2)

            self.point(f"in {name}", half)
            return original(*arguments, **keywords)

        setattr(module, name, save_half)

    def _wrap_fdopen(self):
        original = os.fdopen

        def fdopen(*arguments, **keywords):
            out = original(*arguments, **keywords)
            write = out.write

            class Half:
                def __enter__(this):
                    return this

                def __exit__(this, *_):
                    out.close()

                def write(this, data):
                    self.point("in write", lambda: (write(data[: len(data) // 2]), out.flush()))
                    return write(data)

                def __getattr__(this, name):
                    return getattr(out, name)

            return Half()

        os.fdopen = fdopen


def in_child(work: Callable[[int], object]) -> tuple[int, str]:
    """Exit status and report of a fork that does the work."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            work(write)
        except BaseException:
            os.write(write, traceback.format_exc()[-3000:].encode())
            os._exit(1)
        os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        report = pipe.read().decode()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), report


def adapters(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.glob("adapters/*/*"))}


def main(config_file: str, folder: Path) -> None:
    torch.set_num_threads(1)
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)

    def run(name: str, *, resume: bool = False) -> None:
        train(load_config(Path(config_file), [f"output={folder / name}"]), resume=resume)

    def killed(name: str, at: int, report: int) -> None:
        Killer(at, report).arm()
        run(name)

    status, report = in_child(lambda _: run("reference"))
    assert status == 0, report
    expected, points = adapters(folder / "reference"), []
    while True:
        name = f"killed_{len(points)}"
        status, point = in_child(lambda report, name=name: killed(name, len(points), report))
        if status == 0:
            break
        begun = (folder / name / "config.yaml").exists()
        resumed, report = in_child(lambda _, name=name, begun=begun: run(name, resume=begun))
        same = resumed == 0 and adapters(folder / name) == expected
        litter = [str(p) for p in (folder / name).rglob(".*") if p.name != ".lock"]
        problem = "" if same and not litter else f"status {status}, then {resumed} {report} {litter}"
        points.append({"point": point, "problem": problem})
    print(json.dumps(points))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
