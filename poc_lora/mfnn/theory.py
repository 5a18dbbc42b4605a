"""The paper's bounds as functions, each with its source.

Nitanda, Lee, Tan, Sakaguchi, Suzuki, "Propagation of Chaos for Mean-Field Langevin Dynamics and its Application to
Model Ensemble", ICML 2025: "the paper" below. Setting: F = F_0 + λ' E|x|², F_0(μ) = E ℓ(h_μ(Z), Y) convex, neurons
bounded by R, temperature λ; L(μ) = F(μ) + λ Ent(μ) with minimiser μ*; L^(N)(μ^(N)) = N E F(ρ_X) + λ Ent(μ^(N)) for N
particles X ~ μ^(N), minimised by μ*^(N) ∝ exp(−(N/λ) F(ρ_X)).

    curvature_constant               B, for a smooth loss
    log_alpha                        Example 1: ln α, of the log-Sobolev constant
    objective_gap_bound              Theorem 1, continuous time
    discretization_error             Theorem 1: δ_η
    objective_gap_bound_discrete     Theorem 1, discrete time
    kl_per_neuron_bound              (8) and its analogue in discrete time: K
    network_error_bound              Theorem 2
    ensemble_error_bound             Theorem 3
    pruned_error_bound               the remark on pruning
    sup_norm_bound                   Theorem 4
    ensemble_saturation              ours: the number of networks at which Theorem 3 saturates

The gap is L^(N)(μ_t^(N))/N − L(μ*), Δ_0 its value at the start. Which bounds say something at the values of the
experiments: docs/theory.md.
"""

import math

from poc_lora.errors import RequestError
from poc_lora.mfnn.model import Loss


def curvature_constant(loss: Loss, bound: float) -> float:
    """B = L R²/2, from the smoothness L of the loss (squared 1, mean squared error 2, logistic 1/4) and R, `bound`."""
    _positive(bound=bound)
    return loss.smoothness * bound**2 / 2


def log_alpha(temperature: float, regularization: float, slope_bound: float) -> float:
    """Returns ln α of α = (2λ'/λ) exp(−R'²/(2λλ') − 4R'/sqrt(2λλ')) (Example 1).

    The logarithm, because α itself is below every float at the experiments' values.

    Args:
        temperature: λ.
        regularization: λ'.
        slope_bound: R', a bound on |ℓ'(h, y) ∇_x h(x, z)|.
    """
    _positive(temperature=temperature, regularization=regularization, slope_bound=slope_bound)
    both = 2 * temperature * regularization
    return math.log(2 * regularization / temperature) - slope_bound**2 / both - 4 * slope_bound / math.sqrt(both)


def objective_gap_bound(
    constant: float, neurons: int, *, alpha: float, temperature: float, time: float, initial_gap: float
) -> float:
    """gap_t ≤ B/N + exp(−2αλt) Δ_0 (Theorem 1, continuous time).

    Args:
        constant: B.
        neurons: N.
        alpha: The log-Sobolev constant α.
        temperature: λ.
        time: t.
        initial_gap: Δ_0.
    """
    _positive(neurons=neurons, constant=constant)
    return constant / neurons + math.exp(-2 * alpha * temperature * time) * initial_gap


def discretization_error(
    lr: float,
    *,
    temperature: float,
    regularization: float,
    gradient_bound: float,
    lipschitz: float,
    dim: int,
    second_moment: float,
) -> float:
    """δ_η, what a step of finite size adds (Theorem 1).

    δ_η = 8η(C2² + λ'²)(η C1² + λd) + 32η²λ'²(C2² + λ'²)(E|X_0|²/N + (1/λ')(C1²/(4λ') + λd))

    Args:
        lr: η.
        temperature: λ.
        regularization: λ'.
        gradient_bound: C1, a bound on the gradient of F_0's first variation.
        lipschitz: C2, that gradient's Lipschitz constant in (μ, x), μ in W2.
        dim: d, the number of parameters of a neuron.
        second_moment: E|X_0|²/N, the mean of |x|² over neurons at the start.

    Raises:
        RequestError: Unless ηλ' < 1/2.
    """
    _positive(lr=lr, temperature=temperature, regularization=regularization, dim=dim)
    if lr * regularization >= 0.5:
        raise RequestError(
            f"lr {lr} times λ' {regularization} is 1/2 or more", where="discretization_error", fix="lower the lr"
        )
    smoothness = lipschitz**2 + regularization**2
    first = 8 * lr * smoothness * (lr * gradient_bound**2 + temperature * dim)
    moment = second_moment + (gradient_bound**2 / (4 * regularization) + temperature * dim) / regularization
    return first + 32 * lr**2 * regularization**2 * smoothness * moment


