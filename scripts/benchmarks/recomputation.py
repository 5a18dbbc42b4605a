"""Memory against time of computing activations again: none, those of norms and gates, or all of a layer.

    python scripts/benchmarks/recomputation.py --out scripts/benchmarks/results/recomputation.json

A random Llama has eight adapters of rank 16 on all linear layers. A step is a forward and backward pass over 16 rows of
100 tokens; the peak is of tensors made in it. Time is that of the processor, the shortest of `--turns` in turns. All
three have the same gradients, bit by bit. The library has the first and the last; torch.compile, on a GPU, gives what
the second does.
"""

import argparse
import contextlib
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cpu_dtypes import ADAPTERS, ROWS, TOKENS, packed_model, random_batch
from torch.utils.checkpoint import checkpoint

from poc_lora.environment import environment
from poc_lora.files import write_json
from poc_lora.models.compilation import ROTARY, compiled_parts
from poc_lora.models.recomputation import gradient_checkpointing
from poc_lora.training.loss import packed_loss
from poc_lora.training.shapes import PeakBytes

SHAPE = (576, 4, 1536, 2048)  # hidden, layers, intermediate, vocabulary: the widths of SmolLM2-135M


def recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with what it keeps for the gradient: its inputs. The rotary embedding keeps less as it is."""
    if function.__name__ == ROTARY:
        return function
    return functools.partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)


KINDS: dict[str, Callable[[Any], contextlib.AbstractContextManager[None]]] = {
    "none": lambda model: contextlib.nullcontext(),
    "norms and gates": lambda model: compiled_parts(model, recomputed),
    "layers": gradient_checkpointing,
}


def measured(dtype: torch.dtype, turns: int) -> dict[str, Any]:
    model, bank = packed_model(SHAPE, dtype)
    for module in bank.modules.values():
        module.train()
    batch, counts = random_batch(SHAPE[-1]), torch.full((ADAPTERS,), ROWS * TOKENS / ADAPTERS)
    peaks, gradients, seconds = {}, {}, dict.fromkeys(KINDS, float("inf"))
    for turn in range(turns + 1):
        for kind, recomputing in KINDS.items():
            bank.zero_grad()
            with recomputing(model), contextlib.nullcontext() if turn else PeakBytes() as alive:
                start = time.process_time()
                packed_loss(model, batch, counts, plain_head=True)[0].backward()
                if alive is None:
                    seconds[kind] = min(seconds[kind], time.process_time() - start)
                else:
                    peaks[kind], gradients[kind] = alive.peak, bank.gradients.clone()
    return {
        kind: {
            "peak_bytes": peaks[kind],
            "of_none": round(peaks[kind] / peaks["none"], 3),
            "seconds": round(seconds[kind], 3),
            "times_as_long": round(seconds[kind] / seconds["none"], 3),
            "same_bits": gradients[kind].equal(gradients["none"]),
        }
        for kind in KINDS
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    a = parser.parse_args()
    found: dict[str, Any] = {**environment(), "shape": SHAPE, "adapters": ADAPTERS, "rows": ROWS, "tokens": TOKENS}
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        found[name] = measured(dtype, a.turns)
        for kind, row in found[name].items():
            print(name, kind, row, flush=True)
    if a.out:
        write_json(a.out, found)


if __name__ == "__main__":
    main()
