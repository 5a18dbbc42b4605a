"""The solvable analogue: linear neurons and the squared loss, where every law is Gaussian and known.

h(x, z) = <x, z>, ℓ = ½(h − y)², regulariser λ'|x|². With Σ = E zzᵀ, c = E y z and m the mean of μ,

    F(μ) = ½ mᵀΣm − cᵀm + ½ E y² + λ' E|x|².

In the basis of Σ's eigenvectors the d directions separate; σ is an eigenvalue, κ = σ + 2λ' the curvature of its
direction, v = λ/(2λ'). Derivations: docs/theory.md, "Linear neurons, solved".
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from poc_lora.errors import RequestError


@dataclass(frozen=True)
class Modes:
    """The law of a network's particles, in the basis of Σ's eigenvectors.

    Attributes:
        mean: Of x̄, [d].
        along: Variance of the mode s = sqrt(N) x̄, [d].
        across: Variance of the N − 1 other modes, [d].
    """

    mean: Tensor
    along: Tensor
    across: Tensor


@dataclass(frozen=True)
class Gaussian:
    """The analogue, in float64.

    Attributes:
        sigma: Eigenvalues σ of Σ, [d].
        c: E y z in the basis of Σ's eigenvectors, [d].
        regularization: λ'.
        temperature: λ.

    Raises:
        RequestError: If λ' or λ is not positive, or an eigenvalue is negative.
    """

    sigma: Tensor
    c: Tensor
    regularization: float
    temperature: float

    def __post_init__(self) -> None:
        if self.regularization <= 0 or self.temperature <= 0 or (self.sigma < 0).any():
            raise RequestError("λ' and λ must be positive and Σ positive semidefinite", where="mfnn.gaussian")

    @property
    def curvature(self) -> Tensor:
        """κ = σ + 2λ', [d]."""
        return self.sigma + 2 * self.regularization

    @property
    def variance(self) -> float:
        """v = λ/(2λ'), of μ* in every direction."""
        return self.temperature / (2 * self.regularization)

    @property
    def mean(self) -> Tensor:
        """m*, [d]."""
        return self.c / self.curvature

    def stationary(self) -> Modes:
        """The law μ*^(N)."""
        return Modes(self.mean, self.temperature / self.curvature, torch.full_like(self.sigma, self.variance))

    def chain(self, lr: float, steps: float, initial_std: float) -> Modes:
        """The law after `steps` steps, which may be infinite, of particles that start from N(0, initial_std² I)."""
        across = torch.full_like(self.sigma, 2 * self.regularization)
        return Modes(
            self.mean * (1 - (1 - lr * self.curvature) ** steps),
            self._variance_after(self.curvature, lr, steps, initial_std),
            self._variance_after(across, lr, steps, initial_std),
        )

    def _variance_after(self, curvature: Tensor, lr: float, steps: float, initial_std: float) -> Tensor:
        if lr * curvature.max() >= 2:
            raise RequestError(f"lr {lr} is too large: the chain diverges", where="mfnn.gaussian", fix="lower it")
        kept = (1 - lr * curvature) ** (2 * steps)
        return kept * initial_std**2 + (1 - kept) * self.temperature / (curvature * (1 - lr * curvature / 2))

    def kl(self) -> float:
        """KL(μ*^(N) | μ*^⊗N), the same for every N and λ."""
        a = 2 * self.regularization / self.curvature
        return (a - 1 - a.log()).sum().item() / 2

    def gap(self, neurons: int) -> float:
        """L^(N)(μ*^(N))/N − L(μ*)."""
        return self.temperature / (2 * neurons) * torch.log1p(self.sigma / (2 * self.regularization)).sum().item()

    def gap_bound(self, neurons: int) -> float:
        """E_z Var_{μ*}(h(x, z)) / (2N): B/N with the expected Bregman term for B."""
        return self.variance * self.sigma.sum().item() / (2 * neurons)

    def prediction_split(self, modes: Modes, neurons: int) -> tuple[float, float]:
        """Variance of one network's prediction and its squared bias against μ*, both averaged over z."""
        variance = (self.sigma * modes.along).sum().item() / neurons
        return variance, (self.sigma * (modes.mean - self.mean).square()).sum().item()

    def spread_split(self, modes: Modes, neurons: int, about: Modes | None = None) -> tuple[float, float]:
        """Variance and squared bias of one network's Q = (1/N) Σ_i |x_i − m|² against the limit's.

        `modes` must have mean m = m*, as at stationarity. `about`: the law at infinite N to compare with; default μ*.
        A chi-square law in each direction: N Q = Σ_σ [s'^2 + N − 1 squares], s' = s − sqrt(N) m*.
        """
        limit = (about or self.stationary()).across
        mean = (modes.along + (neurons - 1) * modes.across).sum().item() / neurons
        variance = 2 * (modes.along.square() + (neurons - 1) * modes.across.square()).sum().item() / neurons**2
        return variance, (mean - limit.sum().item()) ** 2

    @staticmethod
    def correlation(modes: Modes, neurons: int) -> Tensor:
        """Correlation of two particles of one network in each direction, [d]: negative where along < across."""
        covariance = (modes.along - modes.across) / neurons
        return covariance / (modes.across + covariance)


def from_samples(inputs: Tensor, targets: Tensor, regularization: float, temperature: float) -> tuple[Gaussian, Tensor]:
    """Returns the analogue of samples [n, d] with targets [n], and Σ's eigenvectors [d, d] as columns."""
    z, y = inputs.double(), targets.double()
    sigma, vectors = torch.linalg.eigh(z.t() @ z / len(z))
    return Gaussian(sigma.clamp(min=0), vectors.t() @ (z.t() @ y) / len(z), regularization, temperature), vectors
