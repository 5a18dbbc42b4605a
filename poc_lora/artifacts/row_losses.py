"""rows.json: the losses of a base, its adapters, their merge and ensemble on rows with answers."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from poc_lora.artifacts.schema import MAX_COUNT, Artifact, Count, Number, Public, Schema
from poc_lora.config import MAX_ADAPTERS

MAX_TEXTS = 1000  # rows whose answers are generated


Variant = Literal["base", "best", "merged"]


class RowTexts(Schema):
    """What some variants write, greedily, in place of the last answer of the first n rows. It is never uploaded.

    Attributes:
        match: The regular expression by whose last match text and answer are compared; None compares them whole.
        prompts: The end of the text before each answer [n].
        answers: The rows' own [n].
        best: The adapter that is among the variants, which had the lowest loss on all rows; empty if there is none.
        variants: What each wrote [n], by `base`, `best` and `merged`; None where the prompt leaves no room.
        right: Whether that matched the answer [n].
    """

    match: str | None
    prompts: Annotated[list[str], Field(min_length=1, max_length=MAX_TEXTS)]
    answers: list[str]
    best: str
    variants: dict[Variant, list[str | None]]
    right: dict[Variant, list[bool]]

    @model_validator(mode="after")
    def _agree(self) -> Self:
        lengths = [len(self.answers), *map(len, self.variants.values()), *map(len, self.right.values())]
        if any(n != len(self.prompts) for n in lengths) or self.variants.keys() != self.right.keys():
            raise ValueError("not a text for each row")
        return self


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
        merged_adapters: As in Results.
        trained_on: Whether a file of these rows is among those that the run was trained on.
        texts: What the variants write in place of some answers, if that was asked for.
        adapter_digests: As in TaskResults; empty in older files.
        asked: A digest of the rows and of how they were scored; None where rows came from the Hub, and in older files.
        measured: A digest of all that the losses depend on; None where `asked` is.
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
    merged_adapters: Public[Count | None] = None
    trained_on: Public[bool] = False
    texts: RowTexts | None = None
    adapter_digests: Annotated[dict[str, str], Field(max_length=MAX_ADAPTERS + 1)] = Field(default={})
    asked: str | None = None
    measured: str | None = None

    @model_validator(mode="after")
    def _agree(self) -> Self:
        found = [self.base, self.merged, self.ensemble, *self.adapters.values()]
        if any(losses is not None and len(losses) != len(self.tokens) for losses in found):
            raise ValueError("not a loss for each row")
        return self
