"""The bounds of the theory as functions, each with its source.

Nitanda, Lee, Tan, Sakaguchi, Suzuki, "Propagation of Chaos for Mean-Field Langevin Dynamics and its Application to
Model Ensemble", ICML 2025: "the paper" below. Setting: F(μ) = E ℓ(h_μ(Z), Y) + λ' E|x|² convex in μ, neurons bounded by
R, temperature λ; L(μ) = F(μ) + λ Ent(μ) with minimiser μ*; L^(N)(μ^(N)) = N E F(ρ_X) + λ Ent(μ^(N)) for N particles X ~
μ^(N), minimised by μ*^(N) ∝ exp(−(N/λ) F(ρ_X)).

    proved    by the paper, for dynamics in continuous time: `objective_gap_bound`, `ensemble_error_bound`
    derived   here, in the docstring of the function: `curvature_constant`, `kl_bound`, `ensemble_saturation`
    measured  by `poc-lora mfnn poc`, where the limit is known exactly, and with bounded neurons

α, the log-Sobolev constant of μ*^(N), and Δ_0 are arguments: nothing here can know them.
"""

import math

from poc_lora.errors import RequestError
from poc_lora.mfnn.model import Loss


def curvature_constant(loss: Loss, bound: float) -> float:
    """B = (s/2) R², from the smoothness s of the loss (squared: 1, logistic: 1/4) and the bound R on neurons.

    Derivation. Let μ*^⊗N be the law of N independent draws of μ*. As μ*^(N) minimises L^(N),

        L^(N)(μ*^(N))/N − L(μ*) ≤ L^(N)(μ*^⊗N)/N − L(μ*) = E F(ρ_X) − F(μ*)   for X ~ μ*^⊗N,

    the entropies being equal. Split F(ρ_X) − F(μ*) = ∫ (δF/δμ)(μ*) d(ρ_X − μ*) + B_F(ρ_X, μ*), B_F being the Bregman
    divergence. The first part has mean 0, since E ρ_X = μ*. In the second the regulariser, linear in μ, does not count,
    and h_μ(z) is linear in μ, so that smoothness gives

        B_F(ρ_X, μ*) ≤ (s/2) E_Z (h_X(Z) − h_μ*(Z))².

    Its mean is (s/2) E_Z Var_{x~μ*}(h(x, Z)) / N ≤ (s/2) R²/N. So the gap is at most B/N with B = s R²/2.
    """
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
    """KL(μ^(N) | μ*^⊗N) ≤ (N/λ) gap, for gap = L^(N)(μ^(N))/N − L(μ*): B/λ once the gap is B/N.

    Derivation. With the proximal Gibbs form of μ*, log μ* = −(1/λ) (δF/δμ)(μ*) + const,

        L^(N)(μ^(N))/N − L(μ*) = (λ/N) KL(μ^(N) | μ*^⊗N) + E B_F(ρ_X, μ*)   for X ~ μ^(N),

    and B_F ≥ 0, since F is convex.
    """
    _positive(neurons=neurons, temperature=temperature)
    return neurons * gap / temperature


def ensemble_error_bound(bound: float, networks: int, neurons: int, kl: float) -> float:
    """E (h_merged(z) − h_μ*(z))² ≤ 4R²/(MN) + (8R²/M) sqrt(KL/N) + 2R² KL/N, for each z.

    Proved by the paper; M = 1 is the bound without ensembling. networks: M. neurons: N. kl: KL(μ^(N) | μ*^⊗N).

    How it comes about. Let a = h(x, z) − h_μ*(z), so |a| ≤ 2R, and A the mean of a over the neurons of one network.
    The networks are independent, so the error is exactly (1/M) E A² + (1 − 1/M) (E A)²: a part that falls with M and
    one that does not. By exchangeability E A = E a_1 and E A² ≤ 4R²/N + |E a_1 a_2|. The laws of one and of two
    neurons have a KL of at most KL/N and 2 KL/N to their limits (superadditivity of KL; N even), hence by Pinsker's
    inequality |E a_1| ≤ 2R sqrt(KL/(2N)) and |E a_1 a_2| ≤ 8R² sqrt(KL/N).
    """
    _positive(bound=bound, networks=networks, neurons=neurons)
    falling = 4 * bound**2 / neurons + 8 * bound**2 * math.sqrt(kl / neurons)
    return falling / networks + 2 * bound**2 * kl / neurons


def ensemble_saturation(neurons: int, kl: float) -> float:
    """The number M of networks at which the two parts of `ensemble_error_bound` are equal: 2/KL + 4 sqrt(N/KL).

    Derived by equating (4/N + 8 sqrt(KL/N))/M and 2 KL/N. Below it, doubling M takes off more than a quarter of the
    bound; far above it, more networks do not lower the bound, more neurons do.
    """
    _positive(neurons=neurons, kl=kl)
    return 2 / kl + 4 * math.sqrt(neurons / kl)


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise RequestError(f"{name} must be positive, not {value}", where="poc_lora.mfnn.theory")
