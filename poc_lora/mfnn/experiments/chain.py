"""The chain of linear neurons against its law, and its ensembles' error against the split that is known exactly."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from poc_lora.mfnn import problems
from poc_lora.mfnn.ensemble import mean_and_error
from poc_lora.mfnn.experiments.settings import Chain
from poc_lora.mfnn.gaussian import Gaussian, Modes, from_samples
from poc_lora.mfnn.langevin import train
from poc_lora.mfnn.model import Linear, Objective


@dataclass(frozen=True)
class Snapshot:
    """Particles [M, N, d] of M networks in the basis of Σ's eigenvectors, and the law they should have."""

    particles: Tensor
    law: Modes


def simulate(settings: Chain, width: int, *, seed: int) -> tuple[Gaussian, dict[str, Snapshot]]:
    """The analogue, and snapshots "early" and "late" of networks trained as any other network is."""
    problem = problems.linear(settings.samples, settings.dim, seed=seed)
    case, vectors = from_samples(problem.inputs, problem.targets, settings.regularization, settings.temperature)
    objective = Objective(Linear(problem.dim), problem.loss, problem.inputs, problem.targets, settings.regularization)
    times = {"early": settings.early_steps, "late": settings.steps}
    found = {}

    def keep(step: int, particles: Tensor) -> None:
        for name, when in times.items():
            if step == when:
                found[name] = Snapshot(particles @ vectors, case.chain(settings.lr, step, settings.initial_std))

    train(
        objective,
        range(settings.networks),
        width,
        steps=settings.steps,
        lr=settings.lr,
        temperature=settings.temperature,
        seed=seed,
        initial_std=settings.initial_std,
        log_at=list(times.values()),
        on_log=keep,
    )
    return case, found


def law_rows(snapshot: Snapshot, time: str) -> list[dict[str, Any]]:
    """Measured mean, variances and correlation in every direction, beside the chain's law: one row for each direction.

    The z-scores are (measured − law) / (standard error of the measurement under the law); with M networks of N
    neurons the errors are sqrt(along/(NM)) for the mean of x̄, along · sqrt(2/M) and across · sqrt(2/(M(N−1))) for the
    variances.
    """
    x, law = snapshot.particles, snapshot.law
    networks, width, dim = x.shape
    mean = x.mean(1)
    along = width * (mean - law.mean).square().mean(0)
    across = (x - mean[:, None]).square().sum((0, 1)) / (networks * (width - 1))
    z_mean = (mean.mean(0) - law.mean) / (law.along / (width * networks)).sqrt()
    z_along = (along / law.along - 1) * math.sqrt(networks / 2)
    z_across = (across / law.across - 1) * math.sqrt(networks * (width - 1) / 2)
    measured = Gaussian.correlation(Modes(law.mean, along, across), width)
    return [
        {
            "time": time,
            "N": width,
            "direction": k,
            "mean": mean[:, k].mean().item(),
            "mean_law": law.mean[k].item(),
            "mean_z": z_mean[k].item(),
            "along": along[k].item(),
            "along_law": law.along[k].item(),
            "along_z": z_along[k].item(),
            "across": across[k].item(),
            "across_law": law.across[k].item(),
            "across_z": z_across[k].item(),
            "correlation": measured[k].item(),
            "correlation_law": Gaussian.correlation(law, width)[k].item(),
            # of `along` alone: `across` is an average over N − 1 times as many numbers
            "correlation_standard_error": (law.along[k] / law.across[k] * math.sqrt(2 / networks) / width).item(),
        }
        for k in range(dim)
    ]


def split_rows(case: Gaussian, snapshots: dict[str, Snapshot], members: tuple[int, ...]) -> list[dict[str, Any]]:
    """Squared error of merges of M networks to the limit, measured and as known: one row for each quantity and M.

    "early" and "late" prediction: E_z (h_merged − h_μ*)² when training stopped early, and at stationarity. "late"
    spread: (Q_merged − Q_limit)² for the neurons' mean squared distance Q from m*, Q_limit being that of infinitely
    many neurons under the same step size.
    """
    rows = []
    for time, snapshot in snapshots.items():
        rows += _rows(case, snapshot, time, "prediction", members)
    return rows + _rows(case, snapshots["late"], "late", "spread", members)


def _rows(
    case: Gaussian, snapshot: Snapshot, time: str, quantity: str, members: tuple[int, ...]
) -> list[dict[str, Any]]:
    x, law = snapshot.particles, snapshot.law
    width = x.shape[1]
    if quantity == "prediction":
        each = x.mean(1)
        variance, squared_bias = case.prediction_split(law, width)
    else:
        each = (x - case.mean).square().sum(2).mean(1, keepdim=True)
        variance, squared_bias = case.spread_split(law, width, about=law)
    rows = []
    for m in members:
        merged = each[: len(each) // m * m].view(-1, m, each.shape[1]).mean(1)
        if quantity == "prediction":
            errors = ((merged - case.mean).square() * case.sigma).sum(1)
        else:
            errors = (merged[:, 0] - law.across.sum()).square()
        mean, error = mean_and_error(errors)
        rows.append(
            {
                "time": time,
                "quantity": quantity,
                "N": width,
                "M": m,
                "error": mean,
                "standard_error": error,
                "known": variance / m + squared_bias,
                "known_floor": squared_bias,
            }
        )
    return rows
