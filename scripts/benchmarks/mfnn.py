"""Neuron-samples per second of mean-field training, against a loop that trains one network after another with autograd.

    python scripts/benchmarks/mfnn.py --out FILE

In alternating rounds, in float32, with the paper's neuron: this library, the loop, both also without noise, and the two
matrix products of a step alone, which bound the rate. The first round is not counted. Both sides take the same samples,
batches and settings, and noise of the same law. On a GPU, `--device cuda`: larger shapes, against what the memory's
bandwidth allows instead of the products.
"""

import argparse
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from poc_lora import rng
from poc_lora.environment import environment
from poc_lora.files import write_json
from poc_lora.mfnn import MEAN_SQUARED_ERROR, Objective, TanhProduct, train
from poc_lora.mfnn.langevin import steps_per_epoch

Shape = dict[str, Any]

SHAPES: dict[str, Shape] = {
    "circle_batches": {"networks": 4, "neurons": 500, "samples": 160, "dim": 2, "batch_size": 32, "steps": 1000},
    "regression_batches": {"networks": 4, "neurons": 800, "samples": 400, "dim": 100, "batch_size": 32, "steps": 260},
    "circle": {"networks": 4, "neurons": 500, "samples": 160, "dim": 2, "batch_size": None, "steps": 500},
    "regression": {"networks": 4, "neurons": 800, "samples": 400, "dim": 100, "batch_size": None, "steps": 100},
}
GPU_SHAPES: dict[str, Shape] = {
    "circle": {"networks": 8, "neurons": 16384, "samples": 16384, "dim": 2, "batch_size": None, "steps": 20},
    "regression": {"networks": 8, "neurons": 16384, "samples": 16384, "dim": 100, "batch_size": None, "steps": 20},
    "regression_batches": {
        "networks": 8,
        "neurons": 16384,
        "samples": 16384,
        "dim": 100,
        "batch_size": 1024,
        "steps": 160,
    },
}
SETTINGS = {"lr": 0.1, "temperature": 1e-2, "regularization": 0.1, "bound": 10.0}
# A neuron-sample's float32 on its way: written by the product, read and written by sigmoid, read by the sums over
# neurons and over samples, read and written by S(1 − S) and by the factor tanh(a), read by the second product.
BYTES_PER_NEURON_SAMPLE = 4 * 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--divide-steps", type=int, default=1, help="so many times fewer steps, to try the script")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    a = parser.parse_args()
    device = torch.device(a.device)
    shapes = SHAPES if device.type == "cpu" else GPU_SHAPES
    chosen = {
        name: shape | {"steps": shape["steps"] // a.divide_steps} for name, shape in shapes.items() if name in a.shape
    }
    report: dict[str, Any] = {
        "device": str(device),
        "shapes": {name: shape | compare(name, shape, device, a.rounds) for name, shape in chosen.items()},
    }
    report |= {
        "unit": "neuron-samples per second",
        "settings": SETTINGS | {"dtype": "float32", "threads": torch.get_num_threads()},
        "command": shlex.join(["python", "scripts/benchmarks/mfnn.py", *sys.argv[1:]]),
        **environment(),
    }
    print(json.dumps(report))
    if a.out:
        write_json(a.out, report)


def sides_of(shape: Shape, device: torch.device) -> dict[str, Callable[[], float]]:
    """What measures the rate of each side, and what bounds it."""
    noisy = SETTINGS["temperature"]
    sides: dict[str, Callable[[], float]] = {
        "poc_lora": partial(library, shape, device, noisy),
        "loop": partial(loop, shape, device, noisy),
        "poc_lora_without_noise": partial(library, shape, device, 0.0),
        "loop_without_noise": partial(loop, shape, device, 0.0),
    }
    if device.type == "cpu":
        sides["matmuls"] = partial(matmuls, shape)
    else:
        sides["bandwidth_limit"] = lambda: bandwidth(device) / BYTES_PER_NEURON_SAMPLE
    return sides


def compare(name: str, shape: Shape, device: torch.device, rounds: int) -> dict[str, Any]:
    """Rates of all sides in alternating rounds, and the library's ratio to the others."""
    sides = sides_of(shape, device)
    found: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(1 + rounds):
        for side, measure in sides.items():
            found[side].append(measure())
        shown = ", ".join(f"{side} {rates[-1] / 1e6:,.0f} M/s" for side, rates in found.items())
        print(f"{name}, round {number} of {rounds}: {shown}", file=sys.stderr)
    counted = {side: rates[1:] for side, rates in found.items()}
    pairs = {side: ("poc_lora", side) for side in counted if side not in ("poc_lora", "loop_without_noise")}
    pairs["loop, both without noise"] = ("poc_lora_without_noise", "loop_without_noise")
    ratios = {
        name: [ours / theirs for ours, theirs in zip(counted[first], counted[second], strict=True)]
        for name, (first, second) in pairs.items()
    }
    return {
        "rates": {
            side: {"median": round(statistics.median(rates)), "rounds": [round(rate) for rate in rates]}
            for side, rates in counted.items()
        },
        "poc_lora_over": {
            side: {
                "median": round(statistics.median(values), 3),
                "range": [round(min(values), 3), round(max(values), 3)],
            }
            for side, values in ratios.items()
        },
    }


def batch(shape: Shape) -> int:
    """Samples of a step."""
    return int(shape["batch_size"] or shape["samples"])


def work(shape: Shape) -> float:
    """Neuron-samples of a run of whole epochs."""
    epochs = shape["steps"] / steps_per_epoch(shape["samples"], shape["batch_size"])
    return float(shape["networks"] * shape["neurons"] * shape["samples"] * epochs)


def case(shape: Shape, device: torch.device) -> Objective:
    """The objective of both sides."""
    inputs = rng.normal((shape["samples"], shape["dim"]), rng.key(0, 0, "benchmark inputs"), device)
    neuron = TanhProduct(shape["dim"], SETTINGS["bound"])
    return Objective(neuron, MEAN_SQUARED_ERROR, inputs, torch.tanh(2 * inputs[:, 0]), SETTINGS["regularization"])


def library(shape: Shape, device: torch.device, temperature: float) -> float:
    """This library's rate, initialisation included."""
    objective = case(shape, device)
    start = time.perf_counter()
    train(
        objective,
        range(shape["networks"]),
        shape["neurons"],
        steps=shape["steps"],
        lr=SETTINGS["lr"],
        temperature=temperature,
        seed=0,
        batch_size=shape["batch_size"],
    )
    return work(shape) / seconds_since(start, device)


def loop(shape: Shape, device: torch.device, temperature: float) -> float:
    """The rate of the plain loop: the formulas as they are written, gradients by autograd, initialisation included."""
    objective = case(shape, device)
    inputs, targets, neurons = objective.inputs, objective.targets, shape["neurons"]
    torch.manual_seed(0)
    start = time.perf_counter()
    for _ in range(shape["networks"]):
        w = torch.randn(neurons, shape["dim"], device=device, requires_grad=True)
        b, a = (torch.randn(neurons, device=device, requires_grad=True) for _ in range(2))
        batches: list[torch.Tensor] = []
        for _ in range(shape["steps"]):
            z, y = inputs, targets
            if shape["batch_size"]:
                batches = batches or list(torch.randperm(len(inputs), device=device).split(batch(shape)))
                rows = batches.pop()
                z, y = inputs[rows], targets[rows]
            h = (SETTINGS["bound"] * torch.tanh(a) * torch.tanh(z @ w.T + b)).mean(1)
            squares = w.square().sum() + b.square().sum() + a.square().sum()
            loss = (h - y).square().mean() + SETTINGS["regularization"] * squares / neurons
            loss.backward()
            with torch.no_grad():
                for x in (w, b, a):
                    x -= SETTINGS["lr"] * neurons * x.grad
                    if temperature:
                        x += math.sqrt(2 * SETTINGS["lr"] * temperature) * torch.randn_like(x)
                    x.grad = None
    return work(shape) / seconds_since(start, device)


def seconds_since(start: float, device: torch.device) -> float:
    """Seconds since `start`, once the device has done all it was given."""
    if device.type != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def matmuls(shape: Shape) -> float:
    """The rate at which the two products of every step run alone: the better of two ways to use all threads.

    One product after another on all threads, or each network's on a thread of its own.
    """
    networks, neurons, samples, rows = shape["networks"], shape["neurons"], batch(shape), shape["dim"] + 1
    features = torch.randn(samples, rows)
    features_t = features.t().contiguous()
    state = [
        (torch.randn(rows, neurons), torch.empty(samples, neurons), torch.empty(rows, neurons)) for _ in range(networks)
    ]

    def multiply(network: int) -> None:
        x, values, gradient = state[network]
        for _ in range(shape["steps"]):
            torch.mm(features, x, out=values)
            torch.mm(features_t, values, out=gradient)

    threads = torch.get_num_threads()
    start = time.perf_counter()
    for network in range(networks):
        multiply(network)
    rates = [work(shape) / (time.perf_counter() - start)]
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            start = time.perf_counter()
            list(pool.map(multiply, range(networks)))
            rates.append(work(shape) / (time.perf_counter() - start))
    finally:
        torch.set_num_threads(threads)
    return max(rates)


def bandwidth(device: torch.device) -> float:
    """Bytes per second that a copy of 1 GiB reads and writes."""
    source = torch.empty(2**28, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(10):
        target.copy_(source)
    torch.cuda.synchronize(device)
    return 10 * 2 * source.nbytes / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
