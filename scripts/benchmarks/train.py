"""Tokens per second of three ways to train the same M LoRA adapters, in one process, in alternating rounds.

    python scripts/benchmarks/train.py
    python scripts/benchmarks/train.py --model DIR --data DIR --adapters 8 --batch 16 --steps 20
    python scripts/benchmarks/train.py --shape medium train.compile=true train.tokens_per_microbatch=4096
    python scripts/benchmarks/train.py --shape 8b --out scripts/benchmarks/results/train_gpu.json

packed   this library: all adapters in one pass.
trainer  transformers.Trainer over PEFT, adapter after adapter, rows grouped by length.
loop     a bare PyTorch loop over PEFT with fused AdamW, adapter after adapter, rows in random order.

All three draw from the same tokenised rows, with the same model, batch size and LoRA settings. `key=value` arguments
are settings of a run, as for `poc-lora train`. On a GPU no side uses cuDNN's attention, and with a bfloat16 base
trainer and loop run under autocast. Tokens of padding are not counted. Loading, tokenising, PEFT's wrapping and the
making of a pack are not timed, nor is, with train.compile, a first pass over the steps in every round. The first round
is not counted. Trainer's time includes what it does before its first step, some tenths of a second per adapter, which
in few steps weighs more than in real training: trainer_tokens_per_s_after_start_up leaves it out.

Memory is that of two steps: on a GPU the peak of torch's allocator, on a CPU the peak resident size of a fresh process.
The pack of one adapter takes M times the rows a step, so that its micro-batches hold as many tokens as those of M.
"""

import argparse
import contextlib
import gc
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging

from poc_lora import rng
from poc_lora.config import RunConfig, load_config
from poc_lora.data.batches import PAD_MULTIPLE, BatchOrder, micro_batches
from poc_lora.data.prompts import Example
from poc_lora.devices import by_device
from poc_lora.environment import environment
from poc_lora.errors import PocLoraError
from poc_lora.files import write_json
from poc_lora.microworld import DATA_DIR, MODEL_DIR
from poc_lora.models.forward import without_cudnn_attention
from poc_lora.models.load import context_length, default_device, load_base, resolve_dtype
from poc_lora.training.data import TrainingData, prepare_data
from poc_lora.training.memory import Sizes, free_bytes, resolve_sizes
from poc_lora.training.step import Pack

# hidden, layers, intermediate, heads, key and value heads, vocabulary
SHAPES = {
    "tiny": (128, 4, 344, 4, 2, 2048),
    "small": (256, 6, 688, 4, 2, 4096),
    "medium": (768, 12, 2048, 12, 4, 8192),
    "1b": (2048, 16, 8192, 32, 8, 128256),
    "8b": (4096, 32, 14336, 32, 8, 128256),
}
PAD = "<pad>"
ROW_LENGTHS = (40, 160)  # of random rows, both ends included
SHARE_STEPS = 64  # steps over which padding is counted
MEMORY_STEPS = 2
MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True)
class Work:
    """What every side is given."""

    config: RunConfig
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase  # of which the baselines' collator needs the pad token
    data: TrainingData
    sizes: Sizes  # of packed
    steps: int

    @property
    def adapters(self) -> range:
        return range(self.config.adapters.count)

    @property
    def autocast(self) -> bool:
        return self.model.device.type == "cuda" and self.model.dtype == torch.bfloat16

    def packs(self) -> list[range]:
        """The adapters that train together."""
        size = self.sizes.per_device
        return [self.adapters[i : i + size] for i in range(0, len(self.adapters), size)]

    def rows(self) -> list[dict[str, list[int]]]:
        """The training rows as Trainer takes them."""
        first = [0 if self.config.data.train_on_prompt else e.answer_start for e in self.data.train]
        return [
            {
                "input_ids": list(e.ids),
                "attention_mask": [1] * len(e.ids),
                "labels": [-100] * start + list(e.ids[start:]),
            }
            for e, start in zip(self.data.train, first, strict=True)
        ]


@dataclass
class Timed:
    """Tokens that were not padding, and the seconds that training on them took."""

    tokens: int = 0
    seconds: float = 0.0
    start_up: float = 0.0  # seconds of them before the first step began: Trainer's only


def train_packed(work: Work) -> Timed:
    done = Timed()
    for adapters in work.packs():
        pack = Pack(
            work.config,
            work.model,
            work.data,
            adapters,
            sizes=work.sizes,
        )
        if work.config.train.compile:
            for step in range(work.steps):
                pack.step(step)
        with timing(done, work.model):
            done.tokens += sum(result.tokens for step in range(work.steps) if (result := pack.step(step)))
        pack.close()
    return done


