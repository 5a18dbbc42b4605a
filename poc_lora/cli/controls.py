"""The verb `controls`."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from poc_lora.cli.terminal import interruptible, print_next, show
from poc_lora.cli.training import Config, Overrides
from poc_lora.errors import RequestError


def controls(
    config: Config,
    out: Annotated[Path, typer.Option(help="Folder for the runs, DIR/NAME-SEED, and the table.")],
    overrides: Overrides = None,
    runs: Annotated[int, typer.Option(help="How often each is trained; intervals are over these.")] = 3,
    data: Annotated[Path | None, typer.Option(help="Folder of NAME/test.json files, as for eval.")] = None,
    rows: Annotated[
        list[str] | None, typer.Option(help="A file of rows that are not trained on, instead of --data. Repeatable.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="--data: only the first N questions of each benchmark.")] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="Train this rival alone: longer, larger_batch, larger_rank, answers_only or lambda_0. Repeatable."
        ),
    ] = None,
) -> None:
    """Train what else the same cost could have bought, and compare the merge with it, with intervals over runs.

    From one YAML file: the pack as it is; one adapter for M times the steps, with batches M times as large, or of M
    times the rank; the pack with a loss on answers alone; the pack without noise. The same command resumes.

    Example: poc-lora controls mine.yaml --out runs/controls --data mytasks --only longer --only larger_batch
    """
    if rows and (data is not None or limit is not None):
        other = "--data" if data is not None else "--limit"
        raise RequestError(f"{other} is for benchmarks", where="--rows", fix="leave one of them out")
    from poc_lora.config import load_config

    loaded = load_config(config, overrides or [])

    from poc_lora.artifacts.run_folder import CONTROLS_TABLE
    from poc_lora.controls import run_controls
    from poc_lora.reporting.controls import controls_notes, controls_tables
    from poc_lora.reporting.tables import Table, terminal_table

    def report(*things: Any) -> None:
        show(*(terminal_table(thing) if isinstance(thing, Table) else thing for thing in things))

    with interruptible("what was trained and answered is kept", fix="the same command resumes"):
        found = run_controls(loaded, out, runs=runs, data=data, rows=rows or [], limit=limit, only=only, show=report)
    report(*controls_tables(found), *controls_notes(found))
    command = f"poc-lora merge {shlex.quote(found.pack.runs[0])} --out {shlex.quote(found.pack.runs[0] + '/merged')}"
    print_next(f"the comparison: {out / CONTROLS_TABLE}", command)
