"""results.json: the accuracies that an evaluation measured."""

import math
from typing import Annotated, Any, ClassVar, NamedTuple, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from poc_lora.artifacts.schema import Artifact, Count, Finite, Number, OrNan, Public, Schema, Share
from poc_lora.config import MAX_ADAPTERS, MAX_RANK
from poc_lora.data.commonsense import MAX_BENCHMARKS, OWN_NAME

MAX_TRUNCATED = 64  # ranks that a merge is scored at


def _is_error(value: float) -> float:
    if value < 0 or math.isinf(value):
        raise ValueError(f"a standard error of {value}")
    return value


Accuracy = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
StandardError = Annotated[OrNan, AfterValidator(_is_error)]


class Estimate(NamedTuple):
    """A value and its standard error; the error is NaN where one question is too few to tell."""

    value: Accuracy
    error: StandardError


class Measure(NamedTuple):
    """A value that is no share, such as a loss, and its standard error."""

    value: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    error: StandardError


class Difference(Schema):
    """A paired difference of macro averages with its 95 % bootstrap interval and two-sided p-value.

    `detectable` is the smallest difference that as many questions, answered as differently, show in 80 % of evaluations
    at the 5 % level; None if no answer differed, and in older files.
    """

    value: Public[Finite]
    low: Public[Finite]
    high: Public[Finite]
    p: Public[Finite]
    detectable: Public[Number | None] = None


class Calibration(Schema):
    """Log loss, Brier score and expected calibration error of one variant: see `poc_lora.evaluation.calibration`."""

    nll: Public[Measure]
    brier: Public[Measure]
    ece: Public[Measure]


class Scored(Schema):
    """The accuracy of one variant: by benchmark folder, and their plain average.

    `per_byte` has those of benchmarks with choices of free text, chosen by log-probability per byte; the average is of
    the plain ones.
    """

    benchmarks: Public[dict[str, Estimate]]
    average: Public[Estimate]
    per_byte: Public[dict[str, Estimate]] = Field(default_factory=dict)


class TruncatedMerge(Scored):
    """The best approximation of the merge of rank `rank`, and what it loses.

    Attributes:
        bytes: Of its factors as an adapter in float32.
        error: The largest relative error of a module, ‖ΔW − ΔW_r‖ / ‖ΔW‖.
        difference: Its accuracy minus that of the merge.
    """

    rank: Public[Annotated[int, Field(gt=0, le=MAX_RANK)]]
    bytes: Public[Count]
    error: Public[Share]
    difference: Public[Difference]


def _not_of_one_rank(value: Any) -> Any:
    """Refuse the field of versions that scored one rank at most; without a rank it was null."""
    if isinstance(value, dict):
        raise ValueError("the merge at one rank, as an earlier version wrote it")
    return [] if value is None else value


class SubsetPoint(Schema):
    """All merges of m of the adapters: see `poc_lora.evaluation.subsets`."""

    m: Public[Annotated[int, Field(gt=0, le=2**31)]]
    subsets: Public[Count]
    accuracy: Public[Share]
    error: Public[StandardError]
    distance: Public[Number | None]


class VarianceLaw(Schema):
    """The fit of distance = c (1/m − 1/M) + floor, and the share of the variance that it explains."""

    c: Public[Number]
    floor: Public[Number]
    explained: Public[OrNan] = math.nan


class Subsets(Schema):
    """How accuracy and the distance from the merge of all depend on the number of adapters merged.

    With `limit`, on the first so many questions of each benchmark.
    """

    points: Public[Annotated[list[SubsetPoint], Field(min_length=1)]]
    variance_law: Public[VarianceLaw | None]
    limit: Public[Count | None] = None


