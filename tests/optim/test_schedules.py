"""Learning rates against those of transformers."""

import pytest
import torch
from transformers import get_constant_schedule_with_warmup, get_linear_schedule_with_warmup

from poc_lora.optim.schedules import learning_rate, warmup_length


def reference(schedule, peak, warmup_steps, total_steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    if schedule == "linear":
        scheduler = get_linear_schedule_with_warmup(optimizer, warmup_steps, total_steps)
    else:
        scheduler = get_constant_schedule_with_warmup(optimizer, warmup_steps)
    rates = []
    for _ in range(total_steps + 3):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("schedule", ["linear", "constant"])
@pytest.mark.parametrize(("warmup_steps", "total_steps"), [(0, 10), (3, 10), (1, 1), (10, 10), (20, 10), (100, 1000)])
def test_rates_are_those_of_transformers(schedule, warmup_steps, total_steps):
    expected = reference(schedule, 3e-4, warmup_steps, total_steps)
    ours = [
        learning_rate(schedule, step, peak=3e-4, warmup_steps=warmup_steps, total_steps=total_steps)
        for step in range(len(expected))
    ]
    assert ours == pytest.approx(expected, rel=1e-12, abs=0)


def test_the_linear_schedule_rises_from_zero_to_its_peak_and_falls_to_zero():
    rates = [learning_rate("linear", step, peak=1.0, warmup_steps=4, total_steps=12) for step in range(13)]
    assert rates[0] == 0
    assert rates[4] == max(rates) == 1
    assert rates[12] == 0
    assert rates[11] > 0  # the last step still trains


@pytest.mark.parametrize(
    ("total_steps", "length"), [(1, 0), (9, 0), (10, 1), (33, 3), (999, 99), (1000, 100), (50_000, 100)]
)
def test_auto_warms_up_for_a_tenth_of_the_steps_and_at_most_100(total_steps, length):
    assert warmup_length("auto", total_steps) == length
    assert warmup_length(7, total_steps) == 7


@pytest.mark.parametrize("total_steps", [1, 9, 10, 33, 1200])
def test_with_auto_every_step_trains_and_the_peak_is_reached(total_steps):
    rates = [
        learning_rate("linear", step, peak=2.0, warmup_steps="auto", total_steps=total_steps)
        for step in range(total_steps)
    ]
    length = warmup_length("auto", total_steps)
    assert min(rates) > 0
    assert rates[length] == max(rates) == 2
    assert rates[: length + 1] == pytest.approx([2 * (i + 1) / (length + 1) for i in range(length + 1)])
    assert rates[length:] == pytest.approx(
        [2 * (total_steps - i) / (total_steps - length) for i in range(length, total_steps)]
    )
