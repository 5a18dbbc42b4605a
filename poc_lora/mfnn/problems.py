"""Problems to learn: samples with targets, and a loss.

`double_circle` and `multi_index` are the paper's (Algorithms 1 and 2 of its Appendix B), with its values as defaults;
`sines` and `linear` are ours. A problem of your own is a function that returns a `Problem`; see `sines`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from poc_lora import rng
from poc_lora.errors import RequestError
from poc_lora.mfnn.model import LOGISTIC, MEAN_SQUARED_ERROR, SQUARED, Loss


@dataclass(frozen=True)
class Problem:
    """Training and test samples. Networks are compared at the test inputs.

    inputs: [n, d]; targets: [n]; test_inputs: [n', d]; test_targets: [n'], free of noise.
    """

    name: str
    loss: Loss
    inputs: Tensor
    targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor

    @property
    def dim(self) -> int:
        return self.inputs.shape[1]


def double_circle(samples: int = 200, *, noise: float = 0.1, seed: int = 0) -> Problem:
    """Points on two concentric circles, label −1 at radius 1 and +1 at radius 2, half each; logistic loss.

    Angles are uniform; each coordinate has Gaussian noise of standard deviation `noise`, as we read the paper's
    "parameter 0.1". Split 80/20 in random order.
    """
    label = torch.ones(samples)
    label[: samples // 2] = -1.0
    angle = 2 * math.pi * rng.uniform((samples,), rng.key(seed, 0, "double circle", name="angle"))
    radius = torch.where(label > 0, 2.0, 1.0)
    points = radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    points += noise * rng.normal((samples, 2), rng.key(seed, 0, "double circle", name="noise"))
    return _split("double circle", LOGISTIC, points, label, rng.key(seed, 0, "double circle", name="split"))


def multi_index(
    samples: int = 500,
    dim: int = 100,
    directions: int = 100,
    *,
    scale: float = 100.0,
    radius: float = 5.0,
    seed: int = 0,
) -> Problem:
    """y = (R̄/k) Σ_{j ≤ k} tanh(z_j), z uniform in the ball of `radius`, without noise; mean squared error.

    k is `directions` and R̄ `scale`. Split 80/20. The paper writes a point's radius as r ζ^(1/d) with ζ ~ Normal(0, 1),
    an erratum: a negative number has no such root, and uniform in the ball takes ζ ~ Uniform(0, 1), as here. Raises
    RequestError unless k <= d.
    """
    if directions > dim:
        raise RequestError(
            f"{directions} directions of {dim} coordinates", where="multi_index", fix="directions <= dim"
        )
    points = radius * _in_unit_ball(samples, dim, seed, "multi-index regression")
    targets = scale / directions * torch.tanh(points[:, :directions]).sum(1)
    key = rng.key(seed, 0, "multi-index regression", name="split")
    return _split("multi-index regression", MEAN_SQUARED_ERROR, points, targets, key)


def _split(name: str, loss: Loss, points: Tensor, targets: Tensor, key: int) -> Problem:
    """The samples in random order: four fifths to train on, one to test on."""
    order = rng.permutation(len(points), key)
    train, test = order[: len(points) * 4 // 5], order[len(points) * 4 // 5 :]
    return Problem(name, loss, points[train], targets[train], points[test], targets[test])


def _in_unit_ball(samples: int, dim: int, seed: int, purpose: str) -> Tensor:
    """Points uniform in the unit ball, [samples, dim]."""
    points = rng.normal((samples, dim), rng.key(seed, 0, purpose, name="direction of z"))
    radius = rng.uniform((samples, 1), rng.key(seed, 0, purpose, name="radius")).pow(1 / dim)
    return torch.nn.functional.normalize(points) * radius


def sines(
    samples: int = 500, dim: int = 10, directions: int = 3, *, tests: int = 1000, noise: float = 0.1, seed: int = 0
) -> Problem:
    """y = k^(-1/2) Σ_j sin(<θ_j, z>) + noise with k orthonormal directions θ_j; squared loss.

    Inputs are uniform in the ball of radius sqrt(d + 2), where each coordinate has variance 1. The targets' standard
    deviation is about 0.66, so `noise` is a seventh of it: small, and enough that fitting it is a mistake.
    """
    theta, _ = torch.linalg.qr(rng.normal((dim, directions), rng.key(seed, 0, "multi index", name="directions")))
    points = math.sqrt(dim + 2) * _in_unit_ball(samples + tests, dim, seed, "multi index")
    targets = torch.sin(points @ theta).sum(1) / math.sqrt(directions)
    noisy = targets + noise * rng.normal((samples + tests,), rng.key(seed, 0, "multi index", name="noise"))
    train, test = slice(samples), slice(samples, None)
    return Problem("sines", SQUARED, points[train], noisy[train], points[test], targets[test])


def linear(samples: int, dim: int, *, seed: int = 0) -> Problem:
    """y = <θ, z> + noise for the solvable analogue, in float64; z is Gaussian, its coordinates' deviations 1.5 to 0.5.

    They differ so that the modes do: see poc_lora.mfnn.gaussian. Test samples are the training samples.
    """
    points = rng.normal((samples, dim), rng.key(seed, 0, "linear", name="inputs")).double()
    points *= torch.linspace(1.5, 0.5, dim, dtype=torch.float64)
    theta = 1 + rng.uniform((dim,), rng.key(seed, 0, "linear", name="direction")).double()
    targets = points @ theta + 0.1 * rng.normal((samples,), rng.key(seed, 0, "linear", name="noise")).double()
    return Problem("linear regression", SQUARED, points, targets, points, targets)
