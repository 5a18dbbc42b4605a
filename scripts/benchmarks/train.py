"""Tokens per second of three ways to train the same M LoRA adapters on the same rows, in turns of one step.

    python scripts/benchmarks/train.py
    python scripts/benchmarks/train.py --model DIR --data DIR --adapters 8 --batch 16 --steps 20
    python scripts/benchmarks/train.py --shape medium train.compile=true train.tokens_per_microbatch=4096
    python scripts/benchmarks/train.py --shape 8b --out scripts/benchmarks/results/train_gpu.json

packed   this library: all adapters in one pass.
trainer  transformers.Trainer over PEFT, adapter after adapter.
loop     a bare PyTorch loop over PEFT, adapter after adapter.

Each step is taken by every side in turn, on the very same rows, with the same model, optimizer, learning rate, clipping
and padding multiple (see sides.py); who begins changes from step to step. `key=value` arguments are settings of a run,
as for `poc-lora train`. No side uses cuDNN's attention. The first steps, in which Trainer starts up and train.compile
compiles, are not counted. Tokens are those of the rows, without padding. With --out the JSON is written after every
step, so what was measured before an interruption is kept.

Memory is that of two steps: on a GPU the peak of torch's allocator, allocated and reserved, on a CPU the peak resident
size of a fresh process. `packed_alone` is one adapter with M times the rows a step, so that its micro-batches hold as
many tokens as those of M.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sides import BASELINES, SIDES, Work, synchronise, training
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from transformers.utils import logging

from poc_lora import rng
from poc_lora.config import RunConfig, load_config
from poc_lora.data.batches import BatchOrder, cut_rows, padded_length
from poc_lora.data.prompts import Example
from poc_lora.devices import by_device
from poc_lora.environment import environment
from poc_lora.errors import PocLoraError
from poc_lora.files import write_json
from poc_lora.lora.bank import resolve_targets
from poc_lora.microworld import DATA_DIR, MODEL_DIR
from poc_lora.models.forward import without_cudnn_attention
from poc_lora.models.load import context_length, default_device, load_base, resolve_dtype
from poc_lora.training.data import TrainingData, prepare_data
from poc_lora.training.memory import free_bytes, resolve_sizes

# hidden, layers, intermediate, heads, key and value heads, vocabulary
SHAPES = {
    "tiny": (128, 4, 344, 4, 2, 2048),
    "small": (256, 6, 688, 4, 2, 4096),
    "medium": (768, 12, 2048, 12, 4, 8192),
    "1b": (2048, 16, 8192, 32, 8, 128256),
    "8b": (4096, 32, 14336, 32, 8, 128256),
}
PAPER_TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
PAD = "<pad>"
ROW_LENGTHS = (40, 160)  # of random rows, both ends included
WARM_UP = 2  # steps
MEMORY_STEPS = 2
MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}


def measured_speeds(work: Work, a: argparse.Namespace, found: dict[str, Any]) -> None:
    """Add every side's seconds per step to `found`, with the ratios they give; write it after each step."""
    names = list(SIDES)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    tokens: list[int] = []
    with ExitStack() as undo:
        sides = {name: undo.enter_context(training(name, work, WARM_UP + a.steps)) for name in names}
        for step in range(WARM_UP + a.steps):
            order = names[step % len(names) :] + names[: step % len(names)]
            for name in order:
                began = time.perf_counter()
                sides[name].step(step)
                synchronise(work.model.device)
                if step >= WARM_UP:
                    seconds[name].append(time.perf_counter() - began)
            if step >= WARM_UP:
                tokens.append(work.tokens(step))
                found.update(speeds(seconds, tokens))
                if a.out:
                    write_json(a.out, found)
                rates = ", ".join(f"{name} {tokens[-1] / side[-1]:,.0f}" for name, side in seconds.items())
                print(f"step {len(tokens)} of {a.steps}, tokens/s: {rates}", file=sys.stderr)


