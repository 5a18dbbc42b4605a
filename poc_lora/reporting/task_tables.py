"""The tables of lm-eval's tasks: every metric of base, adapters and merge, and the merge's paired differences."""

from poc_lora.artifacts.task_scores import Metric, Task, TaskResults
from poc_lora.reporting.escape import short
from poc_lora.reporting.tables import Table, Value

BETTER = {True: " ↑", False: " ↓", None: ""}  # as lm-eval marks metrics


def task_tables(results: TaskResults) -> list[Table]:
    """Returns the tables of the report: of the tasks that were asked for, their differences, the members of groups."""
    found = [scores_table(results), differences_table(results), scores_table(results, members=True)]
    return [table for table in found if table.rows]


def scores_table(results: TaskResults, *, members: bool = False) -> Table:
    """Returns the metrics of the tasks that were asked for or, with `members`, of those of their groups."""
    listed = {name: task for name, task in results.tasks.items() if task.listed != members}
    adapters = max((len(m.adapters) for task in listed.values() for m in task.metrics.values()), default=0)
    merged = any(m.merged for task in listed.values() for m in task.metrics.values())
    titles = ["", "documents", "base"]
    titles += ["LoRA (best)", "LoRA (average)"] if adapters > 1 else ["LoRA"] if adapters else []
    titles += ["PoC merge"] if merged else []
    rows: list[list[Value]] = []
    for name, task in listed.items():
        for key, metric in task.metrics.items():
            scores = [metric.base, *([metric.adapters[metric.best]] if adapters else [])]
            scores += [metric.average] if metric.average is not None and adapters > 1 else []
            scores += [metric.merged] if metric.merged is not None else []
            rows.append([_title(name, task, key, metric), task.documents, *scores])
    caption = "Tasks of lm-eval ± standard error" if not members else "Tasks in groups ± standard error"
    return Table(caption, titles, rows, folded=members)


def differences_table(results: TaskResults) -> Table:
    """Returns the paired differences of the tasks that were asked for, of metrics that are means over documents."""
    rows: list[list[Value]] = []
    subject = "PoC merge"
    for name, task in results.tasks.items():
        for key, metric in task.metrics.items() if task.listed else ():
            if metric.merged is None:
                subject = f"LoRA {short(metric.best)}"
            names = {"base": "base", "average": "LoRA (average)", "best": "LoRA (best)"}
            if len(metric.adapters) == 1:
                names["best"] = f"LoRA {short(metric.best)}"
            for rival, d in metric.comparisons.items():
                interval = f"{d.low:+.4f} to {d.high:+.4f}"
                rows.append(
                    [f"{_title(name, task, key, metric)} minus {names.get(rival, rival)}", f"{d.value:+.4f}", interval]
                )
    caption = f"{subject} minus others (paired bootstrap over documents)"
    return Table(caption, ["", "difference", "95 % interval"], rows)


def task_notes(results: TaskResults) -> list[str]:
    """Returns what a reader of the tables has to know."""
    some = next((m for task in results.tasks.values() for m in task.metrics.values()), None)
    notes = []
    if some is not None and len(some.adapters) > 1:
        notes.append("LoRA (best) is chosen by each metric on these very documents, which flatters it.")
    if results.exact_average:
        notes.append("PoC merge is the exact average of the adapters, which is not saved: `poc-lora merge` saves it.")
    for name, task in results.tasks.items():
        if task.listed and task.truncated:
            count = f"{task.truncated:,} of {task.documents:,}"
            notes.append(
                f"{short(name, 60)}: {count} prompts were cut at their start to fit the context, as lm-eval does."
            )
    if results.apply_chat_template:
        notes.append("Prompts were in the chat template, with each example as two turns.")
    if results.limit is not None:
        notes.append(f"Only the first {results.limit} documents of each task were asked.")
    notes.append(f"Metrics and standard errors are those of lm-eval {short(results.lm_eval, 20)}.")
    return notes


def _title(name: str, task: Task, key: str, metric: Metric) -> str:
    """`gsm8k, 5-shot: exact_match (strict-match) ↑`."""
    shots = f", {task.fewshot}-shot" if task.fewshot else ""
    measure, _, filter_name = key.partition(",")
    filtered = "" if filter_name in ("none", "") else f" ({filter_name})"
    return short(f"{name}{shots}: {measure}{filtered}", 100) + BETTER[metric.higher_is_better]
