"""tasks.json: the metrics that lm-eval's tasks gave, and beside it a file for each variant and task."""

from typing import Annotated, ClassVar, NamedTuple, Self

from pydantic import Field, model_validator

from poc_lora.artifacts.results import Difference, StandardError
from poc_lora.artifacts.schema import Artifact, Count, Number, OrNan, Public, Schema
from poc_lora.config import MAX_ADAPTERS

MAX_TASKS = 10_000


class Score(NamedTuple):
    """The value of a metric, and lm-eval's standard error; NaN where it gives none."""

    value: OrNan
    error: StandardError


class TaskScore(Artifact):
    """What lm-eval found for one variant on one task: VARIANT/TASK.json.

    Attributes:
        key: A hash of all that it depends on.
        documents: How many were asked.
        truncated: Of how many the prompt was cut at its start to fit the context, as lm-eval does.
        metrics: By lm-eval's key, "METRIC,FILTER".
        scores: Of each document, for metrics that are the mean of theirs.
    """

    content: ClassVar[str] = "the scores of a task"
    fix: ClassVar[str] = "remove it and evaluate again"

    key: str
    documents: Count
    truncated: Count
    metrics: dict[str, Score]
    scores: dict[str, list[Number]]


class Metric(Schema):
    """A metric of one task or group, of every variant.

    Attributes:
        higher_is_better: None where the task does not say.
        average: The mean over adapters; None without adapters.
        best: The adapter with the best value, which these very documents chose; empty without adapters.
        comparisons: The merge, or the one adapter where there is no merge, minus `base`, `best` and `average`, for
            metrics that are means over documents.
    """

    higher_is_better: Public[bool | None]
    base: Public[Score]
    adapters: Public[Annotated[dict[str, Score], Field(max_length=MAX_ADAPTERS)]]
    average: Public[Score | None]
    merged: Public[Score | None]
    best: Public[str]
    comparisons: Public[dict[str, Difference]]


class Task(Schema):
    """A task, or a group of tasks.

    Attributes:
        listed: Whether it was asked for by name; the others are members of a group.
        version: As lm-eval states it.
        fewshot: The number of examples before each question; None for a group.
        documents, truncated: As in TaskScore; the most over variants.
    """

    listed: Public[bool]
    version: Public[str]
    fewshot: Public[Count | None]
    documents: Public[Count]
    truncated: Public[Count]
    metrics: Public[dict[str, Metric]]


class TaskResults(Artifact):
    """The metrics of every task, groups before their members.

    Attributes:
        base_model, limit, exact_average: As in Results.
        apply_chat_template: Whether prompts were in the chat template.
        lm_eval: Its version.
        adapter_digests: By variant a hash of the adapter's weights and configuration, of variants that have a folder.
    """

    content: ClassVar[str] = "the results of lm-eval's tasks"
    fix: ClassVar[str] = "evaluate again"

    base_model: Public[str]
    lm_eval: Public[str]
    limit: Public[Count | None]
    exact_average: Public[bool]
    apply_chat_template: Public[bool] = False
    adapter_digests: Annotated[dict[str, str], Field(max_length=MAX_ADAPTERS + 1)] = Field(default={})
    tasks: Public[Annotated[dict[str, Task], Field(min_length=1, max_length=MAX_TASKS)]]

    def of_adapter(self, name: str) -> Self:
        """Returns the results of one of several adapters, as if it had been evaluated alone."""
        tasks = {}
        for task_name, task in self.tasks.items():
            own = {
                key: metric.model_copy(
                    update={
                        "adapters": {name: metric.adapters[name]},
                        "average": metric.adapters[name],
                        "best": name,
                        "merged": None,
                        "comparisons": {},
                    }
                )
                for key, metric in task.metrics.items()
                if name in metric.adapters
            }
            tasks[task_name] = task.model_copy(update={"metrics": own})
        return self.model_copy(update={"tasks": tasks, "exact_average": False})

    @model_validator(mode="after")
    def _agree(self) -> Self:
        metrics = [metric for task in self.tasks.values() for metric in task.metrics.values()]
        variants = {(frozenset(m.adapters), m.average is None, m.merged is None) for m in metrics}
        if len(variants) > 1:
            raise ValueError("metrics of some variants alone")
        if any(m.best not in (m.adapters or {""}) or (m.average is None) == bool(m.adapters) for m in metrics):
            raise ValueError("the best adapter is not among the adapters")
        return self
