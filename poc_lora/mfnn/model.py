"""Mean-field two-layer networks: an average over N neurons, its objective, and the gradient in closed form.

    h_X(z) = (1/N) Σ_i h(x_i, z)
    F(μ)   = E ℓ(h_μ(Z), Y) + λ' E_μ |x|²

A network is its particles `[N, P]`: N neurons of P numbers each, and M networks are `[M, N, P]`. Three kinds of neuron:
`TanhProduct` (bounded, the paper's), `Tanh` (bounded) and `Linear` (unbounded; its laws are Gaussian and known, see
poc_lora.mfnn.gaussian).

Each network is computed by itself, in slices of the samples whose size depends on N alone. So what comes out does not
depend on the other networks, by a bit, and beside the particles there is never more in memory than one slice a thread.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import softplus

from poc_lora.errors import RequestError

# Neuron-samples worked on at a time: on a CPU what its second-level cache holds (1 MiB in float32), on a GPU 256 MiB.
SLICE = {"cpu": 2**18, "cuda": 2**26}
# Samples at a time, at least: with fewer, adding to the gradient of a very wide network takes longer than computing it.
FEWEST_SAMPLES = 16


@dataclass(frozen=True)
class Loss:
    """A loss ℓ(h, y), its derivative in h, and a bound on its second derivative in h (its smoothness)."""

    name: str
    value: Callable[[Tensor, Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]
    smoothness: float


SQUARED = Loss("squared", lambda h, y: (h - y).square() / 2, lambda h, y: h - y, 1.0)
MEAN_SQUARED_ERROR = Loss("mean squared error", lambda h, y: (h - y).square(), lambda h, y: 2 * (h - y), 2.0)
LOGISTIC = Loss("logistic", lambda h, y: softplus(-y * h), lambda h, y: -y * torch.sigmoid(-y * h), 0.25)


class Neuron(Protocol):
    """A kind of neuron: a function of an input z in R^d with P parameters.

    `forward` and `add_gradient` see a network transposed, `x [P, N]`, and a slice of B samples. `forward` leaves in
    `work [B, N]` what `add_gradient` needs, so the neurons are evaluated once.
    """

    @property
    def dim(self) -> int:
        """d, the length of an input."""

    @property
    def size(self) -> int:
        """P, the number of parameters of one neuron."""

    def features(self, inputs: Tensor) -> Tensor:
        """Returns what the particles are multiplied with, from inputs [n, d]; computed once, not at every step."""

    def values(self, x: Tensor, inputs: Tensor) -> Tensor:
        """Returns h(x_i, z), written plainly: [n, N] from x [P, N] and inputs [n, d]."""

    def forward(self, x: Tensor, features: Tensor, work: Tensor) -> Tensor:
        """Returns the network's outputs [B]."""

    def add_gradient(self, gradient: Tensor, x: Tensor, features_t: Tensor, slope: Tensor, work: Tensor) -> None:
        """Add Σ_k slope_k ∇_x h(x_i, z_k) to `gradient` [P, N], for slope [B] and features_t [rows, B]."""


@dataclass(frozen=True)
class Tanh:
    """R tanh(<w, z> + b), with x = (w, b) in R^(d+1) and `bound` R.

    tanh(u) = 2 S − 1 and 1 − tanh(u)² = 4 S (1 − S) for S = sigmoid(2u): torch's sigmoid takes a sixth of its tanh's
    time on a CPU, and S(1 − S) can take its place in memory. The factor 2 sits in the features. In float32 outputs are
    off by about 1e-7 R, as with any sum of this kind.
    """

    dim: int
    bound: float = 5.0

    @property
    def size(self) -> int:
        return self.dim + 1

    def features(self, inputs: Tensor) -> Tensor:
        return 2 * torch.cat([inputs, torch.ones_like(inputs[:, :1])], 1)

    def values(self, x: Tensor, inputs: Tensor) -> Tensor:
        return self.bound * torch.tanh(inputs @ x[: self.dim] + x[self.dim])

    def forward(self, x: Tensor, features: Tensor, work: Tensor) -> Tensor:
        torch.mm(features, x, out=work)
        work.sigmoid_()
        return work.mean(1).mul_(2 * self.bound).sub_(self.bound)

    def add_gradient(self, gradient: Tensor, x: Tensor, features_t: Tensor, slope: Tensor, work: Tensor) -> None:
        torch.addcmul(work, work, work, value=-1, out=work)
        gradient.addmm_(features_t * slope, work, alpha=2 * self.bound)