def train_with_trainer(work: Work) -> Timed:
    done, rows, train = Timed(), work.rows(), work.config.train
    collate = DataCollatorForSeq2Seq(work.tokenizer, pad_to_multiple_of=PAD_MULTIPLE)
    for adapter in work.adapters:
        drawn: list[int] = []  # Trainer draws one batch ahead, so the last may never be trained on

        def collate_and_count(batch: list[dict[str, Any]], drawn: list[int] = drawn) -> Any:
            drawn.append(sum(len(row["input_ids"]) for row in batch))
            return collate(batch)

        with tempfile.TemporaryDirectory() as folder, peft_model(work, adapter) as model:
            arguments = TrainingArguments(
                output_dir=folder,
                max_steps=work.steps,
                per_device_train_batch_size=train.batch_size,
                learning_rate=work.config.optim.lr,
                optim="adamw_torch_fused",
                train_sampling_strategy="group_by_length",
                bf16=work.autocast,
                use_cpu=work.model.device.type == "cpu",
                dataloader_pin_memory=work.model.device.type == "cuda",
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                seed=adapter,
            )
            trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate_and_count)
            trainer.remove_callback(PrinterCallback)  # it prints to stdout
            with timing(done, work.model):
                trainer.add_callback(FirstStep(done))
                trainer.train()
            done.tokens += sum(drawn[: work.steps])
            del trainer
    return done


class FirstStep(TrainerCallback):
    """Notes how long Trainer took to come to its first step."""

    def __init__(self, done: Timed):
        self.done, self.began = done, time.perf_counter()

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        if state.global_step == 0:
            self.done.start_up += time.perf_counter() - self.began


def train_in_loop(work: Work) -> Timed:
    done, rows, size = Timed(), work.rows(), work.config.train.batch_size
    collate = DataCollatorForSeq2Seq(work.tokenizer, pad_to_multiple_of=PAD_MULTIPLE)
    device = work.model.device
    for adapter in work.adapters:
        order = rng.permutation(len(rows), rng.key(work.config.adapters.seed, adapter, "benchmark order"))
        with peft_model(work, adapter) as model:
            model.train()
            parameters = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(parameters, lr=work.config.optim.lr, weight_decay=0.0, fused=True)
            with timing(done, work.model):
                for step in range(work.steps):
                    chosen = [rows[order[i % len(rows)]] for i in range(step * size, (step + 1) * size)]
                    batch = {name: tensor.to(device) for name, tensor in collate(chosen).items()}
                    with torch.autocast(device.type, torch.bfloat16, enabled=work.autocast):
                        loss = model(**batch, use_cache=False).loss
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    done.tokens += sum(len(row["input_ids"]) for row in chosen)
    return done


SIDES: dict[str, Callable[[Work], Timed]] = {
    "packed": train_packed,
    "trainer": train_with_trainer,
    "loop": train_in_loop,
}
BASELINES = ("trainer", "loop")


