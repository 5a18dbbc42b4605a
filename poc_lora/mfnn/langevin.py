"""Noisy gradient descent, the mean-field Langevin dynamics of a network with finitely many neurons.

    X ← X − η N ∇_X F(ρ_X) + sqrt(2 η λ) ξ,   ξ ~ N(0, I)

with learning rate η and temperature λ (Nitanda et al., ICML 2025). With mini-batches F is the mean over the samples of
the step's batch; a network takes every sample once an epoch, in an order of its own. With all samples, as η → 0, it
samples the law with density proportional to exp(−(N/λ) F(ρ_X)); a finite η adds a bias of its own, known exactly for
linear neurons (poc_lora.mfnn.gaussian).

Network j's path is a function of the seed, j, the sizes and the settings: it does not depend, by a bit, on which other
networks run beside it, nor on the number of threads. On a CPU every network is computed by one thread, and as many
networks run at once as torch has threads: threads that meet only at logged steps are not held up by a busy core.
"""

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from poc_lora import rng
from poc_lora.errors import RequestError, TrainingError
from poc_lora.mfnn.model import Objective, Samples

# Numbers drawn from one key. Making a generator costs as much as drawing 4,000 numbers, so small networks
# draw the noise of several steps at once.
NOISE_BLOCK = 2**15

WORTH_A_THREAD = 2**16  # neuron-samples of one step of one network

OnLog = Callable[[int, Tensor], None]


