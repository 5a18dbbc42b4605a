"""The verbs `demo`, `init`, `check` and `train`."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from poc_lora.artifacts.run_folder import RunFolder
from poc_lora.cli.terminal import AsJson, print_next, show, show_json, stdout_kept_for_json

Config = Annotated[Path, typer.Argument(help="The run's YAML file, such as configs/demo.yaml.", metavar="CONFIG")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Settings that replace the file's, such as optim.lr=1e-4.", metavar="KEY=VALUE"),
]


def demo(
    out: Annotated[Path, typer.Option(help="The run folder to create.")] = Path("runs/demo"),
    overrides: Overrides = None,
) -> None:
    """Train, merge, evaluate and report on the embedded micro-world: no download, no GPU, minutes.

    Example: poc-lora demo --out runs/demo adapters.seed=1
    """
    from poc_lora.microworld.demo import demo

    demo(out, overrides or [], show=show)
    run = RunFolder(out)
    print_next(
        f"the report: {run.report} (open it in a browser)",
        "your own model and rows: poc-lora init mine.yaml --model BASE --data ROWS.jsonl",
    )


def init(
    file: Annotated[Path, typer.Argument(help="The YAML file to create.")],
    model: Annotated[
        str | None, typer.Option(help="The base model, a folder or a Hub id; default: the demo's tiny one.")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="Training rows, a file or a Hub data set; may be given several times.")
    ] = None,
) -> None:
    """Write a run's YAML file with every key, its meaning and its default.

    Example: poc-lora init mine.yaml --model org/base --data my/train.jsonl
    """
    from poc_lora.config import write_template
    from poc_lora.microworld import DATA_DIR, MODEL_DIR

    for key, value in (("model.name", model), ("data.train", data)):
        if not value:
            show(f"{key} is the demo's: set your own in the file")
    write_template(file, model=model or str(MODEL_DIR), data=data or [str(DATA_DIR)], output=f"runs/{file.stem}")
    print_next(f"the configuration: {file}", f"poc-lora check {shlex.quote(str(file))}")


def check(
    config: Config,
    overrides: Overrides = None,
    processes: Annotated[int, typer.Option(min=1, help="The number of processes of accelerate launch.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Validate a run and say what it will do, without loading any weights.

    Example: poc-lora check configs/demo.yaml train.max_steps=50
    """
    from poc_lora.config import load_config

    loaded = load_config(config, overrides or [])

    from poc_lora.training.check import check

    with stdout_kept_for_json(as_json):
        facts = check(loaded, processes=processes)
    if as_json:
        show_json(facts)
        return
    del facts["bytes"]
    row, found = facts.pop("a row"), facts.pop("warnings")
    width = max(map(len, facts))
    for name, value in facts.items():
        show(f"{name:<{width}}  {value:,}" if isinstance(value, int) else f"{name:<{width}}  {value}")
    for line in ("", "A training row, and what of it has a loss:", *row, *(f"warning: {line}" for line in found)):
        show(line)
    launcher = (
        "poc-lora" if processes == 1 else f"accelerate launch --multi_gpu --num_processes {processes} -m poc_lora"
    )
    print_next("the configuration is valid", f"{launcher} train " + shlex.join([str(config), *(overrides or [])]))


def train(
    config: Config,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the run in the output folder, if any.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train the adapters of a run, packed together; over several devices under accelerate launch.

    Example: poc-lora train configs/demo.yaml adapters.count=4 output=runs/four

    Example: accelerate launch --multi_gpu --num_processes 4 -m poc_lora train configs/demo.yaml output=runs/four
    """
    from poc_lora.config import load_config

    loaded = load_config(config, overrides or [])

    from poc_lora.reporting.screening import better_than_merge
    from poc_lora.reporting.summaries import training_summary
    from poc_lora.training.train import train

    with stdout_kept_for_json(as_json):
        done = train(loaded, resume=resume)
    if not done.is_rank_0:
        return
    if as_json:
        from poc_lora.reporting.held_out import read_held_out

        facts = {name: value for name, value in vars(done).items() if name != "is_rank_0"}
        show_json(facts | {"held_out": read_held_out(done.folder)})
        return
    show(*training_summary(done))
    run = RunFolder(done.folder)
    command = "poc-lora merge " + shlex.join([str(run.path), "--out", str(run.merged)])
    if run.merged.exists():  # of the adapters before the run was extended
        command = f"rm -r {shlex.quote(str(run.merged))} && {command}"
    better, result = better_than_merge(run.path), f"adapters: {run.adapters}"
    if better == "base":
        command = f"poc-lora report {shlex.quote(str(run.path))}"
    elif better is not None:
        result = f"the adapter to use: {run.adapter(better)}"
        command = f'poc-lora sample {shlex.quote(str(run.path))} "A PROMPT OF YOURS"'
    print_next(result, command)
