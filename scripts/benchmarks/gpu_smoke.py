"""The program's commands on the embedded model, on this machine's GPU, and whether they keep what is promised.

    python scripts/benchmarks/gpu_smoke.py OUT
    python scripts/benchmarks/gpu_smoke.py OUT --only resumed merge

Runs lie in OUT/smoke. OUT/smoke.jsonl has a line for each check as it ends: what it found, or its error. Two runs are
compared by their adapters: whether all bits agree, and the largest relative distance of a module's B·A.

first      24 steps of 8 adapters with a commit every 12, on which the other checks build
again      the same once more: all bits agree
resumed    interrupted by SIGINT after the first commit, then resumed: all bits agree
alone      adapter 0 without the others: close
cpu        8 steps without noise in float32 on the GPU and on the CPU: close
layers     gradients of layers that share an input, in bfloat16 and over a float8 base, and in float64: close
merge      the exact average; its rank is the sum of theirs
label, generate    the first questions by each protocol
float8     a float8 layer: how far it is from its reference in float32, forwards and backwards, relative to the norm;
           whether other rows keep their bits beside one of NaN; microseconds of its parts, and of a bfloat16 layer
kernels    dropout and cross-entropy, each compiled to one kernel, against themselves on the CPU
mean_field    networks of the theory experiments here and on the CPU, with noise, in float64: close
demo       the whole demo's accuracies; on a CPU they are base 80.4, average 83.2, merged 87.5, ensemble 89.5
"""

import argparse
import json
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sides import synchronise

from poc_lora import AdapterBank, evaluate, load_config, merge_folders, read_adapter, rng, train
from poc_lora.adapters.adapter import WEIGHTS_NAME
from poc_lora.errors import Interrupted
from poc_lora.fusion import fusing
from poc_lora.lora.dropout import drop
from poc_lora.mfnn import MEAN_SQUARED_ERROR, Objective, TanhProduct
from poc_lora.mfnn import train as train_networks
from poc_lora.microworld import DATA_DIR, MODEL_DIR
from poc_lora.models.float8 import Float8Linear, matmul, quantize_rows, quantized, reference_matmul
from poc_lora.models.load import default_device
from poc_lora.training.loss import fused_residual_, plain_residual

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"
SHORT = ("train.max_steps=24", "checkpoint.every_steps=12", "data.validation=40")
PLAIN = ("train.max_steps=8", "optim.temperature=0", "model.dtype=float32", "data.validation=0")


