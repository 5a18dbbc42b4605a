"""Short texts for the end of a verb."""

from typing import Any

from poc_lora.training.loop import Trained
from poc_lora.training.plan import size


def training_summary(done: Trained) -> list[str]:
    """What a training did, rows that did not take part and adapters that diverged included."""
    finished = [adapter for adapter, state in done.progress.items() if state.status == "finished"]
    lines = [f"{len(finished)} adapters trained for {done.steps} steps"]
    if done.seconds:
        rate = done.real_tokens / done.seconds
        share = done.real_tokens / done.computed_tokens
        lines[0] += (
            f": {done.real_tokens:,} tokens in {done.seconds:.0f} s, {rate:,.0f} tokens/s, {share:.1%} not padding"
        )
        lines.append(f"peak memory {size(done.peak_bytes)}")
    if done.shortened:
        lines.append(f"{done.shortened} rows were cut to data.max_length")
    if done.lost:
        lines.append(f"{done.lost} rows were left out: data.max_length cut off their whole answer")
    for adapter, state in done.progress.items():
        if state.status == "diverged":
            lines.append(f"adapter {adapter} diverged after step {state.step} and is left out of the merge")
    return lines


def merge_summary(report: dict[str, Any]) -> list[str]:
    """What a merge did, and how far it is from the merge of ever more adapters."""
    M = len(report["sources"])
    lines = [f"{M} adapters merged into one of rank {report['rank']}, relative error {report['error']:.1e}"]
    if report["relative_error_bar"] is not None:
        lines.append(
            f"mean cosine of the updates {report['mean_cosine']:.3f}; "
            f"the merge is about {report['relative_error_bar']:.0%} of its norm from the limit of many adapters"
        )
    return lines