def speeds(seconds: dict[str, list[float]], tokens: list[int]) -> dict[str, Any]:
    """Tokens per second over all steps; ratios are of the seconds of one step."""
    ratios = {name: [b / p for b, p in zip(seconds[name], seconds["packed"], strict=True)] for name in BASELINES}
    return {
        "tokens_per_step": tokens,
        "seconds_per_step": {name: [round(s, 5) for s in side] for name, side in seconds.items()},
        "tokens_per_s": {name: round(sum(tokens) / sum(side), 1) for name, side in seconds.items()},
        "packed_is_faster_by": {
            name: {
                "median": round(statistics.median(values), 3),
                "quartiles": [round(q, 3) for q in quartiles(values)],
                "range": [round(min(values), 3), round(max(values), 3)],
            }
            for name, values in ratios.items()
        },
    }


def quartiles(values: list[float]) -> list[float]:
    first, _, third = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return [first, third]


def real_token_share(work: Work, steps: int) -> float:
    """The share of tokens in packed's micro-batches that are not padding."""
    rows = work.data.train
    padded = 0
    for step in range(steps):
        drawn = [work.data.order.rows(adapter, step) for adapter in work.adapters]
        for part in cut_rows(rows, drawn, tokens=work.sizes.tokens_per_microbatch):
            longest = max(len(rows[i].ids) for own in part for i in own)
            padded += padded_length(longest) * sum(map(len, part))
    return sum(work.tokens(step) for step in range(steps)) / padded


def two_steps(side: str, work: Work) -> Work:
    """The work whose memory counts for `side`."""
    config, size = work.config, len(work.adapters)
    count = size if side == "packed" else 1
    rows = config.train.batch_size * (size if side == "packed_alone" else 1)
    config = config.model_copy(
        update={
            "adapters": config.adapters.model_copy(update={"count": count}),
            "train": config.train.model_copy(update={"batch_size": rows}),
        }
    )
    return replace(work, config=config, data=replace(work.data, order=batch_order(work.data.train, config)))


def peak_memory(side: str, work: Work) -> list[int]:
    """Bytes: allocated and reserved on a GPU, else the peak of this whole process, which must then do nothing else."""
    cuda = work.model.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(work.model.device)
    with training("packed" if side == "packed_alone" else side, two_steps(side, work), MEMORY_STEPS) as trained:
        for step in range(MEMORY_STEPS):
            trained.step(step)
    if cuda:
        return [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()]
    # VmHWM, as getrusage's ru_maxrss starts from the parent's: Linux keeps it when one program starts another.
    status = Path("/proc/self/status").read_text().splitlines()
    return [next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))]


def peak_memory_of_all(work: Work) -> dict[str, list[int]]:
    sizes = [f"train.tokens_per_microbatch={work.sizes.tokens_per_microbatch}"]
    peaks: dict[str, list[int]] = {}
    for side in ("packed", "packed_alone", *BASELINES):
        if work.model.device.type == "cuda":
            peaks[side] = peak_memory(side, work)
        else:
            command = [sys.executable, __file__, "--memory-of", side, *sys.argv[1:], *sizes]
            peaks[side] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    return peaks


def measured_flops(work: Work, tokens_per_s: float) -> dict[str, Any]:
    """What packed computes, beside what a plain matmul reaches.

    A frozen matrix costs 2 floating-point operations per parameter and token forwards, 2 for the gradient of its
    input and, with checkpointing, 2 for going forwards again. Attention and the adapters themselves are left out.
    """
    model: Any = work.model
    parameters = sum(p.numel() for p in model.parameters())
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        parameters -= model.get_input_embeddings().weight.numel()
    per_token = (6 if work.sizes.gradient_checkpointing else 4) * parameters
    matmul = matmul_flops_per_s(work.model.device, work.model.dtype)
    return {
        "model_flops_per_token": per_token,
        "achieved_flops_per_s": round(per_token * tokens_per_s),
        "matmul_flops_per_s": round(matmul),
        "share_of_matmul": round(per_token * tokens_per_s / matmul, 4),
    }