class Checks:
    """Each method is a check by its name."""

    def __init__(self, folder: Path):
        self.folder = folder

    def first(self) -> str:
        self._train("first", *SHORT)
        return f"{len(list((self.folder / 'first' / 'adapters').iterdir()))} adapters"

    def again(self) -> Any:
        self._train("again", *SHORT)
        return self._apart("first", "again")

    def resumed(self) -> Any:
        folder = self.folder / "resumed"
        ended = threading.Event()

        def interrupt() -> None:
            while not ended.wait(0.002):
                if (folder / "checkpoints" / "commit_00001").exists():
                    os.kill(os.getpid(), signal.SIGINT)  # as Ctrl-C does
                    return

        watch = threading.Thread(target=interrupt)
        watch.start()
        try:
            self._train("resumed", *SHORT)
        except Interrupted as problem:
            stopped = str(problem).splitlines()[0]
        else:
            raise RuntimeError("the run ended before it was interrupted")
        finally:
            ended.set()
            watch.join()
        train(load_config(folder / "config.yaml"), resume=True)
        return {"stopped": stopped, **self._apart("first", "resumed")}

    def alone(self) -> Any:
        self._train("alone", *SHORT, "adapters.count=1")
        return self._apart("first", "alone")

    def cpu(self) -> Any:
        self._train("on_gpu", *PLAIN)
        self._train("on_cpu", *PLAIN, device=torch.device("cpu"))
        return self._apart("on_gpu", "on_cpu")

    def layers(self) -> Any:
        exact = three_layers(torch.float64)
        return {
            name: {part: apart(found, right) for part, found, right in zip(("x", "factors"), sides, exact, strict=True)}
            for name, sides in (
                ("bfloat16", three_layers(torch.bfloat16)),
                ("float8", three_layers(torch.bfloat16, float8=True)),
            )
        }

    def merge(self) -> Any:
        return merge_folders([self.folder / "first"], self.folder / "first" / "merged").rank

    def label(self) -> Any:
        return averages(evaluate([self.folder / "first"], data=DATA_DIR, limit=50))

    def generate(self) -> Any:
        return averages(evaluate([self.folder / "first"], data=DATA_DIR, protocol="generate", limit=5))

    def float8(self) -> Any:
        device = default_device()
        tokens, d_in, d_out = (4096, 4096, 14336) if device.type == "cuda" else (24, 64, 96)
        linear = torch.nn.Linear(d_in, d_out, bias=False, device=device, dtype=torch.bfloat16).requires_grad_(False)
        x, dy = (torch.randn(tokens, d, device=device, dtype=torch.bfloat16) for d in (d_in, d_out))
        x.mul_(torch.rand(tokens, 1, device=device)).requires_grad_()
        layer, values, scale = Float8Linear(linear, device), *quantize_rows(x.detach())
        y = layer(x)
        y.backward(dy)
        (W, ones), (values_dy, scale_dy) = layer.for_backward(), quantize_rows(dy, layer.weight_scale)
        expected = reference_matmul(values, scale, layer.weight, layer.weight_scale)
        expected_dx = reference_matmul(values_dy, scale_dy, W, ones)
        wild = x.detach().clone()
        wild[1] = float("nan")
        others = [0, *range(2, tokens)]
        work: dict[str, Callable[[], object]] = {
            "layer": lambda: layer(x.detach()),
            "backward": lambda: layer(x).backward(dy),
            "quantised": lambda: quantized(dy, layer.weight_scale),
            "matmul": lambda: matmul(values, scale, layer.weight, layer.weight_scale, x.dtype),
            "bfloat16": lambda: linear(x.detach()),
            "bfloat16 with backward": lambda: linear(x).backward(dy),
        }
        if device.type == "cuda":
            how: Any = dict(out_dtype=torch.bfloat16, use_fast_accum=False)
            product = (values, layer.weight.t(), scale, layer.weight_scale.t())
            work["matmul summed in float32"] = lambda: torch._scaled_mm(*product, **how)
        return {
            "forward": apart(y, expected),
            "backward": apart(x.grad, expected_dx),
            "rounding, forward": apart(y, linear(x)),
            "one row, seven rows": [apart(layer(x[:rows]), expected[:rows]) for rows in (1, 7)],
            "other rows keep their bits": torch.equal(layer(wild)[others], y[others]),
            "us": {name: round(1e6 * seconds_of(call, device)) for name, call in work.items()},
        }

    def kernels(self) -> Any:
        x = torch.randn(4, 96, 1024)
        keys, salt = torch.tensor([5, -7, 2**62, -(2**63)]), rng.salt_words(0xDEADBEEF12345678)
        logits, target = torch.randn(300, 32_000).mul(5).bfloat16(), torch.randint(0, 32_000, (300,))
        losses, gradient = plain_residual(logits.float(), target)
        dropped, gpu = drop(x, keys, salt, 0.05), logits.cuda()
        with fusing():
            compiled = drop(x.cuda(), keys.cuda(), salt.cuda(), 0.05).cpu()
            torch._dynamo.mark_static(gpu, 1)
            found = fused_residual_(gpu, target.cuda()).cpu()
        return {
            "dropout_same_bits": torch.equal(compiled, dropped),
            "dropout_same_mask": torch.equal(compiled == 0, dropped == 0),
            "loss_distance": float((found - losses).norm() / losses.norm()),
            "gradient_distance": float((gpu.cpu().float() - gradient).norm() / gradient.norm()),
        }

    def mean_field(self) -> Any:
        sides = []
        for device in (default_device(), torch.device("cpu")):
            inputs = rng.normal((200, 5), rng.key(0, 0, "smoke"), device).double()
            objective = Objective(TanhProduct(5, 10.0), MEAN_SQUARED_ERROR, inputs, inputs[:, 0].tanh(), 0.1)
            how: Any = dict(steps=60, lr=0.1, temperature=1e-2, seed=0, batch_size=50)
            sides.append(train_networks(objective, range(3), 100, **how).cpu())
        return {"distance": apart(*sides)}

    def demo(self) -> Any:
        folder = self._train("demo")
        merge_folders([folder], folder / "merged")
        return averages(evaluate([folder], data=DATA_DIR))

    def _train(self, name: str, *overrides: str, device: torch.device | None = None) -> Path:
        folder = self.folder / name
        paths = {"model.name": MODEL_DIR, "data.train": [DATA_DIR], "output": folder}
        words = [f"{key}={json.dumps(value, default=str)}" for key, value in paths.items()]
        train(load_config(CONFIG, [*overrides, *words]), device=device)
        return folder

    def _apart(self, one: str, other: str) -> dict[str, Any]:
        """How two runs differ in the adapters that both have."""
        folders = [self.folder / run / "adapters" for run in (one, other)]
        worst, same_bits = 0.0, True
        for name in sorted({p.name for p in folders[0].iterdir()} & {p.name for p in folders[1].iterdir()}):
            same_bits &= len({(folder / name / WEIGHTS_NAME).read_bytes() for folder in folders}) == 1
            a, b = (read_adapter(folder / name).modules for folder in folders)
            for path in a:
                x, y = (f[path].scale * f[path].B.double() @ f[path].A.double() for f in (a, b))
                worst = max(worst, float((x - y).norm() / x.norm().clamp(min=1e-30)))
        return {"same_bits": same_bits, "worst_distance": worst}


