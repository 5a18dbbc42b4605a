"""How much faster a CPU multiplies and trains in bfloat16 than in float32, by the width of the base.

    python scripts/benchmarks/cpu_dtypes.py --out scripts/benchmarks/results/cpu_dtypes.json

A random Llama of each width has eight adapters of rank 16 on all linear layers. The product is the one by which `check`
advises (models/bfloat16.py), the step a forward and backward pass over 16 rows of 100 tokens. Both dtypes take
turns, and the shortest time of each counts, of steps the processor's.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from poc_lora import rng
from poc_lora.data.batches import MicroBatch
from poc_lora.environment import environment
from poc_lora.files import write_json
from poc_lora.lora.bank import AdapterBank
from poc_lora.models.bfloat16 import WIDEST, commonest_shape, product_speedup
from poc_lora.training.loss import packed_loss

# hidden, layers, intermediate, vocabulary
SHAPES = [(128, 4, 352, 512), (256, 6, 688, 4096), (576, 6, 1536, 16384), (1024, 3, 2816, 16384)]
ADAPTERS, ROWS, TOKENS = 8, 16, 100
DTYPES = (torch.float32, torch.bfloat16)


def packed_model(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Any, AdapterBank]:
    hidden, layers, intermediate, vocabulary = shape
    llama = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=intermediate,
        num_attention_heads=hidden // 64,
        vocab_size=vocabulary,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(llama, dtype=dtype).requires_grad_(False).eval()
    return model, AdapterBank(model, targets="all-linear", rank=16, alpha=32, adapters=range(ADAPTERS))


def random_batch(vocabulary: int) -> MicroBatch:
    draws = rng.uniform((ROWS, TOKENS), rng.key(0, 0, "benchmark row"))
    ids = (draws * vocabulary).long()
    row = torch.arange(ROWS).repeat_interleave(TOKENS - 1)
    column = torch.arange(TOKENS - 1).repeat(ROWS)
    return MicroBatch(ids, row, column, ids[:, 1:].flatten(), row // (ROWS // ADAPTERS), [], 0)


def step_seconds(shape: tuple[int, int, int, int], turns: int) -> dict[torch.dtype, float]:
    batch, counts = random_batch(shape[-1]), torch.full((ADAPTERS,), ROWS * TOKENS / ADAPTERS)
    models = {dtype: packed_model(shape, dtype) for dtype in DTYPES}
    seconds = dict.fromkeys(DTYPES, float("inf"))
    for _ in range(turns):
        for dtype, (model, bank) in models.items():
            bank.zero_grad()
            start = time.process_time()
            packed_loss(model, batch, counts, plain_head=True)[0].backward()
            seconds[dtype] = min(seconds[dtype], time.process_time() - start)
    return seconds


def measured(shape: tuple[int, int, int, int], turns: int) -> dict[str, Any]:
    model, _ = packed_model(shape, torch.float32)
    d_out, d_in = (min(width, WIDEST) for width in commonest_shape(model))
    step = step_seconds(shape, turns)
    return {
        "hidden": shape[0],
        "layers": shape[1],
        "intermediate": shape[2],
        "vocabulary": shape[3],
        "step_s": {str(dtype).removeprefix("torch."): round(seconds, 4) for dtype, seconds in step.items()},
        "faster_by": {
            "product": round(product_speedup(d_in, d_out), 2),
            "step": round(step[torch.float32] / step[torch.bfloat16], 2),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--widths", type=int, nargs="+", help="of SHAPES only these")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    a = parser.parse_args()
    found: dict[str, Any] = {**environment(), "adapters": ADAPTERS, "rows": ROWS, "tokens": TOKENS, "shapes": []}
    for shape in SHAPES:
        if a.widths is None or shape[0] in a.widths:
            found["shapes"].append(measured(shape, a.turns))
            last = found["shapes"][-1]
            print(f"width {last['hidden']:5}: {last['faster_by']}", flush=True)
    if a.out:
        write_json(a.out, found)


if __name__ == "__main__":
    main()
