"""The command line's entry point and its list of verbs.

Each verb is a thin shell over one function of the library, which is imported when the verb runs.
"""

import sys
from typing import Annotated

import typer

from poc_lora import __version__
from poc_lora.cli import controls, evaluation, hub, merging, mfnn, training
from poc_lora.cli.terminal import as_error, show, show_error
from poc_lora.envvars import flag

app = typer.Typer(
    name="poc-lora",
    help="Train several LoRA adapters of one base model and merge them: often more accurate, and as cheap once folded.",
    epilog="Set `POC_LORA_TRACEBACK=1` in the environment to see the traceback of an error.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def main() -> None:
    """Run the command line and exit; print expected errors without a traceback."""
    traceback = False
    try:
        traceback = flag("POC_LORA_TRACEBACK")
        app(prog_name="poc-lora")  # also under `python -m`: completion goes by the name
    except Exception as problem:
        error = as_error(problem)
        if error is None:
            raise
        show_error(error, traceback=traceback)
        sys.exit(error.exit_status)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"poc-lora {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


for _verb in (training.demo, training.init, training.check, training.train, merging.merge, merging.fold):
    app.command()(_verb)
app.command("eval")(evaluation.evaluate)
app.command()(evaluation.sample)
app.command()(evaluation.report)
app.command()(controls.controls)
app.command()(hub.push)
app.add_typer(mfnn.app, name="mfnn")


@app.command()
def env() -> None:
    """Print versions and hardware, for bug reports.

    Example: poc-lora env
    """
    from poc_lora.environment import environment

    for section in environment().values():
        for name, value in section.items():
            show(f"{name:<16}{value}")
