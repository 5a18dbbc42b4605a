"""Tokens per second of the packed loop against PEFT adapters trained one after another, in one process.

    python scripts/benchmarks/train.py
    python scripts/benchmarks/train.py --model DIR --data DIR --adapters 8 --batch 16 --steps 20

Both sides train the same number of rows of the same data with the same LoRA settings. The reference is a bare
PyTorch loop over PEFT with fused AdamW; model loading and tokenisation are left out on both sides. The rounds
alternate, and the medians and the median ratio are printed as one JSON line.
"""

import argparse
import json
import statistics
import time

import torch
from peft import LoraConfig, get_peft_model

from poc_lora.config import RunConfig, validate
from poc_lora.lora.base import default_device, load_base
from poc_lora.microworld import DATA_DIR, MODEL_DIR
from poc_lora.training.pack import Pack, resolve_tokens
from poc_lora.training.plan import TrainingData, prepare_data
from poc_lora.training.run import environment


def packed_tokens_per_second(config: RunConfig, model, data: TrainingData, steps: int) -> float:
    """One pack of all adapters."""
    tokens = resolve_tokens("auto", model.device)
    pack = Pack(config, model, data, range(config.adapters.count), tokens=tokens, pad_id=0)
    start, real = time.perf_counter(), 0
    for step in range(steps):
        real += pack.step(step).real_tokens
    synchronise(model)
    seconds = time.perf_counter() - start
    pack.close()
    return real / seconds


def separate_tokens_per_second(config: RunConfig, model, data: TrainingData, steps: int) -> float:
    """The same rows, adapter after adapter, each through its own PEFT model."""
    real, seconds = 0, 0.0
    lora = LoraConfig(r=config.lora.rank, lora_alpha=config.lora.alpha, target_modules=list(config.lora.targets))
    for adapter in range(config.adapters.count):
        peft_model = get_peft_model(model, lora)
        parameters = [p for p in peft_model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=config.optim.lr, fused=True)
        start = time.perf_counter()
        for step in range(steps):
            rows = [data.train[i].ids for i in data.order.rows(adapter, step)]
            width = max(map(len, rows))
            ids, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -100)
            for i, row in enumerate(rows):
                ids[i, : len(row)] = labels[i, : len(row)] = torch.tensor(row)
            ids, labels = ids.to(model.device), labels.to(model.device)
            peft_model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            real += sum(map(len, rows))
        synchronise(model)
        seconds += time.perf_counter() - start
        model = peft_model.unload().requires_grad_(False)
    return real / seconds


def synchronise(model) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL_DIR))
    parser.add_argument("--data", default=str(DATA_DIR))
    parser.add_argument("--prompt", default="bare")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    a = parser.parse_args()
    config = validate(
        {
            "model": {"name": a.model},
            "lora": {"rank": a.rank, "alpha": 2 * a.rank},
            "adapters": {"count": a.adapters},
            "data": {"train": [a.data], "prompt": a.prompt, "validation": 0},
            "train": {"max_steps": a.steps, "batch_size": a.batch},
            "output": "unused",
        },
        where="arguments",
    )
    model, tokenizer = load_base(a.model, device=default_device())
    data = prepare_data(config, tokenizer)
    sides = {"packed": packed_tokens_per_second, "separate": separate_tokens_per_second}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(a.rounds + 1):  # the first round warms up
        for name, side in sides.items():
            rates[name].append(side(config, model, data, a.steps))
    ratios = [p / s for p, s in zip(rates["packed"][1:], rates["separate"][1:], strict=True)]
    print(
        json.dumps(
            {
                **{f"{name}_tokens_per_s": round(statistics.median(r[1:]), 1) for name, r in rates.items()},
                "ratio": round(statistics.median(ratios), 3),
                "ratios": [round(r, 3) for r in ratios],
                **{name: getattr(a, name) for name in ("adapters", "batch", "rank", "steps", "rounds")},
                **environment(),
            }
        )
    )


if __name__ == "__main__":
    main()
