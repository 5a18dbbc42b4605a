"""What the verbs print, errors included, and how they parse lists of numbers."""

import contextlib
import json
import signal
import sys
from collections.abc import Callable, Iterator
from traceback import format_exception
from types import FrameType
from typing import Annotated, Any, TypeVar

import typer

from poc_lora.errors import Interrupted, PocLoraError, RequestError, WriteError, system_problem, visible
from poc_lora.files import system_errors_as

N = TypeVar("N", int, float)
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else there.")]

# torch's CPU allocator has no exception of its own; its messages on Linux and macOS, and on Windows.
CPU_OUT_OF_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")


def as_error(problem: Exception) -> PocLoraError | None:
    """Returns the error to show a user for `problem`, None if that is a bug or a device fault."""
    if isinstance(problem, PocLoraError):
        return problem
    if _is_out_of_memory(problem):
        error = PocLoraError(
            f"out of memory: {problem}" if str(problem) else "out of memory",
            fix="in training, lower train.tokens_per_microbatch or adapters.per_device",
        )
    elif isinstance(problem, OSError):  # a full disk, a folder that went away
        what, fix = system_problem(problem)
        error = PocLoraError(what, where=problem.filename, fix=fix)
    else:
        return None
    error.__cause__ = problem
    return error


def _is_out_of_memory(problem: Exception) -> bool:
    torch = sys.modules.get("torch")  # not imported here: whatever ran out of torch's memory has done so
    return (
        isinstance(problem, MemoryError)
        or (torch is not None and isinstance(problem, torch.OutOfMemoryError))
        or (isinstance(problem, RuntimeError) and any(words in str(problem) for words in CPU_OUT_OF_MEMORY))
    )


@contextlib.contextmanager
def interruptible(outcome: str, *, fix: str = "the same command starts again") -> Iterator[None]:
    """Within the block Ctrl-C and SIGTERM raise KeyboardInterrupt, and then the block raises Interrupted.

    That holds for whatever error comes of it too: torch turns a KeyboardInterrupt that reaches some of its functions
    into a ValueError, which would read as a damaged file.

    Args:
        outcome: What such an end leaves, for the message.
        fix: What the same command does then.
    """
    received: list[str] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number).name)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except BaseException as problem:
        if not received:
            raise
        raise Interrupted(f"stopped by {received[0]}; {outcome}", fix=fix) from problem
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def show_error(error: PocLoraError, *, traceback: bool = False) -> None:
    """Print an error to stderr, with `traceback` after its traceback and those of its causes."""
    if traceback:
        for line in "".join(format_exception(error)).splitlines():
            typer.echo(visible(line), err=True)
    if not error.reported_elsewhere:
        typer.echo(f"poc-lora: {error}", err=True)


def show(*things: Any) -> None:
    """Print lines of text and rich tables. Of text, characters that cannot be seen are escaped, line breaks too.

    It may hold names of files and of adapters, which can be any text; tables escape theirs where they are made.
    """
    with system_errors_as(WriteError, "cannot be written", "standard output"):
        for thing in things:
            if isinstance(thing, str):
                typer.echo(visible(thing))
            else:
                from rich.console import Console

                Console().print(thing, highlight=False)


@contextlib.contextmanager
def stdout_kept_for_json(asked: bool) -> Iterator[None]:
    """Within the block what libraries print goes to stderr, if `asked`."""
    with contextlib.redirect_stdout(sys.stderr) if asked else contextlib.nullcontext():
        yield


def show_json(thing: Any) -> None:
    """Print an artefact, or dataclasses and plain values, as one JSON object."""
    from poc_lora.artifacts.schema import plain

    text = json.dumps(plain(thing), indent=2, allow_nan=False)
    with system_errors_as(WriteError, "cannot be written", "standard output"):
        typer.echo(text)


def numbers(text: str, kind: Callable[[str], N], option: str, example: str) -> list[N]:
    """Parse the comma-separated numbers of an option. Raises RequestError."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as problem:
        raise RequestError(
            f"'{text}' is not a list of numbers", where=option, fix=f"for example {example}"
        ) from problem


def print_next(result: str, command: str) -> None:
    """Print the last lines of every verb: where its result is, and the command to run next."""
    show("", result, f"next: {command}")
