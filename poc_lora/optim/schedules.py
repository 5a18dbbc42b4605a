"""Learning-rate schedules as pure functions of the step."""


def learning_rate(schedule: str, step: int, *, peak: float, warmup_steps: int, total_steps: int) -> float:
    """The rate of optimizer step `step` (from 0): a linear rise over `warmup_steps`, then the schedule.

    `linear` falls to zero at `total_steps`, `constant` stays at `peak`. As in transformers, step 0 of a
    warm-up has rate 0.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    if schedule == "constant":
        return peak
    return peak * max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))