class Noise:
    """The noise ξ of one network: a function of (seed, network, step) and the network's shape [P, N].

    Drawn in float32 whatever the dtype: a float64 run has the noise of the float32 run.
    """

    def __init__(self, seed: int, network: int, shape: tuple[int, int], like: Tensor):
        self.seed, self.network, self.shape = seed, network, shape
        self.dtype, self.device = like.dtype, like.device
        self.steps = max(1, NOISE_BLOCK // math.prod(shape))
        self._block = -1
        self._drawn = torch.empty(0)

    def at(self, step: int) -> Tensor:
        """Returns the standard normal noise [P, N] of a step."""
        block, offset = divmod(step, self.steps)
        if block != self._block:
            key = rng.key(self.seed, self.network, "mfnn noise", block)
            self._drawn = rng.normal((self.steps, *self.shape), key, self.device).to(self.dtype)
            self._block = block
        return self._drawn[offset]


class Batches:
    """The mini-batches of one network: a function of (seed, network, step), the samples in a new order every epoch."""

    def __init__(self, objective: Objective, width: int, batch_size: int, seed: int, network: int):
        self.objective, self.width, self.batch_size = objective, width, batch_size
        self.seed, self.network = seed, network
        self._epoch = -1
        self._cut: list[Samples] = []

    def at(self, step: int) -> Samples:
        """Returns the samples of a step's batch, in slices."""
        epoch, number = divmod(step, steps_per_epoch(len(self.objective.inputs), self.batch_size))
        if epoch != self._epoch:
            order = rng.permutation(len(self.objective.inputs), rng.key(self.seed, self.network, "mfnn order", epoch))
            rows = torch.tensor(order, device=self.objective.inputs.device)
            self._cut = [self.objective.slices(self.width, part) for part in rows.split(self.batch_size)]
            self._epoch = epoch
        return self._cut[number]


def steps_per_epoch(samples: int, batch_size: int | None) -> int:
    """Returns the number of batches of `samples` samples, the last of which may be smaller; 1 for no batch size."""
    return 1 if batch_size is None else math.ceil(samples / batch_size)


def initial_particles(networks: Sequence[int], width: int, size: int, *, seed: int, std: float, like: Tensor) -> Tensor:
    """Returns N(0, std² I) particles [M, N, P] with the dtype and device of `like`, keyed by (seed, network)."""
    keys = [rng.key(seed, network, "mfnn initial") for network in networks]
    return torch.stack([rng.normal((width, size), key, like.device).to(like.dtype) * std for key in keys])


def train(
    objective: Objective,
    networks: Sequence[int],
    width: int,
    *,
    steps: int,
    lr: float,
    temperature: float,
    seed: int,
    batch_size: int | None = None,
    initial_std: float = 1.0,
    log_at: Sequence[int] = (),
    on_log: OnLog | None = None,
) -> Tensor:
    """Train M networks independently by noisy gradient descent.

    dtype and device are those of the objective's samples. Sets torch's number of threads to 1 while it runs, and
    restores it at the end.

    Args:
        objective: F, with the samples and the kind of neuron.
        networks: The M networks' numbers, which key initialisation and noise.
        width: N, the neurons of each network.
        steps: The number of steps.
        lr: The learning rate η.
        temperature: λ; 0 means no noise.
        seed: The seed from which all draws descend.
        batch_size: Samples of a step's gradient; None takes all of them. See `steps_per_epoch`.
        initial_std: Standard deviation of the initial particles, N(0, initial_std² I).
        log_at: Steps after which `on_log` is called; 0 is the start.
        on_log: Called as `on_log(step, particles)` with particles [M, N, P].

    Returns:
        The particles after the last step, [M, N, P].

    Raises:
        RequestError: For settings that are not valid.
        TrainingError: If particles are no longer finite.
    """
    _check(networks, width, steps, lr, temperature, objective.regularization)
    if batch_size is not None and not 1 <= batch_size <= len(objective.inputs):
        raise RequestError(
            f"batches of {batch_size} of {len(objective.inputs)} samples",
            where="mfnn.langevin.train",
            fix="batch_size from 1 to the number of samples, or None for all samples",
        )
    inputs = objective.inputs
    start = initial_particles(networks, width, objective.neuron.size, seed=seed, std=initial_std, like=inputs)
    states = [x.t().contiguous() for x in start]
    noises = [Noise(seed, network, (objective.neuron.size, width), inputs) for network in networks]
    whole = objective.slices(width)
    batches = [Batches(objective, width, batch_size, seed, network) for network in networks] if batch_size else []
    stop = threading.Event()
    noise_std = math.sqrt(2 * lr * temperature)

    @torch.inference_mode()
    def advance(j: int, first: int, last: int) -> None:
        x, noise = states[j], noises[j]
        workspace, gradient = objective.workspace(width), torch.empty_like(x)
        for step in range(first, last):
            if stop.is_set():
                return
            objective.data_gradient(x, batches[j].at(step) if batches else whole, workspace, gradient)
            x.mul_(1 - 2 * lr * objective.regularization).add_(gradient, alpha=-lr)
            if noise_std:
                x.add_(noise.at(step), alpha=noise_std)

    def particles() -> Tensor:
        found = torch.stack([x.t() for x in states])
        if not found.isfinite().all():
            bad = [network for network, x in zip(networks, states, strict=True) if not x.isfinite().all()]
            raise TrainingError(
                f"particles are no longer finite in {len(bad)} of {len(networks)} networks",
                where=f"network {bad[0]}, lr {lr}, temperature {temperature}",
                fix="lower the learning rate",
            )
        return found

    logged = sorted({step for step in log_at if 0 <= step <= steps}) if on_log else []
    done = 0
    with _workers(inputs.device, width * (batch_size or len(inputs))) as pool:
        try:
            for until in sorted({*logged, steps}):
                list(pool.map(advance, range(len(states)), [done] * len(states), [until] * len(states)))
                done = until
                if on_log and until in logged:
                    on_log(until, particles())
        finally:
            stop.set()  # after Ctrl-C the others end at their next step
    return particles()


@contextlib.contextmanager
def _workers(device: torch.device, neuron_samples: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of as many threads as torch uses, each computing alone.

    One thread for a GPU, which has its own queue, and for small networks, where Python takes longer than the computing.
    """
    threads = torch.get_num_threads()
    count = threads if device.type == "cpu" and neuron_samples >= WORTH_A_THREAD else 1
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(count) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


def _check(
    networks: Sequence[int], width: int, steps: int, lr: float, temperature: float, regularization: float
) -> None:
    wrong = None
    if not networks or len(set(networks)) != len(networks):
        wrong = "networks must be distinct numbers, at least one", "for example range(8)"
    elif width < 1 or steps < 0:
        wrong = f"width {width} must be at least 1 and steps {steps} at least 0", "give whole numbers"
    elif not (math.isfinite(lr) and lr > 0):
        wrong = f"lr must be positive, not {lr}", "for example 0.1"
    elif not (math.isfinite(temperature) and temperature >= 0):
        wrong = f"temperature must be at least 0, not {temperature}", "0 means no noise"
    elif lr * regularization >= 1:
        wrong = f"lr {lr} times regularization {regularization} is 1 or more: the dynamics diverge", "lower the lr"
    if wrong:
        raise RequestError(wrong[0], where="mfnn.langevin.train", fix=wrong[1])
