"""The verbs of `poc-lora mfnn`: each runs one experiment, and says where its figures lie."""

import importlib
import shlex
from pathlib import Path
from typing import Annotated

import typer

from poc_lora.cli.terminal import print_next

app = typer.Typer(
    help="The theory's experiments with mean-field networks: figures and CSV files.\n\n"
    "Example: poc-lora mfnn figure1 --quick",
    no_args_is_help=True,
)

Quick = Annotated[bool, typer.Option("--quick", help="Smaller sizes: under a minute on two cores.")]
Out = Annotated[Path | None, typer.Option(help="Folder for the results; default: runs/mfnn/NAME, with -quick.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Settings that replace those in configs/mfnn, such as seed=1.", metavar="KEY=VALUE"),
]
NAMES = ("figure1", "figure2", "table2", "sweep", "pruning", "poc")


@app.command()
def figure1(overrides: Overrides = None, quick: Quick = False, out: Out = None) -> None:
    """How far merged networks are from the limit in sup norm, against M and N, on two problems.

    Example: poc-lora mfnn figure1 --quick --out runs/figure1
    """
    _run("figure1", quick, out, overrides)


@app.command()
def figure2(
    overrides: Overrides = None,
    quick: Quick = False,
    long: Annotated[bool, typer.Option("--long", help="Train to the end, on a problem of ours.")] = False,
    out: Out = None,
) -> None:
    """Mean squared error per epoch at four temperatures, the average of 20 networks.

    Example: poc-lora mfnn figure2 --quick --out runs/figure2
    """
    _run("figure2", quick, out, overrides, file="figure2_long" if long else "figure2")


@app.command()
def table2(overrides: Overrides = None, quick: Quick = False, out: Out = None) -> None:
    """Test error of merged networks, temperature by number of neurons, beside the paper's.

    Example: poc-lora mfnn table2 --quick --out runs/table2
    """
    _run("table2", quick, out, overrides)


@app.command()
def sweep(overrides: Overrides = None, quick: Quick = False, out: Out = None) -> None:
    """Where a larger temperature is better after five epochs: learning rate by batch size by start.

    Example: poc-lora mfnn sweep --quick --out runs/sweep
    """
    _run("sweep", quick, out, overrides)


@app.command()
def pruning(overrides: Overrides = None, quick: Quick = False, out: Out = None) -> None:
    """Networks of 10,000 neurons pruned to s, beside networks trained with s.

    Example: poc-lora mfnn pruning --quick --out runs/pruning
    """
    _run("pruning", quick, out, overrides)


@app.command()
def poc(overrides: Overrides = None, quick: Quick = False, out: Out = None) -> None:
    """Propagation of chaos where it can be solved exactly, and with bounded neurons.

    Example: poc-lora mfnn poc --quick --out runs/poc
    """
    _run("poc", quick, out, overrides)


def _run(name: str, quick: bool, out: Path | None, overrides: list[str] | None, file: str | None = None) -> None:
    from poc_lora.mfnn.experiments.settings import load

    file = file or name
    settings = load(file, quick=quick, overrides=overrides or [])
    out = out or Path("runs/mfnn") / (f"{file}-quick" if quick else file)

    from poc_lora.mfnn.experiments.cells import Folder

    experiment = importlib.import_module(f"poc_lora.mfnn.experiments.{name}")
    experiment.run(Folder(out, file, settings), settings)
    table = out / f"{file}.md"
    if table.is_file():
        typer.echo(table.read_text())
    tables = ", ".join(path.name for path in sorted(out.glob(f"{file}*.csv")))
    following = NAMES[(NAMES.index(name) + 1) % len(NAMES)]
    command = f"poc-lora mfnn {name}" if quick else f"poc-lora mfnn {following}"
    print_next(f"the figure: {shlex.quote(str(out / f'{file}.png'))} (also .svg; numbers in {tables})", command)
