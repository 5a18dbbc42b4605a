"""The verbs `eval` and `report`."""

import contextlib
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from poc_lora.artifacts.run_folder import ProtocolName
from poc_lora.cli.terminal import AsJson, numbers, print_next, show, show_json, stdout_kept_for_json
from poc_lora.config import Dtype, PromptTemplate, Quantization
from poc_lora.errors import DataError, RequestError

# The panels of the help.
ASK, ROWS, TASKS = "Questions", "Rows with answers, in place of questions", "Tasks of lm-eval, in place of questions"
COMPARE, MODEL = "What else to compare", "Base model and prompt"


def evaluate(
    targets: Annotated[
        list[Path] | None, typer.Argument(help="One run folder, one model's folder, or adapters of one base.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of NAME/test.json (or .jsonl) files; any NAME is a benchmark.", rich_help_panel=ASK),
    ] = None,
    benchmarks: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated names; default: all eight, or all that --data has where some are yours.",
            rich_help_panel=ASK,
        ),
    ] = None,
    protocol: Annotated[
        ProtocolName,
        typer.Option(
            help="label: the most likely label. generate: the first label in the generated text. "
            "harness: lm-eval, on its own tasks without --data.",
            rich_help_panel=ASK,
        ),
    ] = "label",
    beams: Annotated[
        int,
        typer.Option(help="generate: the number of beams; 1 is greedy, the paper's is 4.", rich_help_panel=ASK),
    ] = 1,
    limit: Annotated[
        int | None,
        typer.Option(help="Only the first N questions of each benchmark or task.", rich_help_panel=ASK),
    ] = None,
    show_list: Annotated[
        bool, typer.Option("--list", help="List the eight benchmarks and exit.", rich_help_panel=ASK)
    ] = False,
    rows: Annotated[
        list[str] | None,
        typer.Option(
            help="A file of rows as for training: losses on its answers instead of accuracies. Repeatable.",
            rich_help_panel=ROWS,
        ),
    ] = None,
    texts: Annotated[
        int | None,
        typer.Option(
            help="Also generate answers to the first N rows, by base, best adapter and merge.", rich_help_panel=ROWS
        ),
    ] = None,
    match: Annotated[
        str | None,
        typer.Option(
            help="A regular expression: only its last match in text and answer is compared.", rich_help_panel=ROWS
        ),
    ] = None,
    harness_tasks: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated tasks, groups and tags, such as gsm8k,mmlu, with their own metrics.",
            rich_help_panel=TASKS,
        ),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(help="Examples before each question; default: each task's own.", rich_help_panel=TASKS),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="A folder of further tasks, as for lm-eval.", rich_help_panel=TASKS)
    ] = None,
    apply_chat_template: Annotated[
        bool,
        typer.Option(
            "--apply-chat-template",
            help="Ask in the chat template, with each example as two turns.",
            rich_help_panel=TASKS,
        ),
    ] = False,
    study: Annotated[
        bool,
        typer.Option(
            "--study",
            help="Evaluate several runs that differ in the seed: means and intervals over runs.",
            rich_help_panel=COMPARE,
        ),
    ] = False,
    subsets: Annotated[
        bool,
        typer.Option("--subsets", help="Also score merges of 2, 4, ... of the adapters.", rich_help_panel=COMPARE),
    ] = False,
    ranks: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated, such as 8,16,32: also score the merge truncated to each; says which to serve.",
            rich_help_panel=COMPARE,
        ),
    ] = None,
    control: Annotated[
        Path | None,
        typer.Option(
            help="Another run, evaluated with the same options, to compare the merge with.", rich_help_panel=COMPARE
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Base model; default: the one the run or adapters name.", rich_help_panel=MODEL),
    ] = None,
    prompt: Annotated[
        PromptTemplate | None,
        typer.Option(help="The prompt template; default: the run's own, clean outside a run.", rich_help_panel=MODEL),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="The base model's dtype; default: the run's own, auto outside a run.", rich_help_panel=MODEL),
    ] = None,
    quantization: Annotated[
        Quantization | None,
        typer.Option(
            help="Quantise the base model's linear layers; default: as the run did. Not for a base stored quantised.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the results; default: RUN/eval.")] = None,
    as_json: AsJson = False,
) -> None:
    """Score base, adapters, merge and prediction ensemble on your own questions or the eight commonsense benchmarks.

    Example: poc-lora eval runs/demo --data ../commonsense --benchmarks openbookqa,boolq --limit 200

    Example: poc-lora eval runs/mine --rows held-out.jsonl

    Example: poc-lora eval runs/mine --harness-tasks gsm8k,mmlu --limit 100

    Example: poc-lora eval --study runs/seed0 runs/seed1 runs/seed2 --data mytasks
    """
    if show_list:
        from poc_lora.reporting.results_tables import benchmark_table

        show(benchmark_table())
        print_next("the benchmarks as LLM-Adapters renders them", "python scripts/download_commonsense.py --out DIR")
        return
    options: dict[str, Any]
    if rows:
        given = dict(
            data=data, benchmarks=benchmarks, control=control, limit=limit, subsets=subsets or None, ranks=ranks
        )
        given |= {"harness-tasks": harness_tasks, "num-fewshot": num_fewshot, "include-path": include_path}
        given |= {"apply-chat-template": apply_chat_template or None}
        for name, value in given.items():
            if value is not None:
                raise RequestError(f"--{name} is for benchmarks", where="--rows", fix="leave one of them out")
        if protocol != "label" or beams != 1:
            raise RequestError("rows have one protocol", where="--rows", fix="leave out --protocol and --beams")
        options = dict(base=base, dtype=dtype, quantization=quantization, prompt=prompt, out=out)
        options |= {"texts": texts, "match": match}
        score = _evaluate_study if study else _evaluate_rows
        score(targets, rows=rows, as_json=as_json, **options)
        return
    for option, of_rows in {"--texts": texts, "--match": match}.items():
        if of_rows is not None:
            raise RequestError(f"{option} is for rows", fix="add --rows FILE")
    if harness_tasks is not None:
        if protocol == "generate" or beams != 1 or prompt is not None:
            what = "lm-eval's tasks have their own protocols and prompts"
            raise RequestError(what, where="--harness-tasks", fix="leave out --protocol, --beams and --prompt")
        given = dict(data=data, benchmarks=benchmarks, control=control, subsets=subsets or None, study=study or None)
        given |= {"ranks": ranks}
        for name, value in given.items():
            if value is not None:
                raise RequestError(f"--{name} is for benchmarks", where="--harness-tasks", fix="leave one of them out")
        options = dict(base=base, dtype=dtype, quantization=quantization, out=out, limit=limit, as_json=as_json)
        options |= dict(num_fewshot=num_fewshot, include_path=include_path, apply_chat_template=apply_chat_template)
        _evaluate_tasks(targets, harness_tasks, **options)
        return
    for option, given_value in {
        "--num-fewshot": num_fewshot,
        "--include-path": include_path,
        "--apply-chat-template": apply_chat_template or None,
    }.items():
        if given_value is not None:
            raise RequestError(f"{option} is for tasks of lm-eval", fix="add --harness-tasks NAMES")
    if not targets or (data is None and protocol != "harness"):
        missing = "TARGETS" if not targets else "--data"
        raise RequestError(f"{missing} is missing", fix="for example: poc-lora eval runs/demo --data ../commonsense")

    from poc_lora.distributed import is_rank_0
    from poc_lora.evaluation.evaluate import count_questions, evaluate
    from poc_lora.reporting.results_tables import power_note, results_summary, write_report

    names = None if benchmarks is None else [name.strip() for name in benchmarks.split(",")]
    options = dict(
        data=data,
        base=base,
        dtype=dtype,
        quantization=quantization,
        benchmarks=names,
        protocol=protocol,
        beams=beams,
        prompt=prompt,
        limit=limit,
        subsets=subsets,
        merge_ranks=[] if ranks is None else numbers(ranks, int, "--ranks", "8,16,32,64"),
        control=control,
        out=out,
    )
    if data is not None and (limit is None or limit > 0) and is_rank_0() and not as_json:
        with contextlib.suppress(DataError):  # `evaluate` raises it, after what is wrong with the targets
            show(power_note(count_questions(data, names, limit)))
    if study:
        _evaluate_study(targets, as_json=as_json, **options)
        return
    with stdout_kept_for_json(as_json):
        results = evaluate(targets, **options)
    if not is_rank_0():
        return
    written = write_report(out or targets[0], results)
    if as_json:
        show_json(results)
        return
    show(*results_summary(results))
    print_next(f"the results: {written.parent}", f"poc-lora report {shlex.quote(str(out or targets[0]))}")


