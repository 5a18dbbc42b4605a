"""How the experiments train networks and look at them: as outputs at a problem's test inputs."""

from collections.abc import Callable, Sequence

from torch import Tensor

from poc_lora.mfnn.experiments.settings import Started, Training
from poc_lora.mfnn.langevin import steps_per_epoch, train
from poc_lora.mfnn.model import outputs
from poc_lora.mfnn.problems import Problem

REFERENCE = range(1_000_000, 1_000_001)  # the one network that stands for the limit: none of the merged ones


def trained(
    section: Training,
    problem: Problem,
    networks: range,
    width: int,
    *,
    temperature: float,
    initial_std: float,
    seed: int,
    log_epochs: Sequence[int] = (),
    on_epoch: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Train networks of `width` neurons as a section says; returns their particles [M, N, P].

    `on_epoch` is called with each of `log_epochs` and the particles after it; 0 is the start.
    """
    each = steps_per_epoch(len(problem.inputs), section.batch_size)
    return train(
        section.objective(problem),
        networks,
        width,
        steps=each * section.epochs,
        lr=section.lr,
        temperature=temperature,
        seed=seed,
        batch_size=section.batch_size,
        initial_std=initial_std,
        log_at=[each * epoch for epoch in log_epochs],
        on_log=None if on_epoch is None else lambda step, particles: on_epoch(step // each, particles),
    )


def trained_outputs(section: Started, networks: range, width: int, *, temperature: float, seed: int) -> Tensor:
    """Train networks of `width` neurons on a section's problem; returns their outputs [M, n'] at the test inputs."""
    problem = section.problem(seed)
    particles = trained(
        section, problem, networks, width, temperature=temperature, initial_std=section.initial_std, seed=seed
    )
    return outputs(section.neuron(problem.dim), particles, problem.test_inputs)
