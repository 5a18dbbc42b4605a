"""The verb `poc-lora push`."""

from pathlib import Path
from typing import Annotated

import typer

from poc_lora.cli.terminal import tell_next


def push(
    adapter: Annotated[Path, typer.Argument(help="An adapter's folder, or a run: its merged adapter.")],
    repo_id: Annotated[str, typer.Argument(help="The repository, such as you/adapter; created where missing.")],
    all: Annotated[bool, typer.Option("--all", help="A run's single adapters too, in adapters/00 ...")] = False,
    public: Annotated[bool, typer.Option("--public", help="Create it public; default: private.")] = False,
    revision: Annotated[str | None, typer.Option(help="The branch, created where missing; default: main.")] = None,
    base: Annotated[
        str | None, typer.Option("--base-model", help="The base model's Hub id, where the adapter names a folder.")
    ] = None,
    license: Annotated[str | None, typer.Option(help="Such as apache-2.0; default: none is stated.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files, print the card, send nothing.")] = False,
) -> None:
    """Upload an adapter with a model card to the Hugging Face Hub, in one commit. Log in first: hf auth login.

    Example: poc-lora push runs/mine you/adapter --base-model org/base --dry-run
    """
    from poc_lora.hub import push as hub

    done = hub.push(
        adapter, repo_id, all=all, public=public, revision=revision, dry_run=dry_run, base_model=base, licence=license
    )
    for line in hub.summary(done):
        typer.echo(line)
    tell_next(*hub.next_step(done))