def _evaluate_study(targets: list[Path] | None, *, out: Path | None, as_json: bool, **options: Any) -> None:
    from poc_lora.artifacts.run_folder import STUDY_TABLE
    from poc_lora.distributed import is_rank_0
    from poc_lora.reporting.study import evaluate_study, study_notes, study_tables
    from poc_lora.reporting.tables import terminal_table

    runs = targets or []
    with stdout_kept_for_json(as_json):
        study = evaluate_study(runs, out=out, **options)
    if not is_rank_0():
        return
    if as_json:
        show_json(study)
        return
    show(*map(terminal_table, study_tables(study)), *study_notes(study))
    compared = ["--compare", *runs[1:]] if "accuracy" in study.measures else []
    command = "poc-lora report " + shlex.join(map(str, [runs[0], *compared]))
    print_next(f"the study: {(out or runs[0]) / STUDY_TABLE}", command)


def _evaluate_rows(
    targets: list[Path] | None, *, rows: list[str], out: Path | None, as_json: bool, **options: Any
) -> None:
    from poc_lora.artifacts.run_folder import ROW_LOSSES, RunFolder
    from poc_lora.evaluation.rows import evaluate_rows
    from poc_lora.reporting.held_out import instead_of_merge, rows_held_out, rows_notes, rows_table
    from poc_lora.reporting.row_texts import match_notes, match_table
    from poc_lora.reporting.tables import terminal_table

    if not targets:
        raise RequestError("TARGETS is missing", fix="for example: poc-lora eval runs/mine --rows held-out.jsonl")
    with stdout_kept_for_json(as_json):
        found = evaluate_rows(targets, rows, out=out, **options)
    if as_json:
        show_json(found)
        return
    show(terminal_table(rows_table(found)), *rows_notes(found))
    if found.texts:
        show(terminal_table(match_table(found.texts)), *match_notes(found.texts))
    place, target = out or RunFolder(targets[0]).evaluation("rows"), shlex.quote(str(targets[0]))
    compared = rows_held_out(found)
    pays = compared is None or instead_of_merge(compared) is None
    if found.exact_average and pays and RunFolder(targets[0]).is_run:
        command = f"poc-lora merge {target} --out {shlex.quote(str(RunFolder(targets[0]).merged))}"
    else:
        command = f"poc-lora report {target}" if RunFolder(targets[0]).is_run else f"poc-lora eval {target} --data DIR"
    print_next(f"the losses of each row: {place / ROW_LOSSES}", command)


