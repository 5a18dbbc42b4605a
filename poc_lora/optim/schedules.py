"""Learning-rate schedules as pure functions of the step."""

from typing import Literal

MAX_WARMUP_STEPS = 100


def warmup_length(warmup_steps: int | Literal["auto"], total_steps: int) -> int:
    """Returns the steps of warm-up; `auto` stands for a tenth of all steps, at most 100."""
    return min(MAX_WARMUP_STEPS, total_steps // 10) if warmup_steps == "auto" else warmup_steps


def learning_rate(
    schedule: str, step: int, *, peak: float, warmup_steps: int | Literal["auto"], total_steps: int
) -> float:
    """Returns the learning rate of an optimizer step.

    With a number of `warmup_steps` it is that of transformers' schedules, whose first step of warm-up has the rate 0
    and changes nothing. With `auto` the first step trains too: the rates rise by equal amounts from above 0.

    Args:
        schedule: `linear`, which falls to zero at `total_steps`, or `constant`.
        step: The step, from 0.
        peak: The learning rate after warm-up.
        warmup_steps: Steps of linear warm-up, or `auto`: see `warmup_length`.
        total_steps: The steps of the whole run.
    """
    length = warmup_length(warmup_steps, total_steps)
    if step < length:
        return peak * (step + 1) / (length + 1) if warmup_steps == "auto" else peak * step / length
    if schedule == "constant":
        return peak
    return peak * max(0.0, (total_steps - step) / max(1, total_steps - length))
