"""rows.json: the losses of a base, its adapters, their merge and ensemble on rows with answers."""

from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from poc_lora.artifacts.schema import MAX_COUNT, Artifact, Count, Number, Public
from poc_lora.config import MAX_ADAPTERS


class RowLosses(Artifact):
    """Losses on n rows, each summed over the tokens of the row's answers, in nats.

    Attributes:
        base_model, prompt: As in Results.
        truncated: Rows whose end was cut off.
        dropped: Rows left out, because all their answers were.
        tokens: How many tokens the answers of each row have [n].
        base, merged, ensemble: [n]; the ensemble's probability of a token is the mean of the adapters'.
        adapters: [n] of each adapter, by name.
        exact_average: Whether `merged` is the exact average of the adapters, which is in no folder.
        trained_on: Whether a file of these rows is among those that the run was trained on.
        measured: A digest of all that the losses depend on; None where rows came from the Hub, and in older files.
    """

    content: ClassVar[str] = "the losses on rows"
    fix: ClassVar[str] = "evaluate again"

    base_model: Public[str]
    prompt: Public[str]
    truncated: Public[Count]
    dropped: Public[Count]
    tokens: Public[Annotated[list[Annotated[int, Field(gt=0, le=MAX_COUNT)]], Field(min_length=1)]]
    base: Public[list[Number]]
    adapters: Public[Annotated[dict[str, list[Number]], Field(max_length=MAX_ADAPTERS)]]
    merged: Public[list[Number] | None]
    ensemble: Public[list[Number] | None]
    exact_average: Public[bool] = False
    trained_on: Public[bool] = False
    measured: str | None = None

    @model_validator(mode="after")
    def _agree(self) -> Self:
        found = [self.base, self.merged, self.ensemble, *self.adapters.values()]
        if any(losses is not None and len(losses) != len(self.tokens) for losses in found):
            raise ValueError("not a loss for each row")
        return self