def _evaluate_tasks(targets: list[Path] | None, tasks: str, *, out: Path | None, as_json: bool, **options: Any) -> None:
    from poc_lora.artifacts.run_folder import TASK_RESULTS, RunFolder
    from poc_lora.evaluation.tasks import evaluate_tasks
    from poc_lora.reporting.tables import terminal_table
    from poc_lora.reporting.task_tables import differences_table, scores_table, task_notes

    if not targets:
        raise RequestError("TARGETS is missing", fix="for example: poc-lora eval runs/mine --harness-tasks gsm8k")
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    with stdout_kept_for_json(as_json):
        found = evaluate_tasks(targets, names, out=out, **options)
    if as_json:
        show_json(found)
        return
    tables = [table for table in (scores_table(found), differences_table(found)) if table.rows]
    show(*map(terminal_table, tables), *task_notes(found))
    place, target = out or RunFolder(targets[0]).evaluation("tasks"), shlex.quote(str(targets[0]))
    command = f"poc-lora report {target}" if RunFolder(targets[0]).is_run else f"poc-lora eval {target} --data DIR"
    print_next(f"the metrics of every task: {place / TASK_RESULTS}; lm-eval's samples beside it", command)


def sample(
    run: Annotated[Path, typer.Argument(help="The run folder.")],
    text: Annotated[str, typer.Argument(help="What to ask; it is put into the run's prompt or chat template.")],
    adapter: Annotated[str | None, typer.Option(help="An adapter, such as 03; default: the best one so far.")] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat", help="Ask in the chat template; default: where most training rows were chats."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="The most tokens to generate.")] = 128,
) -> None:
    """Show what base, best adapter and merge write after one prompt, greedily.

    Example: poc-lora sample runs/mine "Where is my order?"
    """
    from poc_lora.artifacts.run_folder import RunFolder
    from poc_lora.evaluation.sample import sample_texts
    from poc_lora.reporting.run_files import best_adapter, read_run

    best = adapter or (best_adapter(read_run(run)) if RunFolder(run).is_run else None)
    for name, written in sample_texts(run, text, adapter=best, chat=chat, new_tokens=tokens).items():
        title = name if name in ("base", "merge") else f"adapter {name}"
        show("", f"{title}:", *written.splitlines())
    if best is None:
        show("", "Which adapter is the best is not known yet: poc-lora eval RUN --rows FILE tells it.")


def report(
    runs: Annotated[list[Path], typer.Argument(help="A run, or a folder of results.", metavar="RUN")],
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Compare the first run with the others; also writes RUN/comparison.md."),
    ] = False,
) -> None:
    """Write RUN/report.html, one self-contained page, and the tables of the run's evaluations as Markdown.

    Example: poc-lora report runs/demo

    Example: poc-lora report runs/demo --compare runs/demo-lambda0 runs/demo-lambda1e-4
    """
    run, *others = runs
    if bool(others) != compare:
        what = "--compare needs runs to compare with" if compare else "a report describes one run"
        fix = f"for example: poc-lora report {shlex.quote(str(run))} --compare OTHER_RUN"
        raise RequestError(what, where=", ".join(map(str, runs)), fix=fix)

    from poc_lora.reporting.compare import write_comparison
    from poc_lora.reporting.page import report
    from poc_lora.reporting.results_tables import results_summary
    from poc_lora.reporting.run_files import read_run

    page = report(run, compare=others)
    if compare:
        tables, notes = write_comparison(runs)
        show(*tables, *notes)
    else:
        files = read_run(run)
        for i, results in enumerate(files.evaluations):
            show(*results_summary(results), *files.out_of_date(i))
        show(*files.rows_out_of_date, *files.tasks_out_of_date)
    print_next(f"the report: {page}", "open it in a browser")
