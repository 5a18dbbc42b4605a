"""Whether a CPU multiplies in bfloat16 much faster than in float32, as recent ones do.

It is said, not done: `model.dtype: auto` stays float32 on a CPU. A measured default would depend on the machine and on
what else it does, and runs that are compared (other seeds, the control without noise, evaluations) need one dtype.
"""

import time
from collections import Counter

import torch
from torch import nn
from transformers import PreTrainedModel

from poc_lora.config import ModelSection

ROWS = 256
# Products of wider layers have much the same ratio, but take longer than a millisecond: on a machine with other work,
# those in float32 were interrupted every time, and seemed 30 times as slow.
WIDEST = 512
# With narrower layers, matmuls may be as much faster, but take the smaller part of a training step.
NARROWEST = 256
WORTHWHILE = 1.5
REPEATS = 20


def bfloat16_advice(model: PreTrainedModel, section: ModelSection, dtype: str, device: torch.device) -> str | None:
    """Returns what `model.dtype=bfloat16` would bring, by a measured product; None if that is little.

    Args:
        model: The base model, or its shapes alone.
        section: As the run asks for it.
        dtype: What `section.dtype` comes to.
        device: Where the run is trained.
    """
    quantized = section.quantization or getattr(model.config, "quantization_config", None)
    if section.dtype != "auto" or dtype != "float32" or quantized or device.type != "cpu":
        return None
    d_out, d_in = (min(width, WIDEST) for width in commonest_shape(model))
    if min(d_out, d_in) < NARROWEST:
        return None
    times = product_speedup(d_in, d_out)
    if times < WORTHWHILE:
        return None
    return (
        f"this CPU multiplies [{ROWS}, {d_in}] by [{d_in}, {d_out}] {times:.1f} times as fast in bfloat16 as in "
        "float32, in which the base is; set model.dtype=bfloat16 for faster training, with weights of half the size"
    )


def commonest_shape(model: PreTrainedModel) -> tuple[int, int]:
    """Returns the shape [d_out, d_in] of linear layers that has most of the weights, without the head; else (0, 0)."""
    head, weights = model.get_output_embeddings(), Counter[tuple[int, int]]()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            weights[module.out_features, module.in_features] += module.in_features * module.out_features
    return weights.most_common(1)[0][0] if weights else (0, 0)


def product_speedup(d_in: int, d_out: int) -> float:
    """Returns how many times as fast as in float32 a CPU computes a linear layer of `ROWS` rows in bfloat16.

    The two take turns, and the shortest time of each counts, since other work on the machine only adds.
    """
    fastest: dict[torch.dtype, float] = {}
    for dtype in (torch.float32, torch.bfloat16) * REPEATS:
        x, weight = torch.ones(ROWS, d_in, dtype=dtype), torch.ones(d_out, d_in, dtype=dtype)
        start = time.perf_counter()
        nn.functional.linear(x, weight)
        seconds = time.perf_counter() - start
        fastest[dtype] = min(seconds, fastest.get(dtype, seconds))
    return fastest[torch.float32] / fastest[torch.bfloat16]
