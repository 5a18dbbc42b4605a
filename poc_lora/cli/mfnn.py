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
NAMES = ("figure1", "figure2", "table2", "poc")


@app.command()
def figure1(overrides: Overrides = None, quick: Quick = False, out: Out = None) -> None:
    """How far merged networks are from the limit in sup norm, against M and N, on two problems.

    Example: poc-lora mfnn figure1 --quick --out runs/figure1
    """
    _run("figure1", quick, out, overrides)


@app.command()
def figure2(overrides: Overrides = None, quick: Quick = False, out: Out = None) -> None:
    """Mean squared error per epoch at four temperatures, the average of 20 networks.

    Example: poc-lora mfnn figure2 --quick --out runs/figure2
    """
    _run("figure2", quick, out, overrides)


@app.command()
def table2(overrides: Overrides = None, quick: Quick = False, out: Out = None) -> None:
    """Test error of merged networks, temperature by number of neurons.

    Example: poc-lora mfnn table2 --quick --out runs/table2
    """
    _run("table2", quick, out, overrides)


@app.command()
def poc(overrides: Overrides = None, quick: Quick = False, out: Out = None) -> None:
    """Propagation of chaos where it can be solved exactly, and with bounded neurons.

    Example: poc-lora mfnn poc --quick --out runs/poc
    """
    _run("poc", quick, out, overrides)


def _run(name: str, quick: bool, out: Path | None, overrides: list[str] | None) -> None:
    from poc_lora.mfnn.experiments.settings import load

    settings = load(name, quick=quick, overrides=overrides or [])
    out = out or Path("runs/mfnn") / (f"{name}-quick" if quick else name)

    from poc_lora.mfnn.experiments.cells import Folder

    experiment = importlib.import_module(f"poc_lora.mfnn.experiments.{name}")
    folder = Folder(out, name, settings)
    experiment.run(folder, settings)
    tables = ", ".join(path.name for path in sorted(out.glob(f"{name}*.csv")))
    following = NAMES[(NAMES.index(name) + 1) % len(NAMES)]
    command = f"poc-lora mfnn {name}" if quick else f"poc-lora mfnn {following}"
    print_next(f"the figure: {shlex.quote(str(out / f'{name}.png'))} (also .svg; numbers in {tables})", command)