def apart(found: Any, expected: torch.Tensor) -> float:
    return float((found.detach().float() - expected.detach()).norm() / expected.detach().norm())


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """The mean time of a call, of ten after three."""
    for number in range(13):
        if number == 3:
            synchronise(device)
            began = time.perf_counter()
        call()
    synchronise(device)
    return (time.perf_counter() - began) / 10


class OneInput(torch.nn.ModuleList):
    """Layers that all take the module's input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([layer(x) for layer in self], dim=-1)


def three_layers(dtype: torch.dtype, *, float8: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradients of an input and of 4 adapters of 3 layers, float64, with matmuls in `dtype` on the GPU.

    float8: those of the base are in float8.
    """
    draws = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draws).to("cuda", torch.bfloat16).to(dtype)  # the same values in any dtype

    linears = [torch.nn.Linear(256, width, bias=False) for width in (256, 128, 64)]
    model = OneInput(linears).requires_grad_(False).to("cuda", dtype)
    for linear in linears:
        linear.weight.copy_(drawn(linear.out_features, 256) / 16)
    if float8:
        for number, linear in enumerate(linears):
            model[number] = Float8Linear(linear, torch.device("cuda"))
    bank = AdapterBank(model, targets=["0", "1", "2"], rank=16, alpha=32, adapters=range(4))
    bank.weights.copy_(drawn(*bank.weights.shape) / 8)
    x = drawn(8, 32, 256).requires_grad_()
    (of_x,) = torch.autograd.grad(model(x), x, drawn(8, 32, 448))
    return of_x.double(), bank.gradients.double()


def averages(results: Any) -> dict[str, float]:
    """Accuracies in percent, averaged over benchmarks."""
    found = {name: getattr(results, name) for name in ("base", "average", "merged", "ensemble")}
    return {name: round(100 * scored.average.value, 1) for name, scored in found.items() if scored is not None}


def main() -> None:
    checks = [name for name in vars(Checks) if not name.startswith("_")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--only", nargs="*", choices=checks, default=checks, metavar="CHECK", help="beside first")
    a = parser.parse_args()
    every = Checks(a.out / "smoke")
    every.folder.mkdir(parents=True)
    with (a.out / "smoke.jsonl").open("w") as file:
        for name in checks:
            if name == "first" or name in a.only:
                print(json.dumps({name: found_by(getattr(every, name))}), file=file, flush=True)


def found_by(check: Callable[[], Any]) -> dict[str, Any]:
    began = time.monotonic()
    try:
        found = {"found": check()}
    except Exception as problem:
        found = {"failed": f"{type(problem).__name__}: {problem}"[:600], "traceback": traceback.format_exc()[-600:]}
    return found | {"s": round(time.monotonic() - began, 1)}


if __name__ == "__main__":
    main()
