"""study.json: several training runs as one study. controls.json: that study beside rivals of equal cost."""

from typing import ClassVar

from poc_lora.artifacts.schema import Artifact, Count, Number, OrNan, Schema


class OverRuns(Schema):
    """A figure of several runs.

    Attributes:
        mean: Over the runs.
        half_width: Of its 95 % Student-t interval over the runs; NaN for one run.
        values: Each run's, in order.
    """

    mean: Number
    half_width: OrNan
    values: list[Number]


class RunDifference(Schema):
    """A difference of means over runs; `paired` says whether it was taken within each run, else by Welch's interval."""

    mean: Number
    half_width: OrNan
    paired: bool


class Study(Artifact):
    """Runs that differ in the seed, as one study.

    Accuracies are shares of 1, losses in nats; the held-out loss is that of the last validation, per answer token.

    Attributes:
        runs: Their folders.
        adapters: How many adapters each has.
        base_model: The base that was evaluated, or trained on where nothing was evaluated.
        best_chosen_on: What LoRA (best) was chosen on: `validation` or `test` questions; None without benchmarks.
        trained_on: Whether a run was trained on a file of the rows that it is scored on.
        differ_in: The settings in which the runs differ besides the seed.
        measures: By measure (`accuracy`, `nll`, `rows_loss`, `held_out_loss`) and variant (`base`, `average`, `best`,
            `merged`, `ensemble`); only what every run has.
        differences: By measure and pair of variants, such as `merged - best`, taken within each run.
    """

    content: ClassVar[str] = "a study of several runs"
    fix: ClassVar[str] = "make it again: poc-lora eval --study RUN RUN ..."

    runs: list[str]
    adapters: Count
    base_model: str
    best_chosen_on: str | None
    trained_on: bool = False
    differ_in: list[str]
    measures: dict[str, dict[str, OverRuns]]
    differences: dict[str, dict[str, OverRuns]]


class Rival(Schema):
    """What else was trained from the same configuration.

    Attributes:
        meaning: How it differs, in words.
        runs: Its run folders.
        merged: Whether its figures are those of each run's merge, else of each single adapter.
        tokens: Training tokens of one merge or adapter, without padding.
        seconds: Training time of each run, divided by its adapters where these are the repetitions.
        measures: By measure, as in Study.
        differences: By measure, the merge of the pack minus this rival.
    """

    meaning: str
    runs: list[str]
    merged: bool
    tokens: Count
    seconds: OverRuns
    measures: dict[str, OverRuns]
    differences: dict[str, RunDifference]


class Controls(Artifact):
    """The merge of packs beside rivals of equal cost.

    Attributes:
        pack: The study of the packs.
        tokens, seconds: Of one pack, as in Rival.
        rivals: By name.
        left_out: By name, why a rival was not trained.
    """

    content: ClassVar[str] = "a comparison with rivals of equal cost"
    fix: ClassVar[str] = "make it again: poc-lora controls CONFIG --out DIR"

    pack: Study
    tokens: Count
    seconds: OverRuns
    rivals: dict[str, Rival]
    left_out: dict[str, str]
