"""Does it pay to leave adapters that learnt too little out of a merge, and are good ones ever left out?

    python scripts/benchmarks/screening.py --seeds 100 105 --out scripts/benchmarks/results/screening.json
    python scripts/benchmarks/screening.py --summary scripts/benchmarks/results/screening.json

For every seed it trains the adapters of configs/demo.yaml and screens them on half of the validation questions, as they
are and after two of them were made to collapse: their updates B·A are multiplied by 2, by 3 and by 4. On all test
questions it scores the merge of all and that without those two. The second form prints a finished file as Markdown. A
seed that is in the file already is not run again.
"""

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from demo_runs import Results, Scorer, Setting, parser_of, prepare_with_questions, run_seeds, train_pack

from poc_lora.config import RunConfig
from poc_lora.reporting.screening import Screening, screen
from poc_lora.training.step import Pack
from poc_lora.training.validation import validate

COLLAPSED = (2, 5)
FACTORS = (1, 2, 3, 4)


def screened(pack: Pack) -> Screening:
    """Validate a pack as training does, and read what it writes."""
    members = [pack.bank.adapters[slot] for slot in pack.live]
    lines = [
        json.dumps({"step": pack.data.total_steps, "adapter": name, "members": members} | measures)
        for name, measures in (validate(pack) or {}).items()
    ]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "metrics.jsonl").write_text("\n".join(lines))
        found = screen(Path(folder))
    if found is None:
        raise ValueError("no rows were held out, or there are too few adapters")
    return found


def one_seed(config: RunConfig, scorer: Scorer, packs: Path | None) -> dict[str, Any]:
    """Screen the adapters of one seed, collapsed by each factor, and score both merges."""
    data = prepare_with_questions(config, scorer.tokenizer, every=2)  # half of them, 192
    pack = train_pack(config, scorer.model, data, packs)
    weights, others = pack.bank.weights.clone(), [slot for slot in range(pack.bank.size) if slot not in COLLAPSED]
    with pack.bank.merged(others):
        without = scorer.measures({b: x[0] for b, x in scorer.answers(1).items()})
    found: dict[str, Any] = {"without": without}
    for factor in FACTORS:
        with torch.no_grad():
            pack.bank.weights.copy_(weights)
            pack.bank.weights[list(COLLAPSED)] *= factor**0.5
        screening = screened(pack)
        with pack.bank.merged():
            everyone = scorer.measures({b: x[0] for b, x in scorer.answers(1).items()})
        found[str(factor)] = {
            "base": screening.base,
            "median": screening.median,
            "collapsed": [screening.losses[adapter] for adapter in COLLAPSED],
            "left_out": list(screening.left_out),
            "all": everyone,
        }
    pack.close()
    return found


def summary(found: dict[str, Any]) -> str:
    """The file as a Markdown table: means over seeds."""
    lines = [
        "| two updates times | their loss | the median | left out | accuracy: merge of all | without the two"
        " | difference (range) | NLL: of all | without the two |",
        "|---:|---:|---:|---|---:|---:|---:|---:|---:|",
    ]
    for factor in map(str, FACTORS):
        seeds = list(found["seeds"].values())
        runs = [seed[factor] for seed in seeds]
        right = sum(run["left_out"] == list(COLLAPSED) for run in runs)
        none = sum(not run["left_out"] for run in runs)
        gain = [seed["without"]["accuracy"] - seed[factor]["all"]["accuracy"] for seed in seeds]
        accuracy, nll = (
            f"{statistics.mean(run['all'][x] for run in runs):.{digits}f}"
            f" | {statistics.mean(seed['without'][x] for seed in seeds):.{digits}f}"
            for x, digits in (("accuracy", 2), ("nll", 3))
        )
        collapsed = statistics.mean(loss for run in runs for loss in run["collapsed"])
        lines.append(
            f"| {factor} | {collapsed:.2f} | {statistics.mean(run['median'] for run in runs):.2f}"
            f" | none in {none} of {len(runs)} seeds, those two in {right} | {accuracy}"
            f" | {statistics.mean(gain):+.2f} ({min(gain):+.2f} to {max(gain):+.2f}) | {nll} |"
        )
    return "\n".join(lines)


def main() -> None:
    a = parser_of(__doc__).parse_args()
    if a.summary:
        print(summary(json.loads(a.summary.read_text())))
        return
    demo = Setting(a.overrides)
    results = Results(a.out, {"settings": demo.described(), "limit": a.limit}, {"seeds": {}})
    scorer = Scorer(*demo.load(), a.limit)
    run_seeds(a, results, lambda seed: one_seed(demo.config(f"adapters.seed={seed}"), scorer, a.packs))
    print(summary(results.as_read()))


if __name__ == "__main__":
    main()
