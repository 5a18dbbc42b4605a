"""The solvable analogue: linear neurons and the squared loss, where every law is Gaussian and known.

h(x, z) = <x, z>, ℓ = ½(h − y)², regulariser λ'|x|². With Σ = E zzᵀ, c = E y z and m the mean of μ,

    F(μ) = ½ mᵀΣm − cᵀm + ½ E y² + λ' E|x|².

The neurons are unbounded, so this is an analogue of the theorem and no instance of it: R²/2 in B is replaced by
E_z Var_{μ*}(h)/2, the expected Bregman term. In the basis of Σ's eigenvectors the d directions separate; σ is an
eigenvalue, κ = σ + 2λ' the curvature of its direction, v = λ/(2λ').

The limit. δF/δμ(x) = <x, Σm − c> + λ'|x|², and μ* ∝ exp(−(1/λ) δF/δμ(μ*)) is Gaussian with covariance v I and a mean
that solves m = −(Σm − c)/(2λ'), so m* = (Σ + 2λ'I)⁻¹ c.

N particles. μ*^(N) ∝ exp(−(N/λ) F(ρ_X)) with N F = N(½ x̄ᵀΣx̄ − cᵀx̄) + λ' Σ_i |x_i|². Rotate the N particles so that one
mode is s = sqrt(N) x̄: then Σ_i|x_i|² = |s|² + the squares of the N − 1 others. So s ~ N(sqrt(N) m*, λ(Σ + 2λ'I)⁻¹),
variance λ/κ in a direction, and the others are N(0, v), as under μ*^⊗N. Means are equal, and from the one mode that
differs:

    KL(μ*^(N) | μ*^⊗N)       = ½ Σ_σ (a − 1 − log a),  a = 2λ'/κ       (free of N and of λ)
    L^(N)(μ*^(N))/N − L(μ*)  = −(λ/2N) Σ_σ log a = (λ/2N) Σ_σ log(1 + σ/(2λ'))
    gap − (λ/N) KL           = (λ/2N) Σ_σ (1 − a) = ½ E_z Var(h_X), the Bregman term, as in theory.kl_bound
    Cov(x_i, x_j)            = −(v − λ/κ)/N  for i ≠ j, and Var(x_i) = v − (v − λ/κ)/N

The gap is at most E_z Var_{μ*}(h)/(2N) = (λ/2N) Σ_σ σ/(2λ'), by log(1 + u) ≤ u.

The chain with learning rate η is linear too: s ← (1 − ηκ)s + η sqrt(N) c + sqrt(2ηλ) ξ, whose stationary variance is
2ηλ/(1 − (1 − ηκ)²) = (λ/κ)/(1 − ηκ/2): the step size's bias, exactly. Its mean is exact. The others: κ = 2λ'.

The ensemble. For independent networks E(h_merged − h_μ*)² = (1/M) Var + bias², where Var falls as 1/N and the bias is
that of one network. For the prediction the bias is |E x̄_t − m*|_Σ, which neither M nor N makes smaller: it comes from
stopping early and vanishes like (1 − ηκ)^t. At stationarity the prediction has NO bias, so there its error falls as
1/(MN) without a floor: in this analogue the part of the bound that does not fall with M is not attained. What the
N-particle law gets wrong is the spread: Q = (1/MN) Σ |x_i − m*|² has mean d v − Σ_σ(v − λ/κ)/N, a bias of order 1/N
that no number of networks removes. `spread_error` is that second split: 1/(MN) plus a floor that falls as 1/N².
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

    def bregman(self, modes: Modes, neurons: int) -> float:
        """E B_F(ρ_X, μ*) = ½ E_z E(h_X(z) − h_μ*(z))² of one network whose law is `modes`."""
        return self.prediction_error(modes, 1, neurons) / 2

    def prediction_split(self, modes: Modes, neurons: int) -> tuple[float, float]:
        """Variance of one network's prediction and its squared bias against μ*, both averaged over z."""
        variance = (self.sigma * modes.along).sum().item() / neurons
        return variance, (self.sigma * (modes.mean - self.mean).square()).sum().item()

    def prediction_error(self, modes: Modes, networks: int, neurons: int) -> float:
        """E_z E (h_merged(z) − h_μ*(z))² for M networks."""
        variance, squared_bias = self.prediction_split(modes, neurons)
        return variance / networks + squared_bias

    def spread_split(self, modes: Modes, neurons: int, about: Modes | None = None) -> tuple[float, float]:
        """Variance and squared bias of one network's Q = (1/N) Σ_i |x_i − m|² against the limit's.

        `modes` must have mean m = m*, as at stationarity. `about`: the law at infinite N to compare with; default μ*.
        A chi-square law in each direction: N Q = Σ_σ [s'^2 + N − 1 squares], s' = s − sqrt(N) m*.
        """
        limit = (about or self.stationary()).across
        mean = (modes.along + (neurons - 1) * modes.across).sum().item() / neurons
        variance = 2 * (modes.along.square() + (neurons - 1) * modes.across.square()).sum().item() / neurons**2
        return variance, (mean - limit.sum().item()) ** 2

    def spread_error(self, modes: Modes, networks: int, neurons: int, about: Modes | None = None) -> float:
        """E (Q_merged − Q_limit)² for M networks."""
        variance, squared_bias = self.spread_split(modes, neurons, about)
        return variance / networks + squared_bias

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
