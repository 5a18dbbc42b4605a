"""The dynamics: the update of the docstring, noise of the right law, and paths that depend on their own key only."""

import itertools
import math
import threading

import pytest
import torch

from poc_lora import rng
from poc_lora.errors import RequestError, TrainingError
from poc_lora.mfnn import langevin
from poc_lora.mfnn.langevin import Batches, Noise, initial_particles, steps_per_epoch, train
from poc_lora.mfnn.model import SQUARED, Linear, Objective, Tanh, TanhProduct, outputs


def problem(neuron=None, samples=30, dtype=torch.float32, regularization=0.02):
    neuron = neuron or Tanh(2, 3.0)
    inputs = rng.normal((samples, neuron.dim), rng.key(0, 0, "test inputs")).to(dtype)
    return Objective(neuron, SQUARED, inputs, inputs[:, 0].sign(), regularization)


def run(objective, networks=(0, 1), width=6, **changed):
    return train(objective, networks, width, **{"steps": 20, "lr": 0.1, "temperature": 0.01, "seed": 3, **changed})


@pytest.mark.parametrize("neuron", [Tanh(2, 3.0), TanhProduct(2, 3.0), Linear(2)], ids=lambda n: type(n).__name__)
@pytest.mark.parametrize("temperature", [0.0, 0.05])
def test_a_step_is_the_one_in_the_docstring(neuron, temperature):
    objective, width = problem(neuron, dtype=torch.float64), 6
    x = initial_particles((4, 9), width, neuron.size, seed=3, std=0.5, like=objective.inputs)
    noises = [Noise(3, network, (neuron.size, width), objective.inputs) for network in (4, 9)]
    for step in range(5):
        xi = torch.stack([noise.at(step).t() for noise in noises])
        x = x - 0.1 * objective.gradient(x) + math.sqrt(2 * 0.1 * temperature) * xi
    found = run(objective, (4, 9), width, steps=5, temperature=temperature, initial_std=0.5)
    assert torch.allclose(found, x, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("neuron", [Tanh(2, 3.0), TanhProduct(2, 3.0)], ids=lambda n: type(n).__name__)
@pytest.mark.parametrize("batch_size", [None, 7])
def test_training_is_the_plain_loop_with_autograd(neuron, batch_size):
    """The loss as it is written, its gradient by autograd, the samples of each step's batch by their numbers."""
    objective, width, lr, temperature = problem(neuron, dtype=torch.float64), 6, 0.1, 0.05
    x = initial_particles((4,), width, neuron.size, seed=3, std=0.5, like=objective.inputs)[0].requires_grad_()
    noise = Noise(3, 4, (neuron.size, width), objective.inputs)
    step = 0
    for epoch in range(3):
        order = torch.arange(30) if batch_size is None else rng.permutation(30, rng.key(3, 4, "mfnn order", epoch))
        for rows in torch.as_tensor(order).split(batch_size or 30):
            h = neuron.values(x.t(), objective.inputs[rows]).mean(1)
            fit = objective.loss.value(h, objective.targets[rows]).mean()
            (slope,) = torch.autograd.grad(fit + objective.regularization * x.square().sum(1).mean(), x)
            with torch.no_grad():
                x -= lr * width * slope
                x += math.sqrt(2 * lr * temperature) * noise.at(step).t()
            step += 1
    assert step == 3 * steps_per_epoch(30, batch_size) == (3 if batch_size is None else 15)
    found = run(
        objective, (4,), width, steps=step, lr=lr, temperature=temperature, initial_std=0.5, batch_size=batch_size
    )
    assert torch.allclose(found[0], x, rtol=1e-12, atol=1e-13)


def test_every_sample_is_in_one_batch_of_an_epoch():
    objective = problem(Linear(2), samples=10)
    batches = Batches(objective, 6, 4, seed=0, network=1)
    epochs = [torch.cat([slices[0][0] for slices in map(batches.at, range(3 * e, 3 * e + 3))]) for e in range(2)]
    assert [len(slices[0][2]) for slices in map(batches.at, range(3))] == [4, 4, 2]
    for seen in epochs:
        assert torch.equal(seen.sort(0).values, objective.inputs.sort(0).values)
    assert not torch.equal(*epochs)
    other = Batches(objective, 6, 4, seed=0, network=2)
    assert not torch.equal(other.at(0)[0][0], batches.at(0)[0][0])


@pytest.mark.parametrize("batch_size", [None, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
# 67 neurons: rows that fill no vector register, where slices of a larger tensor would be computed in other pieces
@pytest.mark.parametrize("width", [6, 67])
def test_a_networks_path_does_not_depend_on_the_others_by_a_bit(dtype, width, batch_size):
    objective = problem(TanhProduct(2, 3.0), samples=700, dtype=dtype)
    together = run(objective, range(7), width, batch_size=batch_size)
    assert torch.equal(run(objective, (5,), width, batch_size=batch_size)[0], together[5])
    assert torch.equal(run(objective, (6, 2), width, batch_size=batch_size), together[[6, 2]])


@pytest.mark.parametrize("batch_size", [None, 300])
def test_a_networks_path_does_not_depend_on_threads_by_a_bit(monkeypatch, batch_size):
    objective, threads = problem(samples=1000), torch.get_num_threads()
    monkeypatch.setattr(langevin, "WORTH_A_THREAD", 0)
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(run(objective, range(5), 200, batch_size=batch_size))
            assert torch.get_num_threads() == count  # given back
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_path_does_not_depend_on_what_is_logged():
    objective, seen = problem(), {}
    last = run(objective, log_at=(0, 7, 20, 99), on_log=seen.__setitem__)
    assert list(seen) == [0, 7, 20]
    assert torch.equal(last, run(objective))
    assert torch.equal(seen[7], run(objective, steps=7))
    assert torch.equal(seen[20], last)
    start = initial_particles((0, 1), 6, 3, seed=3, std=1.0, like=objective.inputs)
    assert torch.equal(seen[0], start)


def test_seeds_and_networks_have_paths_of_their_own():
    objective = problem()
    a, b = run(objective, (0, 1))
    assert not torch.equal(a, b)
    assert not torch.equal(a, run(objective, (0,), seed=4)[0])


def test_noise_is_keyed_by_step_and_standard_normal():
    like, shape = torch.empty(0), (3, 100)
    noise = Noise(0, 5, shape, like)
    steps = 2 * noise.steps + 3
    drawn = torch.stack([noise.at(step) for step in range(steps)])
    again = Noise(0, 5, shape, like)
    for step in (steps - 1, 0, noise.steps, noise.steps - 1):  # in any order
        assert torch.equal(again.at(step), drawn[step])
    assert torch.equal(Noise(0, 5, shape, torch.empty(0, dtype=torch.float64)).at(1), drawn[1].double())
    assert not torch.equal(Noise(0, 6, shape, like).at(0), drawn[0])
    n = drawn.numel()
    # four standard errors of the mean, of the variance and of the correlation of consecutive steps
    assert abs(drawn.mean()) < 4 / math.sqrt(n)
    assert abs(drawn.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((drawn[1:] * drawn[:-1]).mean()) < 4 / math.sqrt(n)


def test_large_networks_draw_step_by_step():
    assert Noise(0, 0, (101, 800), torch.empty(0)).steps == 1
    assert Noise(0, 0, (3, 50), torch.empty(0)).steps == langevin.NOISE_BLOCK // 150


def test_without_noise_the_objective_falls():
    objective, values = problem(), []

    def keep(step, x):
        fit = objective.loss.value(outputs(objective.neuron, x, objective.inputs), objective.targets).mean(-1)
        values.append(fit + objective.regularization * x.square().sum(-1).mean(-1))

    run(objective, temperature=0.0, lr=0.02, log_at=range(0, 21, 5), on_log=keep)
    for before, after in itertools.pairwise(values):
        assert (after < before).all()


def test_a_float64_run_has_the_noise_of_the_float32_run():
    single, double = (run(problem(dtype=dtype)) for dtype in (torch.float32, torch.float64))
    assert double.dtype == torch.float64
    assert torch.allclose(single.double(), double, atol=1e-4)  # 20 steps of rounding at 1e-7


def test_divergence_names_the_network_and_the_remedy():
    inputs = torch.full((4, 2), 1e6)
    objective = Objective(Linear(2), SQUARED, inputs, inputs[:, 0], 0.0)
    with pytest.raises(TrainingError, match=r"no longer finite in 2 of 2 networks(.|\n)*lower the learning rate"):
        run(objective, steps=50)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"networks": ()}, "distinct"),
        ({"networks": (1, 1)}, "distinct"),
        ({"width": 0}, "width 0"),
        ({"steps": -1}, "steps -1"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": float("nan")}, "lr must be positive"),
        ({"lr": 50.0}, "diverge"),
        ({"batch_size": 0}, "batches of 0 of 30"),
        ({"batch_size": 31}, "batches of 31 of 30"),
        ({"temperature": -1e-3}, "temperature must be at least 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, expected):
    with pytest.raises(RequestError, match=expected):
        run(problem(), **change)


def test_an_interruption_stops_every_thread(monkeypatch):
    monkeypatch.setattr(langevin, "WORTH_A_THREAD", 0)
    before = threading.active_count()

    def interrupt(step, particles):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(problem(), range(4), steps=10**9, log_at=(2,), on_log=interrupt)
    assert threading.active_count() == before
