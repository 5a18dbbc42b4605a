"""What does the demo's merge lose when it is truncated to a smaller rank?

    python scripts/benchmarks/ranks.py --seeds 100 105 --out scripts/benchmarks/results/ranks.json
    python scripts/benchmarks/ranks.py --summary scripts/benchmarks/results/ranks.json

For every seed it trains the adapters of configs/demo.yaml and scores their merge, and its best approximations of
smaller ranks, on all test questions, as `poc-lora eval --ranks` does. The second form prints a finished file as
Markdown. A seed that is in the file already is not run again.
"""

import json
import statistics
from pathlib import Path
from typing import Any

import torch
from demo_runs import Results, Scorer, Setting, parser_of, run_seeds, train_pack
from torch import Tensor

from poc_lora.config import RunConfig
from poc_lora.evaluation.scores import paired_difference
from poc_lora.lora.bank import AdapterBank
from poc_lora.merging.decomposition import decompose
from poc_lora.training.data import prepare_data

RANKS = (4, 8, 16, 32, 64)


def right(log_probs: dict[str, Tensor], scorer: Scorer) -> dict[str, Tensor]:
    """1.0 for each question answered right, else 0.0, by benchmark."""
    return {b: (log_probs[b].argmax(-1) == q.answers).double() for b, q in scorer.prepared.items()}


def one_seed(config: RunConfig, scorer: Scorer, packs: Path | None) -> dict[str, Any]:
    """Train the adapters of one seed, and score their merge at every rank."""
    model, M, seed = scorer.model, config.adapters.count, config.adapters.seed
    pack = train_pack(config, model, prepare_data(config, scorer.tokenizer), packs)
    with pack.bank.merged():
        whole = {b: x[0] for b, x in scorer.answers(1).items()}
    merged = {
        path: decompose(
            module.factors.A.detach().double().flatten(0, 1),
            module.factors.B.detach().double().flatten(0, 1).T * (pack.bank.scales.values[0] / M),
        )
        for path, module in pack.bank.modules.items()
    }
    pack.close()
    bank = AdapterBank.blank(model, targets=config.lora.targets, rank=max(RANKS), adapters=range(len(RANKS)))
    with torch.no_grad():
        for path, module in bank.modules.items():
            for slot, rank in enumerate(RANKS):  # smaller ranks are padded with zeros
                A, B = merged[path].truncated(rank)
                module.factors.A[slot, : len(A)].copy_(A)
                module.factors.B[slot, : len(A)].copy_(B.T)
        packed = scorer.answers(len(RANKS))
    bank.remove()
    found: dict[str, Any] = {"merge": round(scorer.accuracy(whole), 3), "ranks": {}}
    for slot, rank in enumerate(RANKS):
        own = {b: x[slot] for b, x in packed.items()}
        d = paired_difference(right(own, scorer), right(whole, scorer), seed=seed)
        found["ranks"][str(rank)] = {
            "accuracy": round(scorer.accuracy(own), 3),
            "difference": [round(100 * x, 3) for x in (d.value, d.low, d.high)],
            "error": round(max(triples.error(rank) for triples in merged.values()), 4),
        }
    return found


def summary(found: dict[str, Any]) -> str:
    """The file as a Markdown table: means over seeds, and of the differences the range and the lowest bound."""
    runs = list(found["seeds"].values())
    lines = [
        f"| {len(runs)} seeds | accuracy | minus the merge (range) | lowest end of a 95 % interval | largest error |",
        "|---|---:|---:|---:|---:|",
    ]
    for rank in map(str, RANKS):
        own = [run["ranks"][rank] for run in runs]
        gaps = [x["difference"][0] for x in own]
        cells = [
            f"{statistics.mean(x['accuracy'] for x in own):.2f}",
            f"{statistics.mean(gaps):+.2f} ({min(gaps):+.2f} to {max(gaps):+.2f})",
            f"{min(x['difference'][1] for x in own):+.2f}",
            f"{max(x['error'] for x in own):.2f}",
        ]
        lines.append(f"| rank {rank} | " + " | ".join(cells) + " |")
    lines.append(f"| the merge | {statistics.mean(run['merge'] for run in runs):.2f} | | | |")
    return "\n".join(lines).replace("-0.00", "0.00")


def main() -> None:
    a = parser_of(__doc__).parse_args()
    if a.summary:
        print(summary(json.loads(a.summary.read_text())))
        return
    demo = Setting(a.overrides)
    results = Results(a.out, {"settings": demo.described(), "limit": a.limit}, {"seeds": {}})
    scorer = Scorer(*demo.load(), a.limit)
    run_seeds(a, results, lambda seed: one_seed(demo.config(f"adapters.seed={seed}"), scorer, a.packs))
    print(summary(results.found))


if __name__ == "__main__":
    main()