@contextlib.contextmanager
def peft_model(work: Work, adapter: int) -> Iterator[PeftModel]:
    """A fresh PEFT adapter on the shared model, which is as before when the block ends."""
    config, base = work.config, work.model
    lora = LoraConfig(
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,  # type: ignore[arg-type]
        lora_dropout=config.lora.dropout,
        target_modules=list(config.lora.targets),
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(adapter)
    model = get_peft_model(base, lora)
    recompute = config.train.gradient_checkpointing is True
    if recompute:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        yield model
    finally:
        if recompute:
            model.gradient_checkpointing_disable()
            model.disable_input_require_grads()
        model.unload()
        base.requires_grad_(False).eval()


@contextlib.contextmanager
def timing(done: Timed, model: PreTrainedModel) -> Iterator[None]:
    synchronise(model.device)
    start = time.perf_counter()
    yield
    synchronise(model.device)
    done.seconds += time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measured_speeds(work: Work, rounds: int) -> dict[str, Any]:
    """Tokens per second of every side and round, their ratios, and what packed spent on warming up."""
    rates: dict[str, list[float]] = {name: [] for name in SIDES}
    untimed, start_ups, steady = [], [], []
    for number in range(rounds + 1):
        for name, train in SIDES.items():
            free_memory()
            start = time.perf_counter()
            done = train(work)
            elapsed = time.perf_counter() - start
            if name == "packed":
                untimed.append(elapsed - done.seconds if number else elapsed)
            if name == "trainer":
                start_ups.append(done.start_up / done.seconds)
                steady.append(done.tokens / (done.seconds - done.start_up))
            if number:
                rates[name].append(done.tokens / done.seconds)
            print(f"round {number} of {rounds}: {name} {done.tokens / done.seconds:,.0f} tokens/s", file=sys.stderr)
    medians = {name: statistics.median(side) for name, side in rates.items()}
    ratios = {name: [p / b for p, b in zip(rates["packed"], rates[name], strict=True)] for name in BASELINES}
    better = max(BASELINES, key=medians.__getitem__)
    return {
        "tokens_per_s": {
            name: {"median": round(medians[name], 1), "rounds": [round(r, 1) for r in side]}
            for name, side in rates.items()
        },
        "ratio": {name: spread(side) for name, side in ratios.items()},
        "better_baseline": better,
        "ratio_to_better": round(statistics.median(ratios[better]), 3),
        "packed_first_round_s": round(untimed[0], 3),
        "packed_untimed_s": round(statistics.median(untimed[1:]), 3),
        "trainer_start_up_share": round(statistics.median(start_ups[1:]), 4),
        "trainer_tokens_per_s_after_start_up": round(statistics.median(steady[1:]), 1),
    }


def spread(values: list[float]) -> dict[str, Any]:
    return {
        "median": round(statistics.median(values), 3),
        "range": [round(min(values), 3), round(max(values), 3)],
        "rounds": [round(value, 3) for value in values],
    }


def real_token_share(work: Work, *, group_by_length: bool) -> float:
    """The share of tokens in packed's micro-batches that are not padding."""
    order = batch_order(work.data.train, work.config, group_by_length=group_by_length)
    real = computed = 0
    for step in range(min(SHARE_STEPS, order.steps_per_epoch)):
        for adapters in work.packs():
            batches = micro_batches(
                work.data.train,
                [order.rows(adapter, step) for adapter in adapters],
                tokens=work.sizes.tokens_per_microbatch,
                train_on_prompt=work.config.data.train_on_prompt,
                pad_id=0,
                device=torch.device("cpu"),
            )
            for batch in batches:
                real += batch.tokens
                computed += batch.input_ids.numel()
    return real / computed


def two_steps(side: str, work: Work) -> Work:
    """The work whose memory counts for `side`: `packed_alone` is one adapter with the rows of a whole pack."""
    config, size = work.config, len(work.packs()[0])
    count = size if side == "packed" else 1
    rows = config.train.batch_size * (size if side == "packed_alone" else 1)
    config = config.model_copy(
        update={
            "adapters": config.adapters.model_copy(update={"count": count}),
            "train": config.train.model_copy(update={"batch_size": rows}),
        }
    )
    order = batch_order(work.data.train, config, group_by_length=config.data.group_by_length)
    return replace(work, config=config, data=replace(work.data, order=order), steps=MEMORY_STEPS)


def peak_memory(side: str, work: Work) -> int:
    """Bytes: of torch's allocator on a GPU, else of this whole process, which must then do nothing else."""
    train = train_packed if side == "packed_alone" else SIDES[side]
    free_memory()
    if work.model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(work.model.device)
        train(two_steps(side, work))
        return torch.cuda.max_memory_allocated(work.model.device)
    train(two_steps(side, work))
    # VmHWM, as getrusage's ru_maxrss starts from the parent's: Linux keeps it when one program starts another.
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def peak_memory_of_all(work: Work) -> dict[str, Any]:
    sizes = [
        f"train.tokens_per_microbatch={work.sizes.tokens_per_microbatch}",
        f"adapters.per_device={work.sizes.per_device}",
    ]
    peaks = {}
    for side in ("packed", "packed_alone", *BASELINES):
        if work.model.device.type == "cuda":
            peaks[side] = peak_memory(side, work)
        else:
            command = [sys.executable, __file__, "--memory-of", side, *sys.argv[1:], *sizes]
            peaks[side] = int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    return {**peaks, "packed_to_packed_alone": round(peaks["packed"] / peaks["packed_alone"], 3)}


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
    order = batch_order(rows, config, group_by_length=config.data.group_by_length)
    data = TrainingData(rows, [], order, total_steps=a.steps, truncated=0, dropped=0, files={})
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
    return Work(config, model, tokenizer, data, sizes, a.steps)


def random_row(number: int, vocabulary: int) -> Example:
    low, high = ROW_LENGTHS
    length, *tokens = rng.uniform((1 + high,), rng.key(0, 0, "benchmark row", number)).tolist()
    tokens = tokens[: low + int(length * (high - low + 1))]
    return Example(ids=tuple(1 + int(u * (vocabulary - 1)) for u in tokens), answer_start=1)


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
    data = replace(data, train=rows, order=batch_order(rows, config, group_by_length=config.data.group_by_length))
    sizes = resolve_sizes(config, model, free=free, longest=data.longest, before={})
    return Work(config, model, tokenizer, data, sizes, a.steps)


def batch_order(rows: list[Example], config: RunConfig, *, group_by_length: bool) -> BatchOrder:
    lengths = [len(row.ids) for row in rows]
    return BatchOrder(lengths, config.train.batch_size, config.adapters.seed, group_by_length=group_by_length)


def run_config(a: argparse.Namespace) -> RunConfig:
    raw = {
        "model": {"name": a.shape or a.model or str(MODEL_DIR), "dtype": a.dtype},
        "lora": {"rank": a.rank, "alpha": 2 * a.rank},
        "adapters": {"count": a.adapters},
        "data": {"train": [a.data or str(DATA_DIR)], "prompt": a.prompt, "validation": 0},
        "train": {"max_steps": a.steps, "batch_size": a.batch},
        "output": "unused",
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        write_json(path, raw)  # JSON is YAML
        return load_config(path, a.overrides)


def settings(a: argparse.Namespace, work: Work) -> dict[str, Any]:
    """What was measured, as it was resolved, with paths as they were given."""
    config = work.config
    source = {"shape": a.shape} if a.shape else {"model": a.model or "embedded", "data": a.data or "embedded"}
    return {
        **source,
        "parameters": sum(p.numel() for p in work.model.parameters()),
        "device": work.model.device.type,
        "dtype": str(work.model.dtype).removeprefix("torch."),
        "autocast_of_baselines": work.autocast,
        "adapters": config.adapters.count,
        "adapters_per_pack": len(work.packs()[0]),
        "batch": config.train.batch_size,
        "rank": config.lora.rank,
        "alpha": config.lora.alpha,
        "targets": list(config.lora.targets),
        "rows": len(work.data.train),
        "steps": work.steps,
        "rounds": a.rounds,
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
    lines = [f"{'':8}{'tokens/s':>12}{'packed is':>20}{'peak MiB':>12}"]
    for name, rates in found["tokens_per_s"].items():
        ratio = found["ratio"].get(name)
        times = "{:.2f} ({:.2f} to {:.2f})".format(ratio["median"], *ratio["range"]) if ratio else ""
        memory = f"{found['peak_memory_bytes'][name] / 2**20:,.0f}" if found["peak_memory_bytes"] else "not measured"
        lines.append(f"{name:8}{rates['median']:12,.0f}{times:>20}{memory:>14}")
    share = found["real_token_share"]
    lines.append(f"real tokens {share['group_by_length']:.1%}, ungrouped {share['random_order']:.1%}")
    steady = found["trainer_tokens_per_s_after_start_up"]
    lines.append(
        f"trainer started up for {found['trainer_start_up_share']:.1%} of its time; then {steady:,.0f} tokens/s"
    )
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
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
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
    memory = None if a.no_memory else peak_memory_of_all(work)
    speeds = measured_speeds(work, a.rounds)
    return {
        **speeds,
        "real_token_share": {
            "group_by_length": round(real_token_share(work, group_by_length=True), 4),
            "random_order": round(real_token_share(work, group_by_length=False), 4),
        },
        "peak_memory_bytes": memory,
        "flops": measured_flops(work, speeds["tokens_per_s"]["packed"]["median"]),
        "settings": settings(a, work),
        "command": shlex.join(["python", *sys.argv]),
        **environment(),
    }


def main() -> None:
    a = parse_arguments()
    logging.set_verbosity_error()
    try:
        config = run_config(a)
        work = (random_work if a.shape else loaded_work)(a, config, default_device())
        if a.memory_of:
            print(peak_memory(a.memory_of, work))
            return
        with without_cudnn_attention():
            found = measure(a, work)
        if a.out:
            write_json(a.out, found)
    except PocLoraError as problem:
        sys.exit(str(problem))
    print(json.dumps(found))
    print(table(found), file=sys.stderr)


if __name__ == "__main__":
    main()
