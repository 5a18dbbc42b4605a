"""The demo on many seeds, with and without noise: does the merge beat the best adapter, and by how much?

    python scripts/benchmarks/demo_seeds.py --seeds 100 110 --out scripts/benchmarks/results/demo_seeds.json
    python scripts/benchmarks/demo_seeds.py --summary scripts/benchmarks/results/demo_seeds.json --figure demo.png

For every seed and temperature it trains the adapters of configs/demo.yaml and scores, on all test questions, each
adapter, the merges of two disjoint pairs and two fours, the merge of all, and the prediction ensemble. The second form
prints a finished file as Markdown, and draws accuracy against the number of adapters merged. A seed that is in the
file already is not run again.
"""

import json
import statistics
from pathlib import Path
from typing import Any

import torch
from demo_runs import Results, Scorer, Setting, parser_of, train_pack
from matplotlib.figure import Figure

from poc_lora.config import RunConfig
from poc_lora.reporting.figures import subsets_figure
from poc_lora.training.data import prepare_data


@torch.no_grad()
def one_seed(config: RunConfig, scorer: Scorer) -> dict[str, Any]:
    """Train one pack and score it whole and in part."""
    M = config.adapters.count
    with torch.enable_grad():
        pack = train_pack(config, scorer.model, prepare_data(config, scorer.tokenizer), None)
    packed = scorer.answers(M)
    singles = [scorer.accuracy({b: x[slot] for b, x in packed.items()}) for slot in range(M)]
    merges: dict[int, list[float]] = {}
    for m in (2, 4, M):
        merges[m] = []
        for first in range(0, M, m)[:2]:
            with pack.bank.merged(range(first, first + m)):
                merges[m].append(scorer.accuracy({b: x[0] for b, x in scorer.answers(1).items()}))
    # The mean of the members' probabilities, up to a factor.
    ensemble = scorer.accuracy({b: x.log_softmax(-1).logsumexp(0) for b, x in packed.items()})
    pack.close()
    return {"adapters": singles, "merges": {str(m): x for m, x in merges.items()}, "ensemble": ensemble}


def summary(found: dict[str, Any]) -> str:
    """The file as a Markdown table: means over seeds, and how often the merge of all is ahead."""
    lines = [
        "| λ | average adapter | best adapter | merge of 2 | of 4 | of 8 | prediction ensemble |"
        " merge − best: mean (range) | merge beats best |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for temperature, seeds in found["temperatures"].items():
        runs = list(seeds.values())
        ahead = [run["merges"]["8"][0] - max(run["adapters"]) for run in runs]
        cells = [
            statistics.mean(statistics.mean(run["adapters"]) for run in runs),
            statistics.mean(max(run["adapters"]) for run in runs),
            *(statistics.mean(statistics.mean(run["merges"][m]) for run in runs) for m in ("2", "4", "8")),
            statistics.mean(run["ensemble"] for run in runs),
        ]
        lines.append(
            f"| {temperature} | "
            + " | ".join(f"{x:.2f}" for x in cells)
            + f" | {statistics.mean(ahead):+.2f} ({min(ahead):+.2f} to {max(ahead):+.2f})"
            + f" | {sum(x > 0 for x in ahead)} of {len(runs)} |"
        )
    return "\n".join(lines)


def figure(found: dict[str, Any]) -> Figure:
    """Average accuracy against m at the demo's λ: means over seeds, with standard errors."""
    runs = list(next(iter(found["temperatures"].values())).values())

    def over_seeds(values: list[float]) -> tuple[float, float]:
        return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5

    points = [(1, *over_seeds([statistics.mean(run["adapters"]) for run in runs]))]
    points += [(m, *over_seeds([statistics.mean(run["merges"][str(m)]) for run in runs])) for m in (2, 4, 8)]
    drawn = subsets_figure(points, statistics.mean(max(run["adapters"]) for run in runs))
    drawn.axes[0].set_title(f"The embedded demo, {len(runs)} seeds", fontsize=9)
    return drawn


def main() -> None:
    parser = parser_of(__doc__, seeds=(100, 110), packs=False, limit=False)
    parser.add_argument("--temperatures", nargs="+", help="default: the demo's own, and 0")
    parser.add_argument("--figure", type=Path, help="with --summary: draw it here")
    a = parser.parse_args()
    if a.summary:
        found = json.loads(a.summary.read_text())
        print(summary(found))
        if a.figure:
            figure(found).savefig(a.figure, dpi=160, metadata={"Software": None})
        return
    demo = Setting(a.overrides)
    results = Results(a.out, {"settings": demo.described()}, {"temperatures": {}})
    scorer = Scorer(*demo.load())
    for seed in range(*a.seeds):
        for temperature in a.temperatures or [f"{demo.config().optim.temperature:g}", "0"]:
            done = results.found["temperatures"].setdefault(temperature, {})
            if str(seed) not in done:
                config = demo.config(f"adapters.seed={seed}", f"optim.temperature={temperature}")
                done[str(seed)] = one_seed(config, scorer)
                results.save()
    print(summary(results.found))


if __name__ == "__main__":
    main()
