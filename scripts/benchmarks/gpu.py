"""What there is to know about this library on one GPU, in order of value, within a few minutes.

    python scripts/benchmarks/gpu.py --out gpu
    python scripts/benchmarks/gpu.py --out gpu --seconds 120 --only packed_4096 trainer
    python scripts/benchmarks/gpu.py --out gpu --shape 1b

Needs a CUDA device, this checkout as the working directory, and its package in the environment or on PYTHONPATH. Python
3.12 with torch 2.11 for CUDA 13.0, transformers 5.17, peft, accelerate and what they need is enough but for pydantic.
Where there is no network, bring that as wheels: `pip download pydantic==2.13.4 --only-binary :all: --python-version
3.12 --dest wheels` elsewhere, then `pip install --no-index --no-deps --target site wheels/*.whl` and PYTHONPATH=site:.
there. bitsandbytes, which nf4 needs, comes in the same way. On a machine that is lent for a time, leave it the seconds
that it takes to start and to end:

    timeout 420 python scripts/benchmarks/gpu.py --out gpu --seconds 400 2>&1 | tee gpu.log

Every stage stands by itself. One that fails is noted with its traceback, and the next one runs; one that wants more
seconds than are left is passed over. OUT/facts.json is written after every stage, OUT/profile_*.txt with each profile
and OUT/smoke.jsonl with each check of the program, so that whatever ends the process early, the rest is kept.

runs_at_all        four steps of the embedded model by the command line, in a process of its own
ceilings           what the card gives: see gpu_ceilings.py
model              a random Llama of --shape, made on the card once, for all below but smoke and the last two
packed_4096        8 adapters of rank 32 in one pack, batches of 16 rows, micro-batches of 4,096 tokens
trainer, loop      the same rows by transformers.Trainer over PEFT, or a bare loop: see gpu_shape.py for what is equal
compiled_*         packed with train.compile
dropout_4096, compiled_dropout_4096         packed with dropout of 0.05, without and with train.compile
liger              packed with Liger's kernels in place of train.compile's, where liger_kernel 0.8.5 is on PYTHONPATH
cudnn_4096         packed with cuDNN's attention, which the library itself leaves out
checkpointed_16384, trainer_checkpointed    both with gradient checkpointing
fp8_4096, compiled_fp8_8192    packed with the base's matmuls in float8
labels             answers by the label protocol: of the base, of 8 adapters in one pass or one by one, of their merge
nf4_4096           packed on the same model in 4 bits
profile_*          kernels by the time they take in one step of packed, or in training on its rows
smoke              the program's commands on the embedded model: see gpu_smoke.py
mean_field         networks of the theory experiments against a loop with autograd: see mfnn.py
shape_1b           packed, compiled and trainer on a model of 1B parameters
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poc_lora.__main__ import use_expandable_segments
from poc_lora.files import write_atomic

if TYPE_CHECKING:
    from gpu_shape import Shape

ROOT = Path(__file__).resolve().parents[2]
Facts = dict[str, Any]


class Stages:
    """Runs stages one after another and keeps what each of them found.

    seconds: for all of them together, from now on. only: the names of those to run, all where it is empty.
    """

    def __init__(self, out: Path, seconds: float, only: Collection[str] = ()):
        self.path, self.only = out / "facts.json", only
        self.began = time.monotonic()
        self.end = self.began + seconds
        self.facts: dict[str, Facts] = {}
        out.mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        return self.end - time.monotonic()

    def run(self, name: str, seconds: float, work: Callable[[], Facts]) -> None:
        """Keep what `work` returns, or why it failed; leave it out where fewer than `seconds` are left."""
        if self.only and name not in self.only:
            return
        began = time.monotonic()
        if self.left() < seconds:
            found: Facts = {"skipped": f"it wants {seconds:.0f} s, {max(0, self.left()):.0f} are left"}
        else:
            try:
                found = work()
            except BaseException as problem:  # an interrupt too: what was found before it is worth keeping
                found = {
                    "failed": f"{type(problem).__name__}: {problem}"[:600],
                    "traceback": traceback.format_exc()[-1500:],
                }
                if not isinstance(problem, Exception):
                    self.end = began  # nothing else is begun
            gc.collect()  # what the traceback held, tensors among it
        self.facts[name] = {**found, "stage_s": round(time.monotonic() - began, 1)}
        write_atomic(self.path, json.dumps(self.facts, indent=1) + "\n")
        print(f"[{time.monotonic() - self.began:5.0f} s] {name}: {json.dumps(self.facts[name])[:700]}", flush=True)


class Once:
    """What `make` returns, made at the first call. A failure is raised again at later calls, without another try."""

    def __init__(self, make: Callable[[], Any]):
        self._make, self._made, self._problem = make, None, ""

    def __call__(self) -> Any:
        if self._problem:
            raise RuntimeError(self._problem)
        if self._made is None:
            self._problem = "it could not be made before"
            self._made = self._make()
            self._problem = ""
        return self._made


def runs_at_all(folder: Path) -> Facts:
    command = [sys.executable, "-m", "poc_lora", "train", "configs/demo.yaml", "train.max_steps=4"]
    done = subprocess.run(
        [*command, f"output={folder / 'four_steps'}"], cwd=ROOT, capture_output=True, text=True, timeout=90
    )
    if done.returncode:
        raise RuntimeError(f"exit status {done.returncode}: {done.stderr[-500:]}")
    return {"said": done.stdout[-400:]}


def smoke(out: Path, seconds: float) -> Facts:
    """The checks of gpu_smoke.py, in a process of its own: after a CUDA error in one, no more runs in that process."""
    command = [sys.executable, str(Path(__file__).with_name("gpu_smoke.py")), str(out)]
    found: Facts = {}
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
        if done.returncode:
            found = {"exit_status": done.returncode, "stderr": done.stderr[-800:]}
    except subprocess.TimeoutExpired:
        found = {"stopped_after_s": round(seconds)}
    lines = (out / "smoke.jsonl").read_text().splitlines() if (out / "smoke.jsonl").exists() else []
    return found | {name: value for line in lines for name, value in json.loads(line).items()}


def measure_shape(stages: Stages, name: str, out: Path, folder: Path) -> None:
    """The stages on a random model of shape `name`, and smoke among them, which is worth more than the later ones."""
    from gpu_shape import Shape, in_float8, quantize

    shape = Once(lambda: Shape(name))

    def on_shape(stage: str, seconds: float, work: "Callable[[Shape], Facts]") -> None:
        stages.run(stage, seconds, lambda: work(shape()))

    def fp8(shape: "Shape", **how: Any) -> Facts:
        with in_float8(shape.work.model):
            return shape.packed(quantization="fp8", **how)

    def nf4(shape: "Shape") -> Facts:
        quantize(shape.work.model)
        return shape.packed(quantization="nf4")

    on_shape("model", 20, lambda s: s.made)
    on_shape("packed_4096", 25, lambda s: s.packed())
    on_shape("trainer", 25, lambda s: s.alone("trainer"))
    on_shape("compiled_4096", 35, lambda s: s.packed(compile=True))
    on_shape("loop", 20, lambda s: s.alone("loop"))
    on_shape("profile_packed", 20, lambda s: s.packed(profile=out / "profile_packed.txt"))
    stages.run("smoke", 70, lambda: smoke(out, min(150.0, stages.left() - 5)))
    on_shape("profile_compiled", 20, lambda s: s.packed(compile=True, profile=out / "profile_compiled.txt"))
    on_shape("profile_trainer", 20, lambda s: s.alone("trainer", profile=out / "profile_trainer.txt"))
    on_shape("fp8_4096", 25, fp8)
    on_shape("compiled_fp8_8192", 30, lambda s: fp8(s, tokens=8192, compile=True))
    on_shape("profile_fp8", 20, lambda s: fp8(s, tokens=8192, compile=True, profile=out / "profile_fp8.txt"))
    on_shape("labels", 25, lambda s: s.labels())
    on_shape("dropout_4096", 25, lambda s: s.packed(dropout=0.05))
    on_shape("compiled_dropout_4096", 35, lambda s: s.packed(dropout=0.05, compile=True))
    on_shape("liger", 30, lambda s: s.packed(liger=True))
    on_shape("packed_8192", 25, lambda s: s.packed(tokens=8192))
    on_shape("compiled_8192", 25, lambda s: s.packed(tokens=8192, compile=True))
    on_shape("cudnn_4096", 40, lambda s: s.packed(cudnn=True))
    on_shape("checkpointed_16384", 25, lambda s: s.packed(tokens=16384, checkpointing=True))
    on_shape("trainer_checkpointed", 25, lambda s: s.alone("trainer", checkpointing=True))
    on_shape("nf4_4096", 30, nf4)  # the last one: the model stays in 4 bits


def shape_1b() -> Facts:
    from gpu_shape import Shape

    shape = Shape("1b", steps=12)
    return {
        "packed": shape.packed(tokens=16384),
        "compiled": shape.packed(tokens=16384, compile=True),
        "trainer": shape.alone("trainer"),
    }


def mean_field() -> Facts:
    import torch
    from mfnn import GPU_SHAPES, compare

    device = torch.device("cuda")
    return {name: shape | compare(name, shape, device, rounds=2) for name, shape in GPU_SHAPES.items()}


def machine() -> Facts:
    from poc_lora.environment import environment

    return {"command": sys.argv, **environment()}


def table(facts: dict[str, Facts]) -> str:
    """The stages that measured a speed, and those that did not come to it."""
    columns = ("tokens_per_s", "tflops", "step_s", "peak_gb", "reserved_gb", "predicted_gb", "retries")
    lines = [f"{'':22}" + "".join(f"{name:>14}" for name in columns)]
    for stage, found in facts.items():
        rows = {stage: found} | {f"{stage} {n}": part for n, part in found.items() if isinstance(part, dict)}
        for name, row in rows.items():
            if columns[0] in row:
                lines.append(f"{name:22}" + "".join(f"{row.get(column, ''):>14}" for column in columns))
        if missing := found.get("failed") or found.get("skipped"):
            lines.append(f"{stage:22}{missing}".splitlines()[0][:150])
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="the folder for all files")
    parser.add_argument("--seconds", type=float, default=400, help="for everything together")
    parser.add_argument("--only", nargs="*", default=[], metavar="STAGE", help="the stages to run; all unless given")
    parser.add_argument("--shape", default="8b", help="of the random model, as train.py has them")
    a = parser.parse_args()
    use_expandable_segments()  # as the program does, and before torch is imported
    stages = Stages(a.out.absolute(), a.seconds, a.only)
    with tempfile.TemporaryDirectory() as folder:
        stages.run("runs_at_all", 10, lambda: runs_at_all(Path(folder)))
        os.chdir(ROOT)

        from gpu_ceilings import ceilings

        stages.run("machine", 0, machine)
        stages.run("ceilings", 5, ceilings)
        measure_shape(stages, a.shape, a.out.absolute(), Path(folder))
        stages.run("mean_field", 25, mean_field)
        stages.run("shape_1b", 35, shape_1b)
    print(table(stages.facts))


if __name__ == "__main__":
    main()
