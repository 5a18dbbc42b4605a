"""From the scores of variants on lm-eval's tasks to a summary: groups, the best adapter, and paired differences."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from poc_lora.artifacts.results import Difference
from poc_lora.artifacts.task_scores import Metric, Score, Task, TaskScore
from poc_lora.evaluation.protocols.harness_tasks import quiet_lm_eval
from poc_lora.evaluation.protocols.named_tasks import NamedTasks
from poc_lora.evaluation.protocols.task_scoring import error_key, number
from poc_lora.evaluation.scores import mean, paired_difference
from poc_lora.evaluation.variants import adapter_key


def summarise_tasks(
    named: NamedTasks, found: Mapping[str, Mapping[str, TaskScore]], *, adapters: Sequence[str], seed: int
) -> dict[str, Task]:
    """Every task and group with the metrics of all variants, each group before its members.

    Args:
        found: By variant, then by task.
        adapters: Their names.
        seed: Of the bootstrap.
    """
    summaries = {}
    for name, listed in named.listed().items():
        group = named.groups.get(name)
        members = [task.config.task for task in group.get_all_tasks()] if group else [name]
        values = {variant: _values(named, name, scores) for variant, scores in found.items()}
        scored = {variant: _document_scores(group, members, scores) for variant, scores in found.items()}
        direction = _directions(named, members)
        summaries[name] = Task(
            listed=listed,
            version=str(group.version if group else named.tasks[name].VERSION),
            fewshot=None if group else named.tasks[name].get_config("num_fewshot"),
            documents=sum(found["base"][member].documents for member in members),
            truncated=max(sum(scores[member].truncated for member in members) for scores in found.values()),
            metrics={
                key: _metric(
                    {variant: own[key] for variant, own in values.items()},
                    {variant: own[key] for variant, own in scored.items() if key in own},
                    adapters,
                    direction.get(key.partition(",")[0]),
                    seed,
                )
                for key in values["base"]
                if all(key in own for own in values.values())
            },
        )
    return summaries


def _values(named: NamedTasks, name: str, scores: Mapping[str, TaskScore]) -> dict[str, Score]:
    """The metrics of one variant on a task, or on a group as lm-eval aggregates them."""
    if name not in named.groups:
        return scores[name].metrics
    plain: dict[str, dict[str, Any]] = {}
    for task, score in scores.items():
        plain[task] = {"sample_len": score.documents}
        for key, (value, error) in score.metrics.items():
            plain[task] |= {key: value, error_key(key): "N/A" if math.isnan(error) else error}
    with quiet_lm_eval():
        found = named.groups[name].aggregate(plain)
    keys = [key for key in found if "," in key and "_stderr," not in key]
    return {key: Score(number(found[key]), number(found.get(error_key(key)))) for key in keys}


def _document_scores(
    group: Any, members: Sequence[str], scores: Mapping[str, TaskScore]
) -> dict[str, dict[str, torch.Tensor]]:
    """By metric the scores of all documents, by task; of a group whose mean is over documents, in one."""
    by_key: dict[str, dict[str, torch.Tensor]] = {}
    for member in members:
        for key, values in scores[member].scores.items():
            by_key.setdefault(key, {})[member] = torch.tensor(values, dtype=torch.float64)
    whole = {key: parts for key, parts in by_key.items() if len(parts) == len(members)}
    if group is None or not group.aggregate_metric_list:
        return whole
    by_documents = {config.metric: config.weight_by_size for config in group.aggregate_metric_list}
    return {
        key: {"all": torch.cat(list(parts.values()))} if by_documents.get(key.partition(",")[0]) else parts
        for key, parts in whole.items()
    }


def _directions(named: NamedTasks, members: Sequence[str]) -> dict[str, bool]:
    return {m: bool(up) for name in members for m, up in (named.tasks[name].higher_is_better() or {}).items()}


def _metric(
    values: Mapping[str, Score],
    scored: Mapping[str, Mapping[str, torch.Tensor]],
    adapters: Sequence[str],
    higher_is_better: bool | None,
    seed: int,
) -> Metric:
    """One metric of every variant, and what the merge differs by."""
    own = {name: values[adapter_key(name)] for name in adapters}
    sign = -1 if higher_is_better is False else 1
    best = max(own, key=lambda name: -math.inf if math.isnan(own[name].value) else sign * own[name].value, default="")
    average, comparisons = None, {}
    if adapters:
        error = math.nan
        rivals = {
            name: scored[key] for name, key in {"base": "base", "best": adapter_key(best)}.items() if key in scored
        }
        members = [scored[adapter_key(name)] for name in adapters if adapter_key(name) in scored]
        if len(members) == len(adapters):
            rivals["average"] = {task: torch.stack([m[task] for m in members]).mean(0) for task in members[0]}
            parts = [mean(part) for part in rivals["average"].values()]
            error = math.sqrt(math.fsum(part.error**2 for part in parts)) / len(parts)
        average = Score(math.fsum(score.value for score in own.values()) / len(own), error)
        subject = scored.get("merged" if "merged" in values else adapter_key(best))
        comparisons = _comparisons(subject, rivals, alone=len(adapters) == 1, merged="merged" in values, seed=seed)
    return Metric(
        higher_is_better=higher_is_better,
        base=values["base"],
        adapters=own,
        average=average,
        merged=values.get("merged"),
        best=best,
        comparisons=comparisons,
    )


def _comparisons(
    subject: Mapping[str, torch.Tensor] | None,
    rivals: Mapping[str, Mapping[str, torch.Tensor]],
    *,
    alone: bool,
    merged: bool,
    seed: int,
) -> dict[str, Difference]:
    """`alone` is an adapter without others: its average is itself; without a merge it is compared with the base."""
    left_out = {"average"} if alone and merged else {"average", "best"} if alone else set()
    if subject is None:
        return {}
    return {n: paired_difference(subject, rival, seed=seed) for n, rival in rivals.items() if n not in left_out}