class Results(Artifact):
    """Everything the paper's table needs. Accuracies are shares of 1, in the paper's order of benchmarks.

    Attributes:
        limit: Only the first so many questions of each benchmark were asked.
        questions: The number of questions by benchmark.
        questions_sha256: Of all that the questions, their options and answers are; None in older files.
        too_long: Questions that do not fit the context. They count as wrong; the protocol `harness` scores them with
            their prompts cut.
        groups: The number of groups by benchmark, where questions name groups: those of one are taken as one sample.
        chance: The accuracy of guessing.
        best: The adapter of the largest average, chosen on `best_chosen_on`: a validation split, or, as in the paper,
            the test questions themselves, which flatters it. Empty for a model without adapters.
        average: The mean over adapters; for a model without adapters its own.
        merged: The run's merged/ or, with `exact_average`, the exact average of the adapters, which is in no folder.
            None for one adapter without a merge.
        merged_adapters: How many adapters that merge is made of: `poc-lora merge` may leave some out. None where there
            is no merge, or it does not say, and in older files.
        ensemble: None for fewer than two adapters, and where there is only generated text.
        comparisons: The merge minus `best`, `average` and `control`.
        agreement: How often merge and ensemble choose the same label; NaN where no question fits.
        unread: By variant, the share of generated answers without a label; NaN where no question fits.
        control: The merge of another run.
        subsets: See `poc_lora.evaluation.subsets`.
        truncated: The best approximations of the merge of smaller ranks, in increasing order.
        merged_rank, merged_bytes: Where there are such: the merge's own rank, the largest of a module, and its size.
        calibration: Of `base`, `best`, `merged` and `ensemble`, where every label has a probability.
        calibration_of_adapters: The same of every adapter, by its name.
    """

    content: ClassVar[str] = "the results of an evaluation"
    fix: ClassVar[str] = "evaluate again"

    base_model: Public[str]
    prompt: Public[str]
    limit: Public[Count | None]
    questions: Public[dict[str, Count]]
    questions_sha256: Public[str | None] = None
    too_long: Public[dict[str, Count]]
    groups: Public[dict[str, Count]] = Field(default_factory=dict)
    chance: Public[dict[str, Share]]
    base: Public[Scored]
    adapters: Public[Annotated[dict[str, Scored], Field(max_length=MAX_ADAPTERS)]]
    best: Public[str]
    average: Public[Scored]
    merged: Public[Scored | None]
    ensemble: Public[Scored | None]
    comparisons: Public[dict[str, Difference]]
    agreement: Public[OrNan | None]
    protocol: Public[str] = "label"
    best_chosen_on: Public[str] = "test"
    unread: Public[dict[str, OrNan]] = Field(default_factory=dict)
    control: Public[Scored | None] = None
    control_name: Public[str | None] = None
    subsets: Public[Subsets | None] = None
    exact_average: Public[bool] = False
    merged_adapters: Public[Count | None] = None
    truncated: Public[
        Annotated[list[TruncatedMerge], Field(max_length=MAX_TRUNCATED), BeforeValidator(_not_of_one_rank)]
    ] = Field(default_factory=list)
    merged_rank: Public[Count | None] = None
    merged_bytes: Public[Count | None] = None
    calibration: Public[dict[str, Calibration]] = Field(default_factory=dict)
    calibration_of_adapters: Public[dict[str, Calibration]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _agree(self) -> Self:
        asked = self.questions.keys()
        if not asked or len(asked) > MAX_BENCHMARKS:
            raise ValueError("no benchmark, or too many")
        if not all(OWN_NAME.fullmatch(name) for name in asked):
            raise ValueError("a name that no benchmark can have")
        if self.best not in (self.adapters or {""}):  # a model without adapters has no best one
            raise ValueError("the best adapter is not among the adapters")
        rows = [
            self.base,
            self.average,
            self.merged,
            self.ensemble,
            self.control,
            *self.truncated,
            *self.adapters.values(),
        ]
        known = [self.too_long.keys(), self.chance.keys(), *(row.benchmarks.keys() for row in rows if row)]
        if not all(asked <= benchmarks for benchmarks in known):
            raise ValueError("benchmarks without an accuracy, a chance level or a count")
        per_byte = [row.per_byte.keys() for row in (self.base, self.average, *self.adapters.values())]
        if not all(names == self.base.per_byte.keys() for names in per_byte) or not self.base.per_byte.keys() <= asked:
            raise ValueError("accuracies per byte of some variants alone")
        ranks = [one.rank for one in self.truncated]
        if ranks and (self.merged is None or self.merged_rank is None or self.merged_bytes is None):
            raise ValueError("a truncated merge without the merge, its rank and its size")
        if ranks != sorted({*ranks}) or (self.merged_rank is not None and max(ranks, default=0) > self.merged_rank):
            raise ValueError("ranks that do not increase, or above the merge's own")
        return self
