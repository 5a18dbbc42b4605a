"""The bounds of the theory as functions, each with its source.

Nitanda, Lee, Tan, Sakaguchi, Suzuki, "Propagation of Chaos for Mean-Field Langevin Dynamics and its Application to
Model Ensemble", ICML 2025: "the paper" below. Setting: F(μ) = E ℓ(h_μ(Z), Y) + λ' E|x|² convex in μ, neurons bounded by
R, temperature λ; L(μ) = F(μ) + λ Ent(μ) with minimiser μ*; L^(N)(μ^(N)) = N E F(ρ_X) + λ Ent(μ^(N)) for N particles X ~
μ^(N), minimised by μ*^(N) ∝ exp(−(N/λ) F(ρ_X)).

    proved    by the paper, for dynamics in continuous time: `objective_gap_bound`, `ensemble_error_bound`
    derived   in docs/theory.md: `curvature_constant`, `kl_bound`, `ensemble_saturation`
    measured  by `poc-lora mfnn poc`, where the limit is known exactly, and with bounded neurons

α, the log-Sobolev constant of μ*^(N), and Δ_0 are arguments: nothing here can know them.
"""

import math

from poc_lora.errors import RequestError
from poc_lora.mfnn.model import Loss


def curvature_constant(loss: Loss, bound: float) -> float:
    """B = (s/2) R², from the smoothness s of the loss (squared: 1, logistic: 1/4) and the bound R on neurons."""
    if not (math.isfinite(bound) and bound > 0):
        raise RequestError(f"the bound R must be positive, not {bound}", where="curvature_constant")
    return loss.smoothness * bound**2 / 2


def objective_gap_bound(
    constant: float, neurons: int, *, alpha: float, temperature: float, time: float, initial_gap: float
) -> float:
    """L^(N)(μ_t^(N))/N − L(μ*) ≤ B/N + exp(−2αλt) Δ_0. Proved by the paper.

    constant: B. alpha: the log-Sobolev constant of μ*^(N). time: t = η × steps. initial_gap: Δ_0, the gap
    (L^(N)(μ_0^(N)) − L^(N)(μ*^(N)))/N at the start. A step size adds a bias that this does not cover.
    """
    _positive(neurons=neurons, constant=constant)
    return constant / neurons + math.exp(-2 * alpha * temperature * time) * initial_gap


def kl_bound(gap: float, neurons: int, temperature: float) -> float:
    """KL(μ^(N) | μ*^⊗N) ≤ (N/λ) gap, for gap = L^(N)(μ^(N))/N − L(μ*): B/λ once the gap is B/N."""
    _positive(neurons=neurons, temperature=temperature)
    return neurons * gap / temperature


def ensemble_error_bound(bound: float, networks: int, neurons: int, kl: float) -> float:
    """E (h_merged(z) − h_μ*(z))² ≤ 4R²/(MN) + (8R²/M) sqrt(KL/N) + 2R² KL/N, for each z.

    Proved by the paper; M = 1 is the bound without ensembling. networks: M. neurons: N. kl: KL(μ^(N) | μ*^⊗N).
    """
    _positive(bound=bound, networks=networks, neurons=neurons)
    falling = 4 * bound**2 / neurons + 8 * bound**2 * math.sqrt(kl / neurons)
    return falling / networks + 2 * bound**2 * kl / neurons


def ensemble_saturation(neurons: int, kl: float) -> float:
    """The number M of networks at which the two parts of `ensemble_error_bound` are equal: 2/KL + 4 sqrt(N/KL)."""
    _positive(neurons=neurons, kl=kl)
    return 2 / kl + 4 * math.sqrt(neurons / kl)


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise RequestError(f"{name} must be positive, not {value}", where="poc_lora.mfnn.theory")
