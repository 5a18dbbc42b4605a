"""Merging eight adapters of rank 32 with the module shapes of Llama-3-8B, beside PEFT's add_weighted_adapter.

    python scripts/benchmarks/merge.py layer --out FILE
    python scripts/benchmarks/merge.py files --out FILE

layer: the five modules of one layer, in memory, truncated to rank 32: this library, PEFT's `svd` as it comes and with
`svd_full_matrices=False`; and how far ours and PEFT's `cat`, both exact, differ. files: all 160 modules, from files to
files, in alternating rounds and each in a process of its own: the exact average, the truncated one, and nothing but
reading the inputs and writing an output of that size.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from poc_lora.adapters.adapter import WEIGHTS_NAME, Adapter, read_adapter, write_adapter
from poc_lora.adapters.factors import Factors
from poc_lora.files import sync, write_json
from poc_lora.merging.folders import merge_folders
from poc_lora.merging.merge import merge

HIDDEN, INTERMEDIATE, KEYS = 4096, 14336, 1024
SHAPES = {  # d_out, d_in
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
ADAPTERS, RANK = 8, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("layer", "files"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peft-rounds", type=int, default=1, help="PEFT's svd takes minutes a round")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--folder", type=Path, help="a disk for 6 GB of adapters; default: the temporary one")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    parser.add_argument("--alone", nargs=2, metavar=("WORK", "FOLDER"), help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.alone:
        print(json.dumps(alone(a.alone[0], Path(a.alone[1]))))
        return

    from poc_lora.environment import environment  # here: it imports more than a merge does, whose memory is measured

    with tempfile.TemporaryDirectory(dir=a.folder) as folder:
        if a.part == "layer":
            found = one_layer(Path(folder) / "layer", a.rounds, a.peft_rounds)
        else:
            found = all_modules(Path(folder) / "all", a.layers, a.rounds)
    layers = 1 if a.part == "layer" else a.layers
    report = {
        **found,
        "settings": {"adapters": ADAPTERS, "rank": RANK, "layers": layers, "shapes": SHAPES},
        "command": shlex.join(["python", *sys.argv]),
        **environment(),
    }
    print(json.dumps(report))
    if a.out:
        write_json(a.out, report)


def make_adapters(folder: Path, layers: int) -> list[Path]:
    folders = [folder / f"{j}" for j in range(ADAPTERS)]
    for j, path in enumerate(folders):
        stream = torch.Generator().manual_seed(j)
        modules = {
            f"model.layers.{layer}.{name}": Factors(
                torch.randn(RANK, d_in, generator=stream) / d_in**0.5,
                torch.randn(d_out, RANK, generator=stream) / RANK**0.5,
            )
            for layer in range(layers)
            for name, (d_out, d_in) in SHAPES.items()
        }
        write_adapter(Adapter(modules), path)
    return folders


# One layer, in memory


def one_layer(folder: Path, rounds: int, peft_rounds: int) -> dict[str, Any]:
    folders = make_adapters(folder, 1)
    adapters = [read_adapter(path) for path in folders]
    model, names = peft_model(folders)

    def peft(kind: str, **options: Any) -> None:
        model.add_weighted_adapter(names, [1 / ADAPTERS] * ADAPTERS, kind, combination_type=kind, **options)

    def svd(full_matrices: bool) -> None:
        peft("svd", svd_rank=RANK, svd_full_matrices=full_matrices)
        model.delete_adapter("svd")

    seconds: dict[str, list[float]] = {"ours": [], "peft_svd_reduced": [], "peft_svd": []}
    merge(adapters, rank=RANK)  # the first call of LAPACK is slower
    for number in range(rounds):
        seconds["ours"].append(timed(lambda: merge(adapters, rank=RANK)))
        if number < peft_rounds:
            seconds["peft_svd_reduced"].append(timed(lambda: svd(False)))
            seconds["peft_svd"].append(timed(lambda: svd(True)))
        tell(f"one layer, round {number}", {name: taken[-1] for name, taken in seconds.items() if taken})
    seconds["ours_exact"] = [timed(lambda: merge(adapters))]
    seconds["peft_cat"] = [timed(lambda: peft("cat"))]
    ours = statistics.median(seconds["ours"])
    return {
        "seconds": summaries(seconds),
        "peft_svd_over_ours": round(statistics.median(seconds["peft_svd"]) / ours, 1),
        "peft_svd_reduced_over_ours": round(statistics.median(seconds["peft_svd_reduced"]) / ours, 1),
        "largest_relative_difference_to_cat": difference(model, merge(adapters).adapter),
    }


def peft_model(folders: list[Path]) -> tuple[Any, list[str]]:
    from peft import PeftModel
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=1, vocab_size=256,
        num_attention_heads=32, num_key_value_heads=8,
    )  # fmt: skip
    names = [f"adapter{j}" for j in range(len(folders))]
    model = PeftModel.from_pretrained(LlamaForCausalLM(config), folders[0], adapter_name=names[0])
    for name, folder in zip(names[1:], folders[1:], strict=True):
        model.load_adapter(folder, adapter_name=name)
    return model.base_model, names


def difference(model: Any, adapter: Adapter) -> float:
    """‖ours − PEFT's cat‖ / ‖ours‖, the largest of any module."""
    worst = 0.0
    for name, factors in adapter.modules.items():
        ours = factors.B @ factors.A
        theirs = model.model.get_submodule(name).get_delta_weight("cat")
        worst = max(worst, float((ours - theirs).norm() / ours.norm()))
    return worst


