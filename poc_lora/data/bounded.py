"""Runs a function on rows in a process of its own, bounded in time and memory.

A chat template is a program of whoever made the tokenizer. It cannot reach outside of its sandbox, but it can loop, and
double a text until the memory is full.
"""

import contextlib
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import Connection
from typing import Any, NoReturn, TypeVar

import psutil

from poc_lora.errors import DataError, ModelError, PocLoraError, first_line

SECONDS_PER_ROW = 30.0
SECONDS = 60.0  # for all rows, and
SECONDS_MORE_PER_ROW = 0.05
MEMORY = 2 * 2**30

T = TypeVar("T")
R = TypeVar("R")


def map_bounded(function: Callable[[T], R], rows: Sequence[T]) -> Generator[R | DataError, None, None]:
    """Yield `function(row)` for each row, or the DataError that it raises. Results must be picklable.

    Raises:
        ModelError: As `function` does; or it took more time or memory than the limits of this module, or its process
            crashed.
    """
    if not rows:
        return
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = os.fork()  # with all that is loaded already; it runs only `function`, and ends by os._exit
    if not child:
        _work(function, rows, sender)
    sender.close()
    deadline = time.monotonic() + SECONDS + SECONDS_MORE_PER_ROW * len(rows)
    try:
        for number in range(1, len(rows) + 1):
            if not receiver.poll(min(SECONDS_PER_ROW, max(0.0, deadline - time.monotonic()))):
                raise _not_bounded(f"took too long (row {number})")
            try:
                kind, content = receiver.recv()
            except EOFError as problem:
                raise _not_bounded(f"took too much memory, or crashed (row {number})") from problem
            if kind is None:
                yield content
                continue
            error = kind(content["what"], where=content["where"], fix=content["fix"])
            if not isinstance(error, DataError):
                raise error
            yield error
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        receiver.close()


def _work(function: Callable[[T], R], rows: Sequence[T], sender: Connection) -> NoReturn:
    """Send the kind of error, or None, and the result of each row; never returns."""
    try:
        seconds = round(SECONDS + SECONDS_MORE_PER_ROW * len(rows))
        limits = {
            resource.RLIMIT_AS: psutil.Process().memory_info().vms + MEMORY,
            resource.RLIMIT_CPU: seconds,  # should the parent be killed
            resource.RLIMIT_CORE: 0,
        }
        for name, limit in limits.items():
            with contextlib.suppress(OSError, ValueError):  # a lower one is set already
                resource.setrlimit(name, (limit, limit))
        for row in rows:
            sender.send(_outcome(function, row))
    finally:
        os._exit(0)


def _outcome(function: Callable[[T], R], row: T) -> tuple[type[PocLoraError] | None, Any]:
    try:
        return None, function(row)
    except PocLoraError as problem:
        return type(problem), {"what": problem.what, "where": problem.where, "fix": problem.fix}
    except Exception as problem:
        what = f"the tokenizer's chat template fails on the row: {first_line(problem)}"
        return DataError, {"what": what, "where": getattr(row, "where", None), "fix": None}


def _not_bounded(what: str) -> ModelError:
    return ModelError(
        f"the tokenizer's chat template {what}",
        where="model.name",
        fix="set data.chat_template to another template, or give rows that are no chats",
    )
