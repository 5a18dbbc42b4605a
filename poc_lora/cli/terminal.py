"""What the verbs of the command line print, errors included, and the lists that they take."""

import sys
from traceback import format_exception
from typing import Any

import typer

from poc_lora.errors import PocLoraError, RequestError, printable

# What torch's allocator for the CPU says, on Linux and macOS, and on Windows; it has no exception of its own.
CPU_OUT_OF_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")


def as_error(problem: Exception) -> PocLoraError | None:
    """The error that tells a user of `problem`; None where that is a bug or a fault of the device."""
    if isinstance(problem, PocLoraError):
        return problem
    if _is_out_of_memory(problem):
        error = PocLoraError(
            f"out of memory: {problem}" if str(problem) else "out of memory",
            fix="in training, lower train.tokens_per_microbatch or adapters.count",
        )
    elif isinstance(problem, OSError):  # a full disk, a folder that went away
        error = PocLoraError(str(problem))
    else:
        return None
    error.__cause__ = problem
    return error


def _is_out_of_memory(problem: Exception) -> bool:
    torch = sys.modules.get("torch")  # what failed has imported it, or does without
    return (
        isinstance(problem, MemoryError)
        or (torch is not None and isinstance(problem, torch.OutOfMemoryError))
        or (isinstance(problem, RuntimeError) and any(words in str(problem) for words in CPU_OUT_OF_MEMORY))
    )


def show_error(error: PocLoraError, *, traceback: bool = False) -> None:
    """Print an error, after its traceback and those of its causes where asked for."""
    if traceback:
        typer.echo(printable("".join(format_exception(error))), err=True, nl=False)
    if not error.told:
        typer.echo(f"poc-lora: {error}", err=True)


def show(thing: Any) -> None:
    """Print a line of text or a rich table."""
    from rich.console import Console

    Console().print(thing, markup=False, highlight=False)


def show_results(results: Any) -> None:
    from poc_lora.reporting.tables import notes, terminal_table

    show(terminal_table(results))
    for note in notes(results):
        show(note)


def show_merge(report: Any) -> None:
    from poc_lora.reporting.summaries import merge_summary, rank_table

    for line in merge_summary(report):
        typer.echo(line)
    if report.rank_sweep:
        show("\n".join(rank_table(report)))


def show_training(done: Any) -> None:
    from poc_lora.reporting.summaries import training_summary

    for line in training_summary(done):
        typer.echo(line)


def numbers(text: str, kind: type, option: str, example: str) -> list[Any]:
    """The numbers of a comma-separated list. Raises RequestError."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as problem:
        raise RequestError(
            f"'{text}' is not a list of numbers", where=option, fix=f"for example {example}"
        ) from problem


def tell_next(result: str, command: str) -> None:
    """How every verb ends: where the result lies, and what to run next."""
    typer.echo(f"\n{result}\nnext: {command}")
