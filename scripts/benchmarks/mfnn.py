"""Neuron-samples per second of mean-field training, against a loop that trains one network after another with autograd.

    python scripts/benchmarks/mfnn.py --baseline mfnn_loop.py --out FILE

In alternating rounds, in float32: this library, the loop (a program that prints one JSON line with
neuron_samples_per_s), and the two matrix products of a step alone, which bound the rate. The first round is not
counted.
On a GPU, `--device cuda`: this library alone, larger, against what the memory's bandwidth allows.
"""

import argparse
import json
import shlex
import statistics
import subprocess
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
from poc_lora.mfnn import SQUARED, Objective, Tanh, train

SHAPES = {
    "d2": {"networks": 8, "neurons": 256, "samples": 500, "dim": 2, "steps": 500},
    "d100": {"networks": 4, "neurons": 800, "samples": 400, "dim": 100, "steps": 100},
}
GPU_SHAPES = {
    "d2": {"networks": 8, "neurons": 16384, "samples": 16384, "dim": 2, "steps": 20},
    "d100": {"networks": 8, "neurons": 16384, "samples": 16384, "dim": 100, "steps": 20},
}
SETTINGS = {"lr": 0.1, "temperature": 1e-3, "regularization": 1e-3, "bound": 5.0}
# A neuron-sample's float32 on its way: written by the product, read and written by sigmoid, read by the mean, read and
# written by S(1 − S), read by the second product.
BYTES_PER_NEURON_SAMPLE = 4 * 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", type=Path, help="the loop's program; without it the library is timed alone")
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--divide-steps", type=int, default=1, help="so many times fewer steps, to try the script")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    a = parser.parse_args()
    device = torch.device(a.device)
    shapes = {
        name: shape | {"steps": shape["steps"] // a.divide_steps}
        for name, shape in (SHAPES if device.type == "cpu" else GPU_SHAPES).items()
        if name in a.shape
    }
    report: dict[str, Any] = {"device": str(device), "shapes": {}}
    for name, shape in shapes.items():
        sides: dict[str, Callable[[], float]] = {
            "poc_lora": partial(library, shape, device, SETTINGS["temperature"]),
            "poc_lora_without_noise": partial(library, shape, device, 0.0),
        }
        if device.type == "cpu":
            sides["matmuls"] = partial(matmuls, shape)
            if a.baseline:
                sides["loop"] = partial(loop, a.baseline, shape)
        else:
            sides["bandwidth_limit"] = lambda: bandwidth(device) / BYTES_PER_NEURON_SAMPLE
        report["shapes"][name] = shape | compare(name, sides, a.rounds)
    words = [Path(word).name if word == str(a.baseline) else word for word in sys.argv[1:]]
    report |= {
        "unit": "neuron-samples per second",
        "settings": SETTINGS | {"dtype": "float32", "threads": torch.get_num_threads()},
        "command": shlex.join(["python", "scripts/benchmarks/mfnn.py", *words]),
        **environment(),
    }
    print(json.dumps(report))
    if a.out:
        write_json(a.out, report)


def compare(name: str, sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, Any]:
    """Rates of all sides in alternating rounds, and the library's ratio to each of the others."""
    found: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(1 + rounds):
        for side, measure in sides.items():
            found[side].append(measure())
        shown = ", ".join(f"{side} {rates[-1] / 1e6:,.0f} M/s" for side, rates in found.items())
        print(f"{name}, round {number} of {rounds}: {shown}", file=sys.stderr)
    counted = {side: rates[1:] for side, rates in found.items()}
    ratios = {
        side: [ours / theirs for ours, theirs in zip(counted["poc_lora"], rates, strict=True)]
        for side, rates in counted.items()
        if side != "poc_lora"
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


def work(shape: dict[str, int]) -> int:
    """Neuron-samples of a run."""
    return shape["networks"] * shape["neurons"] * shape["samples"] * shape["steps"]


def library(shape: dict[str, int], device: torch.device, temperature: float) -> float:
    """This library's rate, initialisation included, on the loop's data and settings."""
    inputs = rng.normal((shape["samples"], shape["dim"]), rng.key(0, 0, "benchmark inputs"), device)
    neuron = Tanh(shape["dim"], SETTINGS["bound"])
    objective = Objective(neuron, SQUARED, inputs, torch.tanh(2 * inputs[:, 0]), SETTINGS["regularization"])
    start = time.perf_counter()
    train(
        objective,
        range(shape["networks"]),
        shape["neurons"],
        steps=shape["steps"],
        lr=SETTINGS["lr"],
        temperature=temperature,
        seed=0,
    )
    if device.type != "cpu":
        torch.cuda.synchronize(device)
    return work(shape) / (time.perf_counter() - start)


def loop(program: Path, shape: dict[str, int]) -> float:
    """The baseline's rate, by its own clock."""
    sizes = [word for key, value in shape.items() for word in (f"--{key}", str(value))]
    settings = ["--lr", SETTINGS["lr"], "--temperature", SETTINGS["temperature"]]
    settings += ["--weight-decay", SETTINGS["regularization"], "--scale", SETTINGS["bound"]]
    ended = subprocess.run(
        [sys.executable, str(program), *sizes, *map(str, settings)], stdout=subprocess.PIPE, text=True, check=True
    )
    return float(json.loads(ended.stdout)["neuron_samples_per_s"])


def matmuls(shape: dict[str, int]) -> float:
    """The rate at which the two products of every step run alone: the better of two ways to use all threads.

    One product after another on all threads, or each network's on a thread of its own.
    """
    networks, neurons, samples, rows = shape["networks"], shape["neurons"], shape["samples"], shape["dim"] + 1
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