@dataclass(frozen=True)
class TanhProduct:
    """R tanh(a) tanh(<w, z> + b), with x = (w, b, a) in R^(d+2) and `bound` R: the neuron of the paper's experiments.

    As `Tanh`, with S = sigmoid(2(<w, z> + b)). Sums over neurons, and over samples for a, are matrix-vector products.
    """

    dim: int
    bound: float = 10.0

    @property
    def size(self) -> int:
        return self.dim + 2

    def features(self, inputs: Tensor) -> Tensor:
        return Tanh(self.dim, self.bound).features(inputs)

    def values(self, x: Tensor, inputs: Tensor) -> Tensor:
        return self.bound * torch.tanh(x[-1]) * torch.tanh(inputs @ x[: self.dim] + x[self.dim])

    def forward(self, x: Tensor, features: Tensor, work: Tensor) -> Tensor:
        torch.mm(features, x[:-1], out=work)
        work.sigmoid_()
        factor = torch.tanh(x[-1]).mul_(self.bound / x.shape[1])
        return torch.mv(work, factor).mul_(2).sub_(factor.sum())

    def add_gradient(self, gradient: Tensor, x: Tensor, features_t: Tensor, slope: Tensor, work: Tensor) -> None:
        factor = torch.tanh(x[-1])
        towards = torch.mv(work.t(), slope).mul_(2).sub_(slope.sum())  # Σ_k slope_k tanh(<w, z_k> + b)
        gradient[-1].add_(towards.addcmul_(towards, factor * factor, value=-1), alpha=self.bound)
        torch.addcmul(work, work, work, value=-1, out=work)
        gradient[:-1].addmm_(features_t * slope, work.mul_(factor), alpha=2 * self.bound)


@dataclass(frozen=True)
class Linear:
    """<x, z>, with x in R^d. Not bounded, so the theorem does not cover it; everything about it is known exactly."""

    dim: int

    @property
    def size(self) -> int:
        return self.dim

    def features(self, inputs: Tensor) -> Tensor:
        return inputs

    def values(self, x: Tensor, inputs: Tensor) -> Tensor:
        return inputs @ x

    def forward(self, x: Tensor, features: Tensor, work: Tensor) -> Tensor:
        return features @ x.mean(1)

    def add_gradient(self, gradient: Tensor, x: Tensor, features_t: Tensor, slope: Tensor, work: Tensor) -> None:
        gradient += (features_t @ slope)[:, None]


# Slices of samples: of each its features [B, rows], the same transposed, and targets [B].
Samples = list[tuple[Tensor, Tensor, Tensor]]


