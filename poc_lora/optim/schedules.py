"""Learning-rate schedules as pure functions of the step."""


def learning_rate(schedule: str, step: int, *, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Returns the learning rate of an optimizer step, as transformers' schedules do.

    Args:
        schedule: `linear`, which falls to zero at `total_steps`, or `constant`.
        step: The step, from 0.
        peak: The learning rate after warm-up.
        warmup_steps: Steps of linear warm-up from 0.
        total_steps: The steps of the whole run.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    if schedule == "constant":
        return peak
    return peak * max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))
