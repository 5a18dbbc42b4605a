"""Draws the figure of docs/evidence.md from the JSON files of `real_model.py study`.

    python scripts/benchmarks/real_model_figure.py scripts/benchmarks/results/real_model_h200 --out evidence.png

Held-out loss against the number of adapters merged, beside the best adapter and the rivals, a panel for each task.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from real_model_jobs import JOBS, Job

from poc_lora.files import write_atomic
from poc_lora.plotting import COLOURS, render, style

# The title of each panel, and its rivals: their label, the job that trained them, and their variants' name in it.
PANELS = {
    "choices": (
        "Multiple choice",
        {"8 ×\nbatch": ("choices_larger_batch", "adapter"), "8 ×\nrank": ("choices_rank_256", "adapter")},
    ),
    "docstrings": (
        "Docstrings",
        {
            "8 ×\nbatch": ("docstrings_larger_batch", "adapter"),
            "same,\naveraged": ("docstrings_larger_batch", "ema_adapter"),
        },
    ),
}


def losses_by_size(heldout: dict[str, float], job: Job) -> list[dict[int, list[float]]]:
    """Returns for each pack the losses of its adapters, under 1, and of its disjoint merges of 2, 4, ... adapters."""
    packs: list[dict[int, list[float]]] = [{1: []} for _ in range(job.packs)]
    for slot in range(job.count):
        packs[slot // job.members][1].append(heldout[f"adapter_{slot}"])
    for name, members in job.merges():
        packs[members[0] // job.members].setdefault(len(members), []).append(heldout[name])
    return packs


@style()
def figure(folder: Path) -> Figure:
    """Returns a panel for each task: lines of merges to the left, marks of what they are compared with to the right."""
    drawn = Figure(figsize=(8.2, 3.3), layout="constrained")
    for axes, (name, (title, rivals)) in zip(drawn.subplots(1, 2), PANELS.items(), strict=True):
        packs = losses_by_size(_heldout(folder, name), JOBS[name])
        _merges(axes, packs)
        axes.set_title(title)
        others = {"best\nof 8": [min(pack[1]) for pack in packs]}
        for label, (job, variant) in rivals.items():
            heldout = _heldout(folder, job)
            others[label] = [heldout[f"{variant}_{slot}"] for slot in range(JOBS[job].count)]
        bottom, top = axes.get_ylim()
        lowest = min(bottom, *map(min, others.values()))
        axes.set_ylim(lowest - 0.05 * (top - lowest), top)
        sizes = list(packs[0])
        places = [len(sizes) + 0.2 + 1.3 * i for i in range(len(others))]
        for i, (place, losses) in enumerate(zip(places, others.values(), strict=True)):
            _mark(axes, place, losses, COLOURS["ensemble" if i else "best"])
        axes.set_xticks([*range(len(sizes)), *places], [*map(str, sizes), *others])
        axes.set_xlim(-0.4, right := places[-1] + 1)
        axes.set_xlabel("adapters merged", x=(len(sizes) - 0.2) / 2 / (right + 0.4))
    drawn.axes[0].set_ylabel("held-out loss")
    return drawn


def _heldout(folder: Path, job: str) -> dict[str, float]:
    found: dict[str, float] = json.loads((folder / f"{job}.json").read_text(encoding="utf-8"))["heldout"]
    return found


def _merges(axes: Axes, packs: list[dict[int, list[float]]]) -> None:
    """Dots for every adapter and merge, a thin line for each pack's means and a bold one for the mean of packs."""
    means = [[statistics.mean(losses) for losses in pack.values()] for pack in packs]
    places = range(len(means[0]))
    for pack, line in zip(packs, means, strict=True):
        for place, losses in zip(places, pack.values(), strict=True):
            axes.plot([place] * len(losses), losses, ".", color=COLOURS["adapter"], markersize=3, alpha=0.6)
        axes.plot(places, line, color=COLOURS["adapter"], linewidth=0.8)
    overall = [statistics.mean(values) for values in zip(*means, strict=True)]
    axes.plot(places, overall, "o-", color=COLOURS["merge"], linewidth=2.2)
    for place, value in zip(places, overall, strict=True):
        _write(axes, value, (place, value), (5, 8), COLOURS["merge"], ha="left")


def _mark(axes: Axes, place: float, losses: list[float], colour: str) -> None:
    """A dash at the mean and a dot for each loss; above the panel's top, an arrow and the mean."""
    mean, top = statistics.mean(losses), axes.get_ylim()[1]
    if mean > top:
        arrow = {"arrowstyle": "->", "color": colour}
        _write(axes, mean, (place, top), (0, -30), colour, arrowprops=arrow)
        return
    axes.plot([place] * len(losses), losses, ".", color=colour, markersize=4, alpha=0.6)
    axes.plot([place - 0.22, place + 0.22], [mean, mean], color=colour, linewidth=2.2)
    _write(axes, mean, (place + 0.22, mean), (3, 0), colour, ha="left")


def _write(axes: Axes, value: float, at: tuple[float, float], offset: tuple[int, int], colour: str, **how: Any) -> None:
    """Writes a value beside the point `at`, `offset` printer's points from it."""
    place: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "center", "color": colour, "size": 8}
    axes.annotate(f"{value:.3f}", at, offset, **place | how)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    write_atomic(a.out, render(figure(a.folder), "png", dpi=160))


if __name__ == "__main__":
    main()