def matmul_flops_per_s(device: torch.device, dtype: torch.dtype, times: int = 9) -> float:
    n = by_device(MATMUL_SIZE, device.type)
    a, b = (rng.normal((n, n), rng.key(0, 0, "matmul", name=name), device).to(dtype) for name in "ab")
    seconds = []
    for _ in range(times + 3):  # the first three warm up
        synchronise(device)
        start = time.perf_counter()
        a @ b
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / statistics.median(seconds[3:])


def random_work(a: argparse.Namespace, config: RunConfig, device: torch.device) -> Work:
    """A random Llama made on the device, and rows of random tokens."""
    hidden, layers, intermediate, heads, kv_heads, vocabulary = SHAPES[a.shape]
    llama = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=512,
    )
    rows = [random_row(i, vocabulary) for i in range(a.rows)]
    order = batch_order(rows, config)
    lengths = [len(row.ids) for row in rows]
    data = TrainingData(
        rows,
        [],
        [],
        order,
        total_steps=a.steps,
        max_length=max(lengths),
        lengths=lengths,
        truncated=0,
        dropped=0,
        skipped=0,
        chats=False,
        files={},
        validation_files={},
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({PAD: 0})), pad_token=PAD)
    free = free_bytes(device)
    torch.manual_seed(0)
    with torch.device(device):
        dtype = getattr(torch, resolve_dtype(config.model.dtype, device))
        model = AutoModelForCausalLM.from_config(llama, dtype=dtype).requires_grad_(False).eval()
    with tempfile.TemporaryDirectory() as folder:  # the sizes are found out from a model's config.json
        llama.save_pretrained(folder)
        named = config.model_copy(update={"model": config.model.model_copy(update={"name": folder})})
        sizes = resolve_sizes(named, model, free=free, longest=data.longest, before={})
    return Work(config, model, tokenizer, data, sizes)


def random_row(number: int, vocabulary: int) -> Example:
    low, high = ROW_LENGTHS
    length, *tokens = rng.uniform((1 + high,), rng.key(0, 0, "benchmark row", number)).tolist()
    tokens = tokens[: low + int(length * (high - low + 1))]
    return Example(ids=tuple(1 + int(u * (vocabulary - 1)) for u in tokens), supervised=((1, len(tokens)),))


def loaded_work(a: argparse.Namespace, config: RunConfig, device: torch.device) -> Work:
    """A model and rows from disk, of which at most `a.rows` are kept."""
    section, free = config.model, free_bytes(device)
    model, tokenizer = load_base(
        section.name, revision=section.revision, dtype=section.dtype, quantization=section.quantization, device=device
    )
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    data = prepare_data(config, tokenizer, context=context_length(model))
    kept = rng.permutation(len(data.train), rng.key(config.adapters.seed, 0, "benchmark rows"))[: a.rows]
    rows = [data.train[i] for i in sorted(kept)]
    data = replace(data, train=rows, order=batch_order(rows, config))
    sizes = resolve_sizes(config, model, free=free, longest=data.longest, before={})
    return Work(config, model, tokenizer, data, sizes)


def batch_order(rows: list[Example], config: RunConfig) -> BatchOrder:
    lengths, data = [len(row.ids) for row in rows], config.data
    return BatchOrder(lengths, config.train.batch_size, config.adapters.seed, group_by_length=data.group_by_length)


