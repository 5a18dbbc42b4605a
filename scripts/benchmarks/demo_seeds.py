"""The demo on many seeds, with and without noise: does the merge beat the best adapter, and by how much?

    python scripts/benchmarks/demo_seeds.py --seeds 100 110 --out scripts/benchmarks/results/demo_seeds.json
    python scripts/benchmarks/demo_seeds.py --summary scripts/benchmarks/results/demo_seeds.json --figure demo.png

For every seed and temperature it trains the adapters of configs/demo.yaml and scores, on all test questions, each
adapter, the merges of two disjoint pairs and two fours, the merge of all, and the prediction ensemble. The second form
prints a finished file as Markdown, and draws accuracy against the number of adapters merged. A seed that is in the
file already is not run again.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from poc_lora.config import RunConfig, load_config
from poc_lora.data.commonsense import BENCHMARKS
from poc_lora.data.questions import read_questions
from poc_lora.devices import by_device
from poc_lora.environment import environment
from poc_lora.evaluation.protocols.label import PreparedQuestions, prepare, score_labels
from poc_lora.files import write_json
from poc_lora.microworld import DATA_DIR, MODEL_DIR
from poc_lora.models.load import load_base
from poc_lora.reporting.figures import subsets_figure
from poc_lora.training.data import prepare_data
from poc_lora.training.memory import FAST_TOKENS, Sizes
from poc_lora.training.step import Pack

CONFIG = Path(__file__).parents[2] / "configs" / "demo.yaml"


def accuracy(log_probs: dict[str, torch.Tensor], prepared: dict[str, PreparedQuestions]) -> float:
    """The plain average over benchmarks, in percent."""
    right = {b: (log_probs[b].argmax(-1) == q.answers) & ~q.too_long for b, q in prepared.items()}
    shares = [values.double().mean() for values in right.values()]
    return 100 * float(torch.stack(shares).mean())


@torch.no_grad()
def one_seed(
    config: RunConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prepared: dict[str, PreparedQuestions],
) -> dict[str, Any]:
    """Train one pack and score it whole and in part."""
    M = config.adapters.count
    data = prepare_data(config, tokenizer)
    sizes = Sizes(by_device(FAST_TOKENS, model.device.type), M, gradient_checkpointing=False)
    pack = Pack(config, model, data, range(M), sizes=sizes)
    with torch.enable_grad():
        for step in range(data.total_steps):
            pack.step(step)
    model.eval()
    packed = {b: score_labels(model, q, copies=M) for b, q in prepared.items()}
    singles = [accuracy({b: x[slot] for b, x in packed.items()}, prepared) for slot in range(M)]
    merges: dict[int, list[float]] = {}
    for m in (2, 4, M):
        merges[m] = []
        for first in range(0, M, m)[:2]:
            with pack.bank.merged(range(first, first + m)):
                merges[m].append(accuracy({b: score_labels(model, q)[0] for b, q in prepared.items()}, prepared))
    # The mean of the members' probabilities, up to a factor.
    ensemble = accuracy({b: x.log_softmax(-1).logsumexp(0) for b, x in packed.items()}, prepared)
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs=2, metavar=("FIRST", "PAST_LAST"), default=(100, 110))
    parser.add_argument("--temperatures", nargs="+", help="default: the demo's own, and 0")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--summary", type=Path)
    parser.add_argument("--figure", type=Path, help="with --summary: draw it here")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    a = parser.parse_args()
    if a.summary:
        found = json.loads(a.summary.read_text())
        print(summary(found))
        if a.figure:
            figure(found).savefig(a.figure, dpi=160, metadata={"Software": None})
        return
    model_name, train = json.dumps(str(MODEL_DIR)), json.dumps([str(DATA_DIR)])
    place = [f"model.name={model_name}", f"data.train={train}", *a.overrides]
    config = load_config(CONFIG, place)
    model, tokenizer = load_base(str(MODEL_DIR))
    prepared = {b.folder: prepare(read_questions(DATA_DIR, b), tokenizer, prompt="bare") for b in BENCHMARKS}
    settings = {name: config.model_dump(mode="json")[name] for name in ("lora", "optim", "train")}
    found = {"temperatures": {}, "settings": settings, **environment()}
    if a.out and a.out.exists():
        found = json.loads(a.out.read_text())
        if found["settings"] != settings:
            parser.error(f"{a.out} was made with other settings")
    for seed in range(*a.seeds):
        for temperature in a.temperatures or [f"{config.optim.temperature:g}", "0"]:
            done = found["temperatures"].setdefault(temperature, {})
            if str(seed) not in done:
                run = load_config(CONFIG, [*place, f"adapters.seed={seed}", f"optim.temperature={temperature}"])
                done[str(seed)] = one_seed(run, model, tokenizer, prepared)
                if a.out:
                    write_json(a.out, found)
    print(summary(found))


if __name__ == "__main__":
    main()
