"""The command line. Each verb is a thin shell over one function, imported when the verb is chosen."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from poc_lora import __version__
from poc_lora.cli import mfnn
from poc_lora.cli import push as hub
from poc_lora.cli.terminal import (
    as_error,
    numbers,
    show,
    show_error,
    show_merge,
    show_results,
    show_training,
    tell_next,
)
from poc_lora.envvars import flag
from poc_lora.merging.methods import METHODS

app = typer.Typer(
    name="poc-lora",
    help="Train several LoRA adapters of one base model, merge them into one: more accurate, same inference cost.",
    epilog="With `POC_LORA_TRACEBACK=1` in the environment an error shows its traceback too.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


DTYPES = ("float32", "bfloat16", "float16")
Config = Annotated[Path, typer.Argument(help="The run's YAML file, such as configs/demo.yaml.", metavar="CONFIG")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Settings that replace the file's, such as optim.lr=1e-4.", metavar="KEY=VALUE"),
]


def main() -> None:
    """Run the command line; errors a user can meet are printed without a traceback."""
    traceback = False
    try:
        traceback = flag("POC_LORA_TRACEBACK")
        app()
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


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The run folder to create.")] = Path("runs/demo"),
    overrides: Overrides = None,
) -> None:
    """Train, merge, evaluate and report on the embedded micro-world: no download, no GPU, minutes.

    Example: poc-lora demo --out runs/demo adapters.seed=1
    """
    from poc_lora.microworld.demo import run_demo

    run_demo(out, overrides or [], show=show)
    tell_next(
        f"the report: {out / 'report.html'} (open it in a browser)",
        f"copy {out / 'config.yaml'}, set model, data and output to your own, and poc-lora train YOUR.yaml",
    )


@app.command()
def check(
    config: Config,
    overrides: Overrides = None,
    processes: Annotated[int, typer.Option(min=1, help="How many accelerate launch will start.")] = 1,
) -> None:
    """Validate a run and say what it will do, without loading any weights.

    Example: poc-lora check configs/demo.yaml train.max_steps=50
    """
    from poc_lora.config import load_config

    loaded = load_config(config, overrides or [])

    from poc_lora.training.check import check

    facts = check(loaded, processes=processes)
    width = max(map(len, facts))
    for name, value in facts.items():
        typer.echo(f"{name:<{width}}  {value:,}" if isinstance(value, int) else f"{name:<{width}}  {value}")
    launcher = (
        "poc-lora" if processes == 1 else f"accelerate launch --multi_gpu --num_processes {processes} -m poc_lora"
    )
    tell_next("the configuration is valid", f"{launcher} train " + shlex.join([str(config), *(overrides or [])]))


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the output folder.")] = False,
) -> None:
    """Train the adapters of a run, packed together; over several devices under accelerate launch.

    Example: poc-lora train configs/demo.yaml adapters.count=4 output=runs/four
    Example: accelerate launch --multi_gpu --num_processes 4 -m poc_lora train configs/demo.yaml output=runs/four
    """
    from poc_lora.config import load_config

    loaded = load_config(config, overrides or [])

    from poc_lora.training.train import train

    done = train(loaded, resume=resume)
    if not done.tells:
        return
    show_training(done)
    merged = done.folder / "merged"
    command = "poc-lora merge " + shlex.join([str(done.folder), "--out", str(merged)])
    if merged.exists():  # of the adapters before the run was extended
        command = f"rm -r {shlex.quote(str(merged))} && {command}"
    tell_next(f"adapters: {done.folder / 'adapters'}", command)


@app.command()
def merge(
    sources: Annotated[
        list[str],
        typer.Argument(help="Adapter folders, runs (all their finished adapters), Hub ids org/name@revision."),
    ],
    out: Annotated[Path, typer.Option(help="The folder to create for the merged adapter.")],
    method: Annotated[
        str, typer.Option(help=". ".join(f"{name}: {entry.summary}" for name, entry in METHODS.items()) + ".")
    ] = "average",
    rank: Annotated[
        int | None, typer.Option(help="Rank of the result: for average the best approximation; default: exact.")
    ] = None,
    rank_sweep: Annotated[
        str | None, typer.Option(help="Ranks, comma-separated, to show the error of truncating to each.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="One weight per adapter, comma-separated; default 1/M each.")
    ] = None,
    canonical: Annotated[
        bool, typer.Option("--canonical", help="block, random: take singular triples as the components.")
    ] = False,
    seed: Annotated[int, typer.Option(help="random: the seed of its draws.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    allow_base_mismatch: Annotated[
        bool, typer.Option("--allow-base-mismatch", help="Merge adapters that name different base models.")
    ] = False,
) -> None:
    """Average the B·A products of adapters into one adapter. Needs no base model and no GPU.

    Example: poc-lora merge runs/demo --out merged --rank 32
    """
    from poc_lora.errors import RequestError

    if dtype not in DTYPES:
        raise RequestError(f"'{dtype}' is not a dtype to save in", where="--dtype", fix=" or ".join(DTYPES))
    chosen = None if weights is None else numbers(weights, float, "--weights", "0.5,0.25,0.25")

    import torch

    from poc_lora.merging.folders import merge_folders

    report = merge_folders(
        sources,
        out,
        method=method,
        rank=rank,
        rank_sweep=[] if rank_sweep is None else numbers(rank_sweep, int, "--rank-sweep", "8,16,32,64"),
        weights=chosen,
        canonical=canonical,
        seed=seed,
        dtype=getattr(torch, dtype),
        allow_base_mismatch=allow_base_mismatch,
    )
    show_merge(report)
    if rank_sweep is not None:
        from poc_lora.reporting.page import write_rank_sweep

        write_rank_sweep(report, out)
        typer.echo(f"the same as a figure: {out / 'rank_sweep.svg'}")
    run = next((s for s in map(Path, sources) if (s / "config.yaml").is_file() and out == s / "merged"), None)
    tell_next(
        f"the merged adapter: {out}",
        f"poc-lora eval {shlex.quote(str(run or out))} --data DIR" + ("" if run else " --out DIR"),
    )


@app.command()
def fold(
    adapter: Annotated[Path, typer.Argument(help="The adapter's folder, such as RUN/merged.")],
    base: Annotated[str, typer.Option(help="The base model: a folder or a Hub id. It is not changed.")],
    out: Annotated[Path, typer.Option(help="The folder to create for the folded model.")],
) -> None:
    """Write the base model with an adapter's update in its weights, file by file: a plain model, without adapters.

    Example: poc-lora fold runs/demo/merged --base poc_lora/microworld/model --out folded
    """
    from poc_lora.merging.fold import fold

    done = fold(adapter, base, out)
    typer.echo(f"{done.modules} modules folded into {done.files} files of weights")
    tell_next(
        f"the folded model: {done.folder}", f"load it with AutoModelForCausalLM.from_pretrained({str(done.folder)!r})"
    )


@app.command("eval")
def evaluate(
    targets: Annotated[
        list[Path] | None, typer.Argument(help="One run folder, or adapter folders of one base model.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of BENCHMARK/test.json files.")] = None,
    show_list: Annotated[bool, typer.Option("--list", help="Show the benchmarks, and do nothing else.")] = False,
    base: Annotated[str | None, typer.Option(help="Base model; default: the one the run or adapters name.")] = None,
    benchmarks: Annotated[str | None, typer.Option(help="Comma-separated names; default: all eight.")] = None,
    protocol: Annotated[
        str,
        typer.Option(
            help="label: the likeliest label. generate: the first label in what the model writes. "
            "harness: by lm-eval, on its own tasks where there is no --data."
        ),
    ] = "label",
    beams: Annotated[int, typer.Option(help="generate: the number of beams; 1 is greedy, the paper's is 4.")] = 1,
    prompt: Annotated[
        str | None,
        typer.Option(help="clean, llm-adapters or bare; default: the run's own, clean outside a run."),
    ] = None,
    subsets: Annotated[bool, typer.Option("--subsets", help="Score merges of 2, 4, ... of the adapters too.")] = False,
    control: Annotated[
        Path | None,
        typer.Option(help="A run evaluated alike, such as one of temperature 0, to compare with."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first N questions of each benchmark.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the base: float32, bfloat16, float16; default: auto.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the results; default: RUN/eval.")] = None,
) -> None:
    """Score base, adapters, merge and prediction ensemble on the eight commonsense benchmarks.

    Example: poc-lora eval runs/demo --data ../commonsense --benchmarks openbookqa,boolq --limit 200
    """
    from poc_lora.errors import RequestError

    if show_list:
        from poc_lora.reporting.tables import benchmark_table

        show(benchmark_table())
        tell_next("the benchmarks as LLM-Adapters renders them", "python scripts/download_commonsense.py --out DIR")
        return
    if not targets or (data is None and protocol != "harness"):
        missing = "TARGETS" if not targets else "--data"
        raise RequestError(f"{missing} is missing", fix="for example: poc-lora eval runs/demo --data ../commonsense")
    if dtype not in (None, "auto", *DTYPES):
        raise RequestError(f"'{dtype}' is not a dtype", where="--dtype", fix=" or ".join(DTYPES))

    from poc_lora.distributed import is_first_rank
    from poc_lora.evaluation.evaluate import evaluate
    from poc_lora.reporting.tables import write_report

    results = evaluate(
        targets,
        data=data,
        base=base,
        dtype=dtype,
        benchmarks=None if benchmarks is None else [name.strip() for name in benchmarks.split(",")],
        protocol=protocol,
        beams=beams,
        prompt=prompt,
        limit=limit,
        subsets=subsets,
        control=control,
        out=out,
    )
    if not is_first_rank():
        return
    written = write_report(out or targets[0], results)
    show_results(results)
    tell_next(f"the results: {written.parent}", f"poc-lora report {shlex.quote(str(out or targets[0]))}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="A run, or a folder of results.", metavar="RUN")],
    compare: Annotated[
        bool, typer.Option("--compare", help="Set the runs that follow beside the first (RUN/comparison.md too).")
    ] = False,
) -> None:
    """Write RUN/report.html, one page that needs nothing else, and the table of an evaluation as Markdown.

    Example: poc-lora report runs/demo

    Example: poc-lora report runs/demo --compare runs/demo-lambda0 runs/demo-lambda1e-4
    """
    from poc_lora.errors import RequestError

    run, *others = runs
    if bool(others) != compare:
        what = "--compare needs runs to compare with" if compare else "a report is of one run"
        fix = f"for example: poc-lora report {shlex.quote(str(run))} --compare OTHER_RUN"
        raise RequestError(what, where=", ".join(map(str, runs)), fix=fix)

    from poc_lora.reporting.compare import write_comparison
    from poc_lora.reporting.page import write_page
    from poc_lora.reporting.run_files import read_run
    from poc_lora.reporting.tables import write_report

    evaluations = read_run(run).evaluations
    page = write_page(run, compare=others)
    for results in evaluations:
        write_report(run, results)
        if not compare:
            show_results(results)
    if compare:
        show(write_comparison(runs))
    tell_next(f"the report: {page}", "open it in a browser")


app.command()(hub.push)
app.add_typer(mfnn.app, name="mfnn")


@app.command()
def env() -> None:
    """Versions and hardware, for bug reports.

    Example: poc-lora env
    """
    from poc_lora.training.run import environment

    for section in environment().values():
        for name, value in section.items():
            typer.echo(f"{name:<16}{value}")
