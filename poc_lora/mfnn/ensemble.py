"""Merging and pruning networks, and their distance from a reference: functions of particles and of outputs."""

import torch
from torch import Tensor

from poc_lora import rng
from poc_lora.errors import RequestError


def merge(particles: Tensor) -> Tensor:
    """Merge M networks [M, N, P] into one of all their particles, [M·N, P], whose output is their mean output."""
    return particles.reshape(-1, particles.shape[-1])


def prune(particles: Tensor, keep: int, *, seed: int) -> Tensor:
    """Draw `keep` neurons of a network [N, P] without replacement: [keep, P].

    As the paper remarks, neurons of a trained network are nearly independent draws of one law, so any subset is a
    network of its own. Raises RequestError unless 1 <= keep <= N.
    """
    if not 1 <= keep <= len(particles):
        raise RequestError(f"cannot keep {keep} of {len(particles)} neurons", where="prune", fix="1 <= keep <= N")
    return particles[rng.permutation(len(particles), rng.key(seed, 0, "mfnn prune"))[:keep]]


def merged_outputs(outputs: Tensor, members: int) -> Tensor:
    """Returns outputs [G, n] of the merges of disjoint, consecutive groups of `members` networks, from outputs [M, n].

    G = M // members; networks that do not fill a group are left out. Raises RequestError unless 1 <= members <= M.
    """
    groups = len(outputs) // members if members > 0 else 0
    if not groups:
        raise RequestError(f"cannot merge {members} of {len(outputs)} networks", where="merged_outputs")
    return outputs[: groups * members].view(groups, members, -1).mean(1)


def random_merges(outputs: Tensor, members: int, subsets: int, *, seed: int) -> Tensor:
    """Returns outputs [subsets, n] of merges of random subsets of `members` networks, from outputs [M, n].

    A subset has no network twice. Subsets are keyed by (seed, members). Raises RequestError unless 1 <= members <= M.
    """
    if not 1 <= members <= len(outputs):
        raise RequestError(f"cannot merge {members} of {len(outputs)} networks", where="random_merges")
    keys = [rng.key(seed, 0, "mfnn subset", members, str(i)) for i in range(subsets)]
    return torch.stack([outputs[rng.permutation(len(outputs), key)[:members]].mean(0) for key in keys])


def sup_norm(outputs: Tensor, reference: Tensor) -> Tensor:
    """Returns the maximum over inputs of |h − h_ref|: [...] from outputs [..., n] and reference [n]."""
    return (outputs - reference).abs().amax(-1)


def squared_l2(outputs: Tensor, reference: Tensor) -> Tensor:
    """Returns the mean over inputs of (h − h_ref)²: [...] from outputs [..., n] and reference [n]."""
    return (outputs - reference).square().mean(-1)


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Returns the mean of independent values [m] and its standard error, NaN for a single value."""
    values = values.double()
    return values.mean().item(), (values.std() / len(values) ** 0.5).item() if len(values) > 1 else float("nan")


def log_slope(x: Tensor, y: Tensor) -> float:
    """Returns the least-squares slope of log y against log x."""
    a, b = torch.log(x.double()), torch.log(y.double())
    return ((a - a.mean()) @ (b - b.mean()) / (a - a.mean()).square().sum()).item()