def run_config(a: argparse.Namespace) -> RunConfig:
    raw = {
        "model": {"name": a.shape or a.model or str(MODEL_DIR), "dtype": a.dtype},
        "lora": {"rank": a.rank, "alpha": 2 * a.rank, "targets": PAPER_TARGETS},
        "adapters": {"count": a.adapters, "per_device": a.adapters},
        "data": {"train": [a.data or str(DATA_DIR)], "prompt": a.prompt, "learn": "all", "validation": 0},
        "train": {"max_steps": a.steps, "batch_size": a.batch},
        "output": "unused",
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        write_json(path, raw)  # JSON is YAML
        return load_config(path, a.overrides)


def settings(a: argparse.Namespace, work: Work) -> dict[str, Any]:
    """What was measured, as it was resolved, with paths as they were given."""
    config, device = work.config, work.model.device
    source = {"shape": a.shape} if a.shape else {"model": a.model or "embedded", "data": a.data or "embedded"}
    return {
        **source,
        "parameters": sum(p.numel() for p in work.model.parameters()),
        "device": device.type,
        "backend": f"cuda {torch.version.cuda}" if device.type == "cuda" else torch.backends.cpu.get_cpu_capability(),
        "dtype": str(work.model.dtype).removeprefix("torch."),
        "autocast_of_baselines": work.autocast,
        "adapters": config.adapters.count,
        "batch": config.train.batch_size,
        "rank": config.lora.rank,
        "alpha": config.lora.alpha,
        "targets": list(resolve_targets(work.model, config.lora.targets)),
        "rows": len(work.data.train),
        "steps": a.steps,
        "warm_up_steps": WARM_UP,
        "tokens_per_microbatch": work.sizes.tokens_per_microbatch,
        "gradient_checkpointing": {
            "packed": work.sizes.gradient_checkpointing,
            "baselines": config.train.gradient_checkpointing is True,
        },
        "compile": config.train.compile,
        "overrides": a.overrides,
    }


def table(found: dict[str, Any]) -> str:
    """The result for a person."""
    lines = [f"{'':8}{'tokens/s':>12}{'packed is faster by':>24}{'peak MiB':>12}"]
    for name, rate in found["tokens_per_s"].items():
        ratio = found["packed_is_faster_by"].get(name)
        times = "{:.2f} ({:.2f} to {:.2f})".format(ratio["median"], *ratio["quartiles"]) if ratio else ""
        memory = f"{found['peak_memory_bytes'][name][0] / 2**20:,.0f}" if found["peak_memory_bytes"] else "not measured"
        lines.append(f"{name:8}{rate:12,.0f}{times:>24}{memory:>12}")
    lines.append(f"{found['real_token_share']:.1%} of packed's tokens are not padding")
    lines.append(f"packed at {found['flops']['share_of_matmul']:.1%} of a plain matmul")
    return "\n".join(lines)


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The program's arguments, unless others are given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    base = parser.add_mutually_exclusive_group()
    base.add_argument("--model", help="a folder or a Hub id; the embedded model unless given")
    base.add_argument("--shape", choices=SHAPES, help="a random Llama of this size, with random rows")
    parser.add_argument("--data", help="a folder of BENCHMARK/train.json; the embedded one unless given")
    parser.add_argument("--prompt", default="bare")
    parser.add_argument("--dtype", default="auto", help="of the base: bfloat16 on a GPU, else float32, unless given")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16, help="rows per adapter and step")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=2048, help="rows to draw from, at most")
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    parser.add_argument("--memory-of", choices=("packed", "packed_alone", *BASELINES), help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the run")
    a = parser.parse_intermixed_args(words)
    if a.shape and a.data:
        parser.error("--shape makes its own rows: leave out --data")
    return a


def measure(a: argparse.Namespace, work: Work) -> dict[str, Any]:
    """Everything the JSON holds. Memory comes first on a CPU machine, where it takes processes of their own."""
    found: dict[str, Any] = {
        "settings": settings(a, work),
        "command": shlex.join(["python", *sys.argv]),
        **environment(),
        "peak_memory_bytes": None if a.no_memory else peak_memory_of_all(work),
        "real_token_share": round(real_token_share(work, WARM_UP + a.steps), 4),
    }
    measured_speeds(work, a, found)
    found["flops"] = measured_flops(work, found["tokens_per_s"]["packed"])
    return found


def main() -> None:
    a = parse_arguments()
    logging.set_verbosity_error()
    try:
        config = run_config(a)
        work = (random_work if a.shape else loaded_work)(a, config, default_device())
        with without_cudnn_attention():
            if a.memory_of:
                print(json.dumps(peak_memory(a.memory_of, work)))
                return
            found = measure(a, work)
        if a.out:
            write_json(a.out, found)
    except PocLoraError as problem:
        sys.exit(str(problem))
    print(json.dumps(found))
    print(table(found), file=sys.stderr)


if __name__ == "__main__":
    main()
