"""What one GPU gives at best for the operations that packed training of an 8B model is made of."""

import contextlib
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from train import MATMUL_SIZE

ADAPTERS, RANK, HIDDEN, TOKENS = 8, 32, 4096, 936  # tokens of one adapter in a micro-batch
WIDTHS = {"kv": 1024, "q": 4096, "up": 14336}  # of the outputs of linear layers


def ceilings() -> dict[str, Any]:
    """Rates by name: TFLOP/s of bfloat16 matmuls, TB/s of copies and of the adapters' thin matmuls, microseconds."""
    device = torch.device("cuda")
    found: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "multiprocessors": torch.cuda.get_device_properties(device).multi_processor_count,
        "free_gb": round(torch.cuda.mem_get_info()[0] / 1e9, 2),
        "cudnn": torch.backends.cudnn.version(),
    }

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    n = MATMUL_SIZE["cuda"]
    a, b = random(n, n), random(n, n)
    found["matmul_tflops"] = round(2 * n**3 / seconds_of(lambda: a @ b) / 1e12)
    big = torch.empty(2**30, device=device, dtype=torch.uint8)
    other = torch.empty_like(big)
    found["copy_tb_s"] = round(2 * big.nbytes / seconds_of(lambda: other.copy_(big)) / 1e12, 2)

    x = random(ADAPTERS * TOKENS, HIDDEN)
    for name, width in WIDTHS.items():
        w = random(width, HIDDEN)
        seconds = seconds_of(partial(torch.matmul, x, w.T))
        found[f"linear_{name}_tflops"] = round(2 * x.numel() * width / seconds / 1e12)

    # The adapters' own: x Aᵀ reads x, y += u B reads and writes y, and the gradient uᵀ x is summed up in float32.
    X, y = x.view(ADAPTERS, TOKENS, HIDDEN), random(ADAPTERS, TOKENS, HIDDEN)
    A, u = random(ADAPTERS, RANK, HIDDEN), random(ADAPTERS, TOKENS, RANK)
    found["lora_down_tb_s"] = round(x.nbytes / seconds_of(lambda: X @ A.transpose(1, 2)) / 1e12, 2)
    found["lora_up_tb_s"] = round(2 * y.nbytes / seconds_of(lambda: y.baddbmm_(u, A)) / 1e12, 2)
    total = torch.zeros(ADAPTERS, RANK, HIDDEN, device=device)
    found["lora_gradient_us"] = round(1e6 * seconds_of(lambda: total.add_(torch.bmm(u.transpose(1, 2), X))), 1)
    with contextlib.suppress(Exception):  # what not every build has
        into: Any = dict(out_dtype=torch.float32, out=total)
        found["lora_gradient_float32_us"] = round(
            1e6 * seconds_of(lambda: torch.baddbmm(total, u.transpose(1, 2), X, **into)), 1
        )
    with contextlib.suppress(Exception):  # what not every GPU has
        found["fp8_rowwise_tflops"] = round(2 * n**3 / fp8_seconds(a, b) / 1e12)
    return found


def fp8_seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    """Seconds of a matmul of two square matrices in float8, with a scale for each row and column."""
    left, right = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).T.contiguous().T
    ones = torch.ones(len(a), 1, device=a.device)
    how: Any = dict(out_dtype=torch.bfloat16, use_fast_accum=True)
    return seconds_of(lambda: torch._scaled_mm(left, right, ones, ones.T, **how))


def seconds_of(work: Callable[[], object], times: int = 5, warm: int = 2) -> float:
    """The median time of one call, on the GPU's own clock."""
    for _ in range(warm):
        work()
    found: list[float] = []
    for _ in range(times):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(found)
