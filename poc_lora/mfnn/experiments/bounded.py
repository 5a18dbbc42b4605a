"""Bounded neurons against the limit: does the constant of the 1/N rate blow up as λ falls?"""

from typing import Any

from torch import Tensor

from poc_lora.mfnn.ensemble import mean_and_error, squared_l2
from poc_lora.mfnn.experiments.settings import Bounded
from poc_lora.mfnn.langevin import train
from poc_lora.mfnn.model import outputs

REFERENCE = 1_000_000  # the number of the network that stands for the limit


def trained_outputs(
    settings: Bounded, temperature: float, width: int, *, seed: int, reference: bool = False
) -> dict[str, Any]:
    """Outputs [M, n] at the test inputs after training; of the one reference network if `reference`."""
    section = settings.multi_index
    problem = section.problem(seed)
    objective = section.objective(problem)
    particles = train(
        objective,
        range(REFERENCE, REFERENCE + 1) if reference else range(settings.networks),
        width,
        steps=section.steps,
        lr=section.lr,
        temperature=temperature,
        seed=seed,
        initial_std=section.initial_std,
    )
    return {"outputs": outputs(objective.neuron, particles, problem.probe).tolist()}


def error_row(temperature: float, width: int, h: Tensor, limit: Tensor) -> dict[str, Any]:
    """Squared L2 error of single networks to the limit, of the merge of all, and N times the single one.

    h: [M, n]; limit: [n]. The limit is a network of finitely many neurons after the same number of steps; its own error
    is part of what is shown, a share of about N over its width.
    """
    single, error = mean_and_error(squared_l2(h, limit))
    return {
        "temperature": temperature,
        "N": width,
        "error": single,
        "standard_error": error,
        "N_times_error": width * single,
        "N_times_standard_error": width * error,
        "merged_error": squared_l2(h.mean(0), limit).item(),
        "M": len(h),
    }
