"""Does it pay to leave adapters that learnt too little out of a merge, and are good ones ever left out?

    python scripts/benchmarks/screening.py --seeds 100 105 --out scripts/benchmarks/results/screening.json
    python scripts/benchmarks/screening.py --summary scripts/benchmarks/results/screening.json

For every seed it trains the adapters of configs/demo.yaml and screens them on half of the validation questions, as they
are and after two of them were made to collapse: their updates B·A are multiplied by 2, by 3 and by 4. On all test
questions it scores the merge of all and that without those two. The second form prints a finished file as Markdown. A
seed that is in the file already is not run again.
"""

import argparse
import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from demo_seeds import CONFIG
from distil import Scorer, train_pack
from transformers import PreTrainedTokenizerBase

from poc_lora.config import RunConfig, load_config
from poc_lora.data.prompts import encode_rows
from poc_lora.data.rows import read_sources
from poc_lora.environment import environment
from poc_lora.files import write_json
from poc_lora.microworld import DATA_DIR, MODEL_DIR
from poc_lora.models.load import load_base
from poc_lora.reporting.screening import Screening, screen
from poc_lora.training.data import TrainingData, prepare_data
from poc_lora.training.step import Pack
from poc_lora.training.validation import validate

COLLAPSED = (2, 5)
FACTORS = (1, 2, 3, 4)


def with_validation_questions(data: TrainingData, tokenizer: PreTrainedTokenizerBase) -> TrainingData:
    """The rows of a run, with the validation questions in place of rows held out."""
    sources = sorted(str(path) for path in DATA_DIR.glob("*/validation.json"))
    encoded = encode_rows(read_sources(sources), tokenizer, template="bare", max_length=data.max_length, learn="last")
    return replace(data, validation=encoded.answers[::2])  # half of them, 192


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


def one_seed(config: RunConfig, scorer: Scorer, data: TrainingData, packs: Path | None) -> dict[str, Any]:
    """Screen the adapters of one seed, collapsed by each factor, and score both merges."""
    pack = train_pack(config, scorer.model, data, packs and packs / f"seed{config.adapters.seed}.pt")
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs=2, metavar=("FIRST", "PAST_LAST"), default=(100, 105))
    parser.add_argument("--packs", type=Path, help="a folder that keeps the trained adapters, to train none twice")
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
    scorer = Scorer(model, tokenizer)
    for seed in range(*a.seeds):
        if str(seed) not in found["seeds"]:
            run = load_config(CONFIG, [*place, f"adapters.seed={seed}"])
            data = with_validation_questions(prepare_data(run, tokenizer), tokenizer)
            found["seeds"][str(seed)] = one_seed(run, scorer, data, a.packs)
            if a.out:
                write_json(a.out, found)
    print(summary(json.loads(json.dumps(found))))


if __name__ == "__main__":
    main()
