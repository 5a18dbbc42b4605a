"""Lines of metrics.jsonl: what training logs, and a report draws."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError

from poc_lora.artifacts.schema import LARGEST, Schema
from poc_lora.config import MAX_ADAPTERS
from poc_lora.errors import RunError
from poc_lora.files import read_text

Whole = Annotated[int, Field(strict=True, ge=0, le=2**40)]
Adapter = Annotated[int, Field(strict=True, ge=0, lt=MAX_ADAPTERS)]


def _drawable(value: Any) -> Any:
    """None for what cannot be drawn, such as NaN and infinity, which a diverging run logs."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and abs(value) <= LARGEST else None


Measure = Annotated[float | None, BeforeValidator(_drawable)]


class MetricsLine(Schema):
    """A step of an adapter, its divergence, or a validation.

    Attributes:
        step: Optimizer steps done.
        adapter: The adapter's number; in a validation also the base, the merge of `members`, or that of the best of
            them, which are `merges`.
        diverged: True in the line of the step at which the adapter was dropped, since its loss, gradient or weights
            were no longer finite.
        loss: The training loss per supervised token.
        grad_norm: The norm of the gradient before clipping.
        noise_norm: The norm of the noise that the step added.
        lr: The step's learning rate.
        validation_loss: The loss per token of the held-out rows' answers.
        row_losses: The loss of each held-out row, summed over its answer.
        row_tokens: The tokens of each held-out row's answer; in the base's line.
        mean_cosine: Of the pairs of adapters. This and the rest are of the merge, as in merge.json.
        cosines: Of all pairs [members, members].
        members: The adapters that were validated together.
        merges: Those in `merge_of_best`.
        kept: Whether this validation, after the last step, is of the weights that `train.keep: best` chose.
    """

    step: Whole
    adapter: Adapter | Literal["base", "merge", "merge_of_best"]
    diverged: Literal[True] | None = None
    loss: Measure = None
    grad_norm: Measure = None
    noise_norm: Measure = None
    lr: Measure = None
    validation_loss: Measure = None
    row_losses: list[Measure] | None = None
    row_tokens: list[Whole] | None = None
    mean_cosine: Measure = None
    variance: Measure = None
    merge_variance: Measure = None
    relative_standard_error: Measure = None
    cosines: list[list[Measure]] | None = None
    members: list[Adapter] | None = None
    merges: list[Adapter] | None = None
    kept: Literal[True] | None = None


def read_metrics(path: Path, *, max_bytes: int) -> Iterator[tuple[str, MetricsLine]]:
    """Read each line, as text and parsed; malformed lines, which a killed run may leave, are skipped."""
    for text in read_text(path, error=RunError, max_bytes=max_bytes).splitlines():
        try:
            yield text, MetricsLine.model_validate_json(text)
        except ValidationError:
            continue
