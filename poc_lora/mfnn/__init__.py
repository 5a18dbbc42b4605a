"""Mean-field neural networks: the theory's own setting, in pure torch.

model.py      networks as particles [M, N, P], their objective and its gradient in closed form
langevin.py   noisy gradient descent of many networks, each with noise of its own key
problems.py   the paper's double circle and multi-index regression, sines, and a linear one for the solvable analogue
ensemble.py   merging, pruning, distances
theory.py     the bounds
gaussian.py   the solvable analogue: every law in closed form
experiments/  figure1, figure2, table2 and poc, run by `poc-lora mfnn`
"""

from poc_lora.mfnn.ensemble import merge, merged_outputs, prune, squared_l2, sup_norm
from poc_lora.mfnn.gaussian import Gaussian, Modes, from_samples
from poc_lora.mfnn.langevin import train
from poc_lora.mfnn.model import (
    LOGISTIC,
    MEAN_SQUARED_ERROR,
    SQUARED,
    Linear,
    Loss,
    Neuron,
    Objective,
    Tanh,
    TanhProduct,
    outputs,
)
from poc_lora.mfnn.problems import Problem, double_circle, linear, multi_index, sines
from poc_lora.mfnn.theory import (
    curvature_constant,
    discretization_error,
    ensemble_error_bound,
    ensemble_saturation,
    kl_per_neuron_bound,
    log_alpha,
    network_error_bound,
    objective_gap_bound,
    objective_gap_bound_discrete,
    pruned_error_bound,
    sup_norm_bound,
)

__all__ = [
    "LOGISTIC",
    "MEAN_SQUARED_ERROR",
    "SQUARED",
    "Gaussian",
    "Linear",
    "Loss",
    "Modes",
    "Neuron",
    "Objective",
    "Problem",
    "Tanh",
    "TanhProduct",
    "curvature_constant",
    "discretization_error",
    "double_circle",
    "ensemble_error_bound",
    "ensemble_saturation",
    "from_samples",
    "kl_per_neuron_bound",
    "linear",
    "log_alpha",
    "merge",
    "merged_outputs",
    "multi_index",
    "network_error_bound",
    "objective_gap_bound",
    "objective_gap_bound_discrete",
    "outputs",
    "prune",
    "pruned_error_bound",
    "sines",
    "squared_l2",
    "sup_norm",
    "sup_norm_bound",
    "train",
]
