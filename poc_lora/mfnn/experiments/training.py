"""How the experiments train networks and look at them: as outputs at a problem's probe inputs."""

from torch import Tensor

from poc_lora.mfnn.experiments.settings import DoubleCircleAt, StartedMultiIndex
from poc_lora.mfnn.langevin import train
from poc_lora.mfnn.model import outputs

REFERENCE = range(1_000_000, 1_000_001)  # the one network that stands for the limit: none of the merged ones


def trained_outputs(
    section: DoubleCircleAt | StartedMultiIndex, networks: range, width: int, *, temperature: float, seed: int
) -> Tensor:
    """Train networks of `width` neurons on a section's problem; returns their outputs [M, n] at the probe inputs."""
    problem = section.problem(seed)
    objective = section.objective(problem)
    particles = train(
        objective,
        networks,
        width,
        steps=section.steps,
        lr=section.lr,
        temperature=temperature,
        seed=seed,
        initial_std=section.initial_std,
    )
    return outputs(objective.neuron, particles, problem.probe)
