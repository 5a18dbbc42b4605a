"""What does the demo's merge lose when it is truncated to a smaller rank?

    python scripts/benchmarks/ranks.py --seeds 100 105 --out scripts/benchmarks/results/ranks.json
    python scripts/benchmarks/ranks.py --summary scripts/benchmarks/results/ranks.json

For every seed it trains the adapters of configs/demo.yaml and scores their merge, and its best approximations of
smaller ranks, on all test questions, as `poc-lora eval --ranks` does. The second form prints a finished file as
Markdown. A seed that is in the file already is not run again.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from demo_seeds import CONFIG, accuracy
from distil import Scorer, train_pack
from torch import Tensor

from poc_lora.config import RunConfig, load_config
from poc_lora.environment import environment
from poc_lora.evaluation.scores import paired_difference
from poc_lora.files import write_json
from poc_lora.lora.bank import AdapterBank
from poc_lora.merging.decomposition import decompose
from poc_lora.microworld import DATA_DIR, MODEL_DIR
from poc_lora.models.load import load_base
from poc_lora.training.data import TrainingData, prepare_data

RANKS = (4, 8, 16, 32, 64)


def right(log_probs: dict[str, Tensor], scorer: Scorer) -> dict[str, Tensor]:
    """1.0 for each question answered right, else 0.0, by benchmark."""
    return {b: (log_probs[b].argmax(-1) == q.answers).double() for b, q in scorer.prepared.items()}


def one_seed(config: RunConfig, scorer: Scorer, data: TrainingData, saved: Path | None) -> dict[str, Any]:
    """Train the adapters of one seed, and score their merge at every rank."""
    model, M, seed = scorer.model, config.adapters.count, config.adapters.seed
    pack = train_pack(config, model, data, saved)
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
    found: dict[str, Any] = {"merge": round(accuracy(whole, scorer.prepared), 3), "ranks": {}}
    for slot, rank in enumerate(RANKS):
        own = {b: x[slot] for b, x in packed.items()}
        d = paired_difference(right(own, scorer), right(whole, scorer), seed=seed)
        found["ranks"][str(rank)] = {
            "accuracy": round(accuracy(own, scorer.prepared), 3),
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs=2, metavar=("FIRST", "PAST_LAST"), default=(100, 105))
    parser.add_argument("--packs", type=Path, help="a folder that keeps the trained adapters, to train none twice")
    parser.add_argument("--limit", type=int, help="only the first test questions of each benchmark")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--summary", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the demo's configuration")
    a = parser.parse_args()
    if a.summary:
        print(summary(json.loads(a.summary.read_text())))
        return
    model_name, train = json.dumps(str(MODEL_DIR)), json.dumps([str(DATA_DIR)])
    place = [f"model.name={model_name}", f"data.train={train}", *a.overrides]
    config = load_config(CONFIG, place)
    model, tokenizer = load_base(str(MODEL_DIR))
    settings = {name: config.model_dump(mode="json")[name] for name in ("lora", "optim", "train")}
    found = {"seeds": {}, "settings": settings, **environment()}
    if a.out and a.out.exists():
        found = json.loads(a.out.read_text())
        if found["settings"] != settings:
            parser.error(f"{a.out} was made with other settings")
    scorer = Scorer(model, tokenizer, a.limit)
    for seed in range(*a.seeds):
        if str(seed) not in found["seeds"]:
            run = load_config(CONFIG, [*place, f"adapters.seed={seed}"])
            saved = a.packs and a.packs / f"seed{seed}.pt"
            found["seeds"][str(seed)] = one_seed(run, scorer, prepare_data(run, tokenizer), saved)
            if a.out:
                write_json(a.out, found)
    print(summary(found))


if __name__ == "__main__":
    main()
