"""The verb `push`."""

from pathlib import Path
from typing import Annotated

import typer

from poc_lora.cli.terminal import print_next, show


def push(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder, or a run, whose merged adapter is uploaded.")],
    repo_id: Annotated[str, typer.Argument(help="The repository, such as you/adapter; created if missing.")],
    all: Annotated[bool, typer.Option("--all", help="Also upload a run's single adapters, adapters/00 ...")] = False,
    public: Annotated[bool, typer.Option("--public", help="Create a public repository; default: private.")] = False,
    revision: Annotated[str | None, typer.Option(help="The branch, created if missing; default: main.")] = None,
    base: Annotated[
        str | None, typer.Option("--base-model", help="The base model's Hub id, if the adapter names a local folder.")
    ] = None,
    license: Annotated[str | None, typer.Option(help="The license, such as apache-2.0; default: none.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the files and the card; upload nothing.")] = False,
) -> None:
    """Upload an adapter with a model card to the Hugging Face Hub, in one commit. Log in first: hf auth login.

    Example: poc-lora push runs/mine you/adapter --base-model org/base --dry-run
    """
    from poc_lora.hub.push import next_step, push, summary

    done = push(
        adapter, repo_id, all=all, public=public, revision=revision, dry_run=dry_run, base_model=base, licence=license
    )
    show(*summary(done))
    print_next(*next_step(done))