class Objective:
    """F(μ) = E ℓ(h_μ(Z), Y) + λ' E|x|² over n samples, for networks of one kind of neuron.

    Args:
        neuron: The kind of neuron.
        loss: ℓ.
        inputs: [n, d]. Their dtype (float32 or float64) and device are used for everything computed.
        targets: [n].
        regularization: λ'.

    Raises:
        RequestError: If shapes or dtypes do not fit each other, or λ' is negative.
    """

    def __init__(self, neuron: Neuron, loss: Loss, inputs: Tensor, targets: Tensor, regularization: float):
        if inputs.dim() != 2 or inputs.shape[1] != neuron.dim or targets.shape != inputs.shape[:1] or not len(inputs):
            raise RequestError(
                f"inputs of shape {tuple(inputs.shape)} and targets of shape {tuple(targets.shape)} do not fit neurons "
                f"of dimension {neuron.dim}",
                where="Objective",
                fix=f"give inputs [n, {neuron.dim}] and targets [n], n at least 1",
            )
        if inputs.dtype not in (torch.float32, torch.float64) or targets.dtype != inputs.dtype:
            raise RequestError(
                f"inputs are {inputs.dtype} and targets {targets.dtype}",
                where="Objective",
                fix="both float32, or both float64",
            )
        if not (math.isfinite(regularization) and regularization >= 0):
            raise RequestError(f"the regularization λ' must be at least 0, not {regularization}", where="Objective")
        self.neuron = neuron
        self.loss = loss
        self.inputs = inputs
        self.targets = targets
        self.regularization = regularization

    def slices(self, width: int, rows: Tensor | None = None) -> Samples:
        """Returns the samples, or those of the numbers `rows` [n'], in slices that fit `width` neurons."""
        inputs, targets = (self.inputs, self.targets) if rows is None else (self.inputs[rows], self.targets[rows])
        return [
            (features, features.t().contiguous(), y)
            for features, y in zip(_slices(self.neuron.features(inputs), width), _slices(targets, width), strict=True)
        ]

    def workspace(self, width: int) -> Tensor:
        """Returns an uninitialised buffer for one slice of the samples and `width` neurons."""
        n = len(next(_slices(self.inputs, width)))
        return torch.empty(n * width, dtype=self.inputs.dtype, device=self.inputs.device)

    def data_gradient(self, x: Tensor, slices: Samples, workspace: Tensor, gradient: Tensor) -> Tensor:
        """Write E ℓ'(h_X(Z), Y) ∇_x h(x_i, Z), without the regulariser, into `gradient` [P, N] for x [P, N].

        The mean is over the samples of the slices.
        """
        n, width = sum(len(targets) for _, _, targets in slices), x.shape[1]
        gradient.zero_()
        for features, features_t, targets in slices:
            work = workspace[: len(targets) * width].view(-1, width)
            slope = self.loss.slope(self.neuron.forward(x, features, work), targets).div_(n)
            self.neuron.add_gradient(gradient, x, features_t, slope, work)
        return gradient

    @torch.no_grad()
    def gradient(self, particles: Tensor) -> Tensor:
        """Returns N ∇_X F(ρ_X), the gradient of the first variation at each particle, [..., N, P].

        ∇_x (δF/δμ)(ρ_X)(x_i) = E[ℓ'(h_X(Z), Y) ∇_x h(x_i, Z)] + 2 λ' x_i
        """
        self._check(particles)
        width = particles.shape[-2]
        slices, workspace = self.slices(width), self.workspace(width)
        networks = [x.t().contiguous() for x in particles.reshape(-1, *particles.shape[-2:])]
        found = [self.data_gradient(x, slices, workspace, torch.empty_like(x)) for x in networks]
        shrink = [2 * self.regularization * x for x in networks]
        return torch.stack([(g + s).t() for g, s in zip(found, shrink, strict=True)]).view(particles.shape)

    def _check(self, particles: Tensor) -> None:
        check_particles(self.neuron, particles)
        if particles.dtype != self.inputs.dtype:
            raise RequestError(
                f"particles are {particles.dtype} and the samples {self.inputs.dtype}",
                where="Objective",
                fix="same dtype",
            )


@torch.no_grad()
def outputs(neuron: Neuron, particles: Tensor, inputs: Tensor) -> Tensor:
    """Returns h_X(z) of every network at every input: [..., n] for particles [..., N, P] and inputs [n, d].

    Raises RequestError if shapes do not fit.
    """
    check_particles(neuron, particles)
    width = particles.shape[-2]
    features = list(_slices(neuron.features(inputs), width))
    workspace = torch.empty(len(features[0]) * width, dtype=inputs.dtype, device=inputs.device)
    found = []
    for x in particles.reshape(-1, *particles.shape[-2:]):
        x_t = x.t().contiguous()
        found.append(torch.cat([neuron.forward(x_t, z, workspace[: len(z) * width].view(-1, width)) for z in features]))
    return torch.stack(found).view(*particles.shape[:-2], len(inputs))


def check_particles(neuron: Neuron, particles: Tensor) -> None:
    """Raises RequestError unless particles are [..., N, P] with the neuron's P and at least one neuron."""
    if particles.dim() < 2 or particles.shape[-1] != neuron.size or particles.shape[-2] < 1:
        raise RequestError(
            f"particles of shape {tuple(particles.shape)} do not fit {neuron}",
            where="particles",
            fix=f"give [..., N, {neuron.size}] with at least one neuron",
        )


def _slices(samples: Tensor, width: int) -> Iterator[Tensor]:
    """Equal slices of the samples that keep rows times `width` within SLICE, or have FEWEST_SAMPLES."""
    count = math.ceil(len(samples) * width / SLICE.get(samples.device.type, SLICE["cpu"]))
    return iter(samples.split(max(FEWEST_SAMPLES, math.ceil(len(samples) / max(1, count)))))