# All modules, from files to files


def all_modules(folder: Path, layers: int, rounds: int) -> dict[str, Any]:
    make_adapters(folder, layers)
    found: dict[str, list[dict[str, float]]] = {"copy": [], "exact": [], "truncated": []}
    for number in range(rounds):
        for work, measured in found.items():
            command = [sys.executable, __file__, "files", "--alone", work, str(folder)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            measured.append(json.loads(done.stdout))
        tell(f"all modules, round {number}", {work: measured[-1]["seconds"] for work, measured in found.items()})
    seconds = {work: [each["seconds"] for each in measured] for work, measured in found.items()}
    ratios = [exact / copy for exact, copy in zip(seconds["exact"], seconds["copy"], strict=True)]
    return {
        "seconds": summaries(seconds),
        "exact_over_reading_and_writing": {
            "median": round(statistics.median(ratios), 2),
            "rounds": [round(ratio, 2) for ratio in ratios],
        },
        **{
            f"peak_megabytes_over_output_{work}": round(max(each["over_output"] for each in found[work]))
            for work in ("exact", "truncated")
        },
    }


def alone(work: str, folder: Path) -> dict[str, float]:
    """Seconds for one piece of work, and the process's peak memory beyond the size of its output, in MB."""
    sources = sorted(folder.iterdir())
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        out = Path(scratch) / "merged"
        if work == "copy":
            seconds = timed(lambda: copy(sources, out))
        else:
            seconds = timed(lambda: merge_folders(sources, out, rank=None if work == "exact" else RANK))
        size = (out / WEIGHTS_NAME).stat().st_size
    return {"seconds": seconds, "over_output": (peak_bytes() - size) / 1e6}


def peak_bytes() -> int:
    """The largest resident size of this process; getrusage would mix it with that of the one that started it."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def copy(sources: list[Path], out: Path) -> None:
    """Read every byte of the inputs, and write as many."""
    inputs = [{k: v.clone() for k, v in load_file(source / WEIGHTS_NAME).items()} for source in sources]
    out.mkdir()
    save_file({f"{j}.{k}": v for j, tensors in enumerate(inputs) for k, v in tensors.items()}, out / WEIGHTS_NAME)
    sync(out / WEIGHTS_NAME)


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def summaries(seconds: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    return {
        name: {"median": round(statistics.median(taken), 3), "rounds": [round(value, 3) for value in taken]}
        for name, taken in seconds.items()
        if taken
    }


def tell(what: str, seconds: dict[str, float]) -> None:
    print(what, ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items()), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