def objective_gap_bound_discrete(
    constant: float,
    neurons: int,
    *,
    alpha: float,
    temperature: float,
    lr: float,
    steps: int,
    discretization: float,
    initial_gap: float,
) -> float:
    """gap_k ≤ B/N + δ_η/(αλ) + exp(−αληk) Δ_0 (Theorem 1, discrete time, ηλ' < 1/2).

    Args:
        constant: B.
        neurons: N.
        alpha: The log-Sobolev constant α.
        temperature: λ.
        lr: η.
        steps: k.
        discretization: δ_η, see `discretization_error`.
        initial_gap: Δ_0.
    """
    _positive(neurons=neurons, constant=constant, alpha=alpha, temperature=temperature)
    left = math.exp(-alpha * temperature * lr * steps) * initial_gap
    return constant / neurons + discretization / (alpha * temperature) + left


def kl_per_neuron_bound(gap: float, temperature: float) -> float:
    """KL(μ^(N) | μ*^⊗N)/N ≤ gap/λ (Lemma 1), which is K for a bound on the gap.

    In continuous time that is (8), B/(λN) + exp(−2αλt) Δ_0/λ; in discrete time
    K = B/(λN) + δ_η/(αλ²) + exp(−αληk) Δ_0/λ.
    """
    _positive(temperature=temperature)
    return gap / temperature


def network_error_bound(bound: float, neurons: int, kl: float) -> float:
    """E (h_X(z) − h_μ*(z))² ≤ 4R²/N + 8R² sqrt(K), for each z (Theorem 2). bound: R. neurons: N. kl: K."""
    _positive(bound=bound, neurons=neurons)
    return 4 * bound**2 / neurons + 8 * bound**2 * math.sqrt(kl)


def ensemble_error_bound(bound: float, networks: int, neurons: int, kl: float) -> float:
    """E (h_merged(z) − h_μ*(z))² ≤ 4R²/(MN) + (8R²/M) sqrt(K) + 2R² K, for each z (Theorem 3).

    bound: R. networks: M. neurons: N. kl: K.
    """
    _positive(bound=bound, networks=networks, neurons=neurons)
    return network_error_bound(bound, neurons, kl) / networks + 2 * bound**2 * kl


def pruned_error_bound(bound: float, kept: int, kl: float) -> float:
    """E (h_pruned(z) − h_μ*(z))² ≤ 4R²/s + 8R² sqrt(K), for s neurons of N (the paper's remark on pruning).

    bound: R. kept: s. kl: K, of the network of N neurons.
    """
    return network_error_bound(bound, kept, kl)


def sup_norm_bound(
    networks: int,
    neurons: int,
    dim: int,
    *,
    bound: float,
    constant: float,
    temperature: float,
    remainder: float,
    uniform: float,
    covering: float,
) -> float:
    """E sup_z |h_merged(z) − h_μ*(z)|, z in the unit cube (Theorem 4, |h(x, z) − h(x, z')| ≤ β|x||z − z'|).

        (5CR/4) sqrt(d/(MN) + dB/(λN)) + CR sqrt(dλ/(MN(λ + MB))) log(C' sqrt((λ + MB)π/λ))
        + CR sqrt(dλMN/(λ + MB)) (δ_η/(αλ²) + exp(−αληk) Δ_0/λ)

    Args:
        networks: M.
        neurons: N.
        dim: d.
        bound: R.
        constant: B.
        temperature: λ.
        remainder: δ_η/(αλ²) + exp(−αληk) Δ_0/λ, which is K − B/(λN); 0 for the law μ*^(N).
        uniform: C. The paper proves that such a constant exists and gives no value.
        covering: C', likewise.
    """
    _positive(networks=networks, neurons=neurons, dim=dim, bound=bound, constant=constant, temperature=temperature)
    _positive(uniform=uniform, covering=covering)
    total, weight = networks * neurons, temperature + networks * constant
    scale = uniform * bound
    near = 1.25 * scale * math.sqrt(dim / total + dim * constant / (temperature * neurons))
    logarithm = math.log(covering * math.sqrt(weight * math.pi / temperature))
    cover = scale * math.sqrt(dim * temperature / (total * weight)) * logarithm
    return near + cover + scale * math.sqrt(dim * temperature * total / weight) * remainder


def ensemble_saturation(neurons: int, kl: float) -> float:
    """The number M of networks at which both parts of Theorem 3 are equal: (2/N + 4 sqrt(K))/K. neurons: N. kl: K.

    Below it, doubling M takes off more than a quarter of the bound; far above it, only more neurons lower it.
    """
    _positive(neurons=neurons, kl=kl)
    return (2 / neurons + 4 * math.sqrt(kl)) / kl


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise RequestError(f"{name} must be positive, not {value}", where="poc_lora.mfnn.theory")
