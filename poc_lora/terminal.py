"""What the verbs of the command line print, and the lists that they take."""

from typing import Any

import typer


def show(thing: Any) -> None:
    """Print a line of text or a rich table."""
    from rich.console import Console

    Console().print(thing, markup=False, highlight=False)


def show_results(results: Any) -> None:
    from poc_lora.reporting.tables import notes, terminal_table

    show(terminal_table(results))
    for note in notes(results):
        show(note)


def show_merge(report: dict[str, Any]) -> None:
    from poc_lora.reporting.summaries import merge_summary, rank_table

    for line in merge_summary(report):
        typer.echo(line)
    if "rank_sweep" in report:
        show("\n".join(rank_table(report)))


def show_training(done: Any) -> None:
    from poc_lora.reporting.summaries import training_summary

    for line in training_summary(done):
        typer.echo(line)


def numbers(text: str, kind: type, option: str, example: str) -> list[Any]:
    """The numbers of a comma-separated list. Raises RequestError."""
    from poc_lora.errors import RequestError

    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise RequestError(f"'{text}' is not a list of numbers", where=option, fix=f"for example {example}") from None


def tell_next(result: str, command: str) -> None:
    """How every verb ends: where the result lies, and what to run next."""
    typer.echo(f"\n{result}\nnext: {command}")
