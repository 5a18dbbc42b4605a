"""VARIANT.json: the accuracies of one variant of an evaluation, and what was evaluated."""

from typing import Any, ClassVar

from pydantic import Field

from poc_lora.artifacts.results import Accuracy, StandardError
from poc_lora.artifacts.schema import Artifact, Count, Schema


class VariantAccuracy(Schema):
    """A share of correct answers and its standard error, NaN where one question is too few to tell."""

    accuracy: Accuracy
    error: StandardError


class BenchmarkAccuracy(VariantAccuracy):
    """The same on one benchmark, with its number of questions."""

    questions: Count


class VariantScores(Artifact):
    """What is written beside results.json for each variant. It is not uploaded.

    Attributes:
        variant: `base`, `merged`, `rank-R`, `ensemble` or `adapter-NAME`; the file is named after it.
        source: The folder of the adapter; None for the base, the ensemble, the exact average and a truncated merge.
        adapter_digest: A hash of the adapter's weights and configuration; None where `source` is.
        base_model, prompt, protocol: As in Results.
        benchmarks: By benchmark folder.
        average: The plain mean over benchmarks.
        settings: Everything that the answers depend on apart from the questions; its `adapters` are digests.
    """

    content: ClassVar[str] = "the scores of a variant"
    fix: ClassVar[str] = "evaluate again"

    variant: str | None = None
    source: str | None = None
    adapter_digest: str | None = None
    base_model: str
    protocol: str
    prompt: str
    benchmarks: dict[str, BenchmarkAccuracy]
    average: VariantAccuracy
    settings: dict[str, Any] = Field(default_factory=dict)
