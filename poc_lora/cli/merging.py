"""The verbs `merge` and `fold`."""

import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from poc_lora.artifacts.run_folder import RunFolder
from poc_lora.cli.terminal import AsJson, interruptible, numbers, print_next, show, show_json, stdout_kept_for_json
from poc_lora.errors import RequestError, WriteError
from poc_lora.merging.methods import METHODS

Method = StrEnum("Method", list(METHODS))  # type: ignore[misc]
AVERAGE = Method("average")
SavedDtype = Literal["float32", "bfloat16", "float16"]


def merge(
    sources: Annotated[
        list[str],
        typer.Argument(help="Adapter folders, folders of such, runs (all that finished), Hub ids org/name@revision."),
    ],
    out: Annotated[
        Path | None, typer.Option(help="The folder to create for the merged adapter. Not needed for --rank-sweep.")
    ] = None,
    method: Annotated[
        Method, typer.Option(help=". ".join(f"{name}: {entry.summary}" for name, entry in METHODS.items()) + ".")
    ] = AVERAGE,
    rank: Annotated[
        int | None, typer.Option(help="Rank of the result: for average the best approximation; default: exact.")
    ] = None,
    rank_sweep: Annotated[
        str | None,
        typer.Option(help="Ranks, comma-separated: show the error of truncating to each; without --out write nothing."),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="One weight per adapter, comma-separated; default 1/M each.")
    ] = None,
    canonical: Annotated[
        bool, typer.Option("--canonical", help="block, random: take singular triples as the components.")
    ] = False,
    seed: Annotated[int, typer.Option(help="random: the seed of its draws.")] = 0,
    dtype: Annotated[SavedDtype, typer.Option(help="The dtype to save in.")] = "float32",
    allow_base_mismatch: Annotated[
        bool, typer.Option("--allow-base-mismatch", help="Merge adapters that name different base models.")
    ] = False,
    modules_to_save: Annotated[
        Literal["same", "mean"],
        typer.Option(help="Modules trained whole: refuse different ones, or average them (labels in the same order!)."),
    ] = "same",
    keep_all: Annotated[
        bool, typer.Option("--keep-all", help="A run: merge also adapters that spoil the merge.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Average the B·A products of adapters into one adapter, without a base model or a GPU.

    Example: poc-lora merge runs/demo --out merged --rank 32

    Example: poc-lora merge runs/demo --rank-sweep 16,32,64
    """
    chosen = None if weights is None else numbers(weights, float, "--weights", "0.5,0.25,0.25")
    ranks = [] if rank_sweep is None else numbers(rank_sweep, int, "--rank-sweep", "8,16,32,64")

    trained = RunFolder(Path(sources[0])) if len(sources) == 1 else None
    if trained and not trained.is_run:
        trained = None

    if out is None and not ranks:
        raise RequestError(
            "--out is missing", fix="add --out DIR, or --rank-sweep 16,32,64 to see what ranks would cost"
        )

    with interruptible("nothing was written"), stdout_kept_for_json(as_json):
        import torch

        from poc_lora.merging.folders import merge_folders
        from poc_lora.reporting.screening import screen
        from poc_lora.reporting.summaries import merge_distance, merge_summary

        screening = screen(trained.path) if trained and chosen is None and not keep_all else None
        left_out = screening.left_out if screening else []
        report = merge_folders(
            sources,
            out,
            leave_out=[trained.adapter(number) for number in left_out] if trained else (),
            method=method,
            rank=rank,
            rank_sweep=ranks,
            weights=chosen,
            canonical=canonical,
            seed=seed,
            dtype=getattr(torch, dtype),
            allow_base_mismatch=allow_base_mismatch,
            modules_to_save=modules_to_save,
        )
    if as_json:
        show_json(report)
    else:
        show(*(merge_summary(report) if out is not None else filter(None, [merge_distance(report)])))
    if left_out and not as_json:
        show(str(screening))
    elif trained and method == AVERAGE and chosen is None and not as_json:
        from poc_lora.reporting.held_out import verdicts

        show(*verdicts(trained.path))
    if ranks and not as_json:
        from poc_lora.reporting.summaries import rank_table

        show(rank_table(report))
    if ranks and out is not None:
        from poc_lora.reporting.page import write_rank_sweep

        try:
            write_rank_sweep(report, out)
        except WriteError as problem:
            what = f"the merged adapter is written and complete, but the figure of its ranks {problem.what}"
            raise WriteError(what, where=problem.where, fix=problem.fix) from problem
    if as_json:
        return
    if out is None:
        print_next("nothing was written", f"poc-lora merge {shlex.join(sources)} --out DIR --rank RANK")
        return
    if ranks:
        show(f"the same as a figure: {out / 'rank_sweep.svg'}")
    runs = map(RunFolder, map(Path, sources))
    run = next((run for run in runs if run.is_run and out == run.merged), None)
    if run and run.held_out.is_file():
        command = shlex.join(["poc-lora", "eval", str(run.path), "--rows", str(run.held_out)])
    else:
        target = shlex.quote(str(run.path if run else out))
        command = f"poc-lora eval {target} --data DIR" + ("" if run else " --out DIR")
    print_next(f"the merged adapter: {out}", command)


def fold(
    adapter: Annotated[str, typer.Argument(help="The adapter: a folder, such as RUN/merged, or a Hub id.")],
    out: Annotated[Path, typer.Option(help="The folder to create for the folded model.")],
    base: Annotated[
        str | None,
        typer.Option(help="The base model, a folder or a Hub id org/name@revision; default: the adapter's own."),
    ] = None,
    untie_head: Annotated[
        bool, typer.Option("--untie-head", help="Give a tied output head weights of its own, if they differ now.")
    ] = False,
) -> None:
    """Write a copy of the base model with an adapter merged into its weights: a plain model, without adapters.

    Example: poc-lora fold runs/demo/merged --out folded
    """
    with interruptible("nothing was written"):
        from poc_lora.merging.fold import fold

        done = fold(adapter, base, out, untie_head=untie_head)
    show(f"{done.modules} modules folded into {done.files} files of weights")
    if done.left_out:
        show(f"left out, copy it from the base if you trust it: {', '.join(done.left_out)}")
    how = "its own code is needed to load it (trust_remote_code)"
    if done.loaded_by:
        how = f"load it with {done.loaded_by}.from_pretrained({str(done.folder)!r})"
    print_next(f"the folded model: {done.folder}", how)
