"""Problems to learn: samples with targets, a loss, and where two networks are compared.

A problem of your own is a function that returns a `Problem`; see `multi_index` for a short one. The paper's sizes and
noise levels are not known to us. Ours are chosen so that a network of a few hundred neurons learns them in minutes on a
CPU; each says why.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from poc_lora import rng
from poc_lora.mfnn.model import LOGISTIC, SQUARED, Loss


@dataclass(frozen=True)
class Problem:
    """Training and test samples, and the inputs at which networks are compared in sup norm.

    inputs: [n, d]; targets: [n]; test_inputs: [n', d]; test_targets: [n'], free of noise; probe: [n'', d].
    """

    name: str
    loss: Loss
    inputs: Tensor
    targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor
    probe: Tensor

    @property
    def dim(self) -> int:
        return self.inputs.shape[1]


def double_circle(
    samples: int = 500, *, radii: tuple[float, float] = (1.0, 2.0), noise: float = 0.1, seed: int = 0
) -> Problem:
    """Points on two concentric circles, label +1 on the inner and −1 on the outer one, split 80/20; logistic loss.

    Gaussian `noise` of a tenth of the gap between the circles keeps the classes apart, so that what is compared is the
    fit, not luck with labels. Probe: a 41 × 41 grid on the square that holds both circles.
    """
    label = torch.ones(samples)
    label[samples // 2 :] = -1.0
    angle = 2 * math.pi * rng.uniform((samples,), rng.key(seed, 0, "double circle", name="angle"))
    radius = torch.where(label > 0, torch.tensor(radii[0]), torch.tensor(radii[1]))
    points = radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    points += noise * rng.normal((samples, 2), rng.key(seed, 0, "double circle", name="noise"))
    order = rng.permutation(samples, rng.key(seed, 0, "double circle", name="split"))
    train, test = order[: samples * 4 // 5], order[samples * 4 // 5 :]
    side = torch.linspace(-1.25 * max(radii), 1.25 * max(radii), 41)
    return Problem(
        name="double circle",
        loss=LOGISTIC,
        inputs=points[train],
        targets=label[train],
        test_inputs=points[test],
        test_targets=label[test],
        probe=torch.cartesian_prod(side, side),
    )


def multi_index(
    samples: int = 500, dim: int = 10, directions: int = 3, *, tests: int = 1000, noise: float = 0.1, seed: int = 0
) -> Problem:
    """y = k^(-1/2) Σ_j sin(<θ_j, z>) + noise with k orthonormal directions θ_j; squared loss.

    Inputs are uniform in the ball of radius sqrt(d + 2), where each coordinate has variance 1. The targets' standard
    deviation is about 0.66, so `noise` is a seventh of it: small, and enough that fitting it is a mistake. Probe: the
    test inputs.
    """
    theta, _ = torch.linalg.qr(rng.normal((dim, directions), rng.key(seed, 0, "multi index", name="directions")))
    points = rng.normal((samples + tests, dim), rng.key(seed, 0, "multi index", name="direction of z"))
    radius = rng.uniform((samples + tests, 1), rng.key(seed, 0, "multi index", name="radius")) ** (1 / dim)
    points = math.sqrt(dim + 2) * radius * points / points.norm(dim=1, keepdim=True)
    targets = torch.sin(points @ theta).sum(1) / math.sqrt(directions)
    noisy = targets + noise * rng.normal((samples + tests,), rng.key(seed, 0, "multi index", name="noise"))
    return Problem(
        name="multi-index regression",
        loss=SQUARED,
        inputs=points[:samples],
        targets=noisy[:samples],
        test_inputs=points[samples:],
        test_targets=targets[samples:],
        probe=points[samples:],
    )


def linear(samples: int, dim: int, *, seed: int = 0) -> Problem:
    """y = <θ, z> + noise for the solvable analogue, in float64; z is Gaussian, its coordinates' deviations 1.5 to 0.5.

    They differ so that the modes do: see poc_lora.mfnn.gaussian. Test samples and probe are the training samples.
    """
    points = rng.normal((samples, dim), rng.key(seed, 0, "linear", name="inputs")).double()
    points *= torch.linspace(1.5, 0.5, dim, dtype=torch.float64)
    theta = 1 + rng.uniform((dim,), rng.key(seed, 0, "linear", name="direction")).double()
    targets = points @ theta + 0.1 * rng.normal((samples,), rng.key(seed, 0, "linear", name="noise")).double()
    return Problem("linear regression", SQUARED, points, targets, points, targets, points)
