"""`train.keep`: the last step's weights, or those of the lowest validation loss? On the demo's model, several seeds.

    python scripts/benchmarks/keep.py --seeds 0 3 --out scripts/benchmarks/results/keep.json
    python scripts/benchmarks/keep.py --summary scripts/benchmarks/results/keep.json
    python scripts/benchmarks/keep.py --model SMOLLM2 --rows rows/docstrings --out FILE adapters.count=4

Each setting trains the adapters of configs/demo.yaml once per seed, with 120 validation rows: `demo` as it is, `few
rows` on 240 rows for twice as long. Both ends of each training, of adapters and merge, are then scored: the loss on the
validation rows, which choose for `best` and so favour it, and accuracy (%) and log loss of the label on half the test
questions. The second form prints a finished file as Markdown. A seed that is in the file already is not run again.

With --model, another base is trained on the first 150 rows of a task that real_model.py has written, for some three
epochs of the `docstrings` settings there, validated on 60 others every 20 steps. In place of accuracy and log loss
stands the loss per token of 100 other rows' answers.
"""

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from demo_runs import Results, Scorer, Setting, new_pack, parser_of, run_seeds
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from poc_lora.config import RunConfig
from poc_lora.data.batches import supervised_tokens
from poc_lora.data.commonsense import BENCHMARKS
from poc_lora.data.prompts import Example
from poc_lora.microworld import DATA_DIR
from poc_lora.training.data import prepare_data
from poc_lora.training.step import Pack
from poc_lora.training.validation import validate

FEW_ROWS = 30  # of each benchmark
QUESTIONS = 200  # of each benchmark's 400
SETTINGS = {
    "demo": ["train.validate_every=10"],
    "few rows": ["train.validate_every=20", "train.max_steps=300"],
}
# Of the setting with --model; the demo's configuration has all else.
REAL = """
    model.dtype=bfloat16 lora.rank=32 lora.alpha=64 data.validation=60 optim.lr=1e-3 optim.temperature=1e-5
    optim.warmup_steps=12 train.batch_size=4 train.max_steps=120 train.validate_every=20
""".split()
# Files of --rows, one row of how many, how many of those. Rows of one module stand together.
SELECTED = (("train.json", 20, 150 + 60), ("heldout.json", 2, 100))


def score(pack: Pack, scorer: Scorer) -> dict[str, list[float]]:
    """Validation loss, accuracy and log loss of the average adapter and of the merge."""
    measures, M = validate(pack) or {}, pack.bank.size

    def tested(log_probs: dict[str, torch.Tensor]) -> list[float]:
        found = scorer.measures(log_probs)
        return [found["accuracy"], found["nll"]]

    packed = scorer.answers(M)
    singles = [tested({b: x[slot] for b, x in packed.items()}) for slot in range(M)]
    with pack.bank.merged():
        merge = tested({b: x[0] for b, x in scorer.answers(1).items()})
    validation = statistics.mean(measures[adapter]["validation_loss"] for adapter in pack.bank.adapters)
    return {
        "adapter": [validation, *map(statistics.mean, zip(*singles, strict=True))],
        "merge": [measures["merge"]["validation_loss"], *merge],
    }


def held_out(pack: Pack, rows: list[Example]) -> dict[str, list[float]]:
    """Validation loss, and loss per token of the answers of other rows, of the average adapter and of the merge."""
    measures, tokens = validate(pack) or {}, sum(map(supervised_tokens, rows))

    def loss(view: AbstractContextManager[None]) -> float:
        with view:
            return sum(pack.row_losses(rows) or []) / tokens

    singles = [loss(pack.bank.only(slot)) for slot in range(pack.bank.size)]
    validation = statistics.mean(measures[adapter]["validation_loss"] for adapter in pack.bank.adapters)
    merge = [measures["merge"]["validation_loss"], loss(pack.bank.merged())]
    return {"adapter": [validation, statistics.mean(singles)], "merge": merge}


def one_seed(
    config: RunConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    score: Callable[[Pack], dict[str, list[float]]],
) -> dict[str, Any]:
    """Train one pack; score its last weights, then its best."""
    M = config.adapters.count
    data = prepare_data(config, tokenizer)
    pack = new_pack(config, model, data)
    best_loss, best_step, best = [math.inf] * M, [0] * M, pack.bank.weights.clone()
    for step in range(1, data.total_steps + 1):
        pack.step(step - 1)
        if step % (config.train.validate_every or 1) and step != data.total_steps:
            continue
        measures = validate(pack) or {}
        for slot in range(M):
            loss = measures[slot]["validation_loss"]
            if loss < best_loss[slot]:
                best_loss[slot], best_step[slot] = loss, step
                best[slot] = pack.bank.weights[slot]
    found: dict[str, Any] = {"last": score(pack)}
    pack.bank.weights.copy_(best)
    found |= {"best": score(pack), "best_steps": best_step, "steps": data.total_steps}
    pack.close()
    return found


def summary(found: dict[str, Any]) -> str:
    """The file as a Markdown table: means over seeds, and best minus last with the range over seeds."""
    if "model" in found:
        lines = ["| of | validation loss: last, best | held-out loss: last, best | best − last (range) |"]
        lines += ["|---|---:|---:|---:|"]
        for of in ("adapter", "merge"):
            last, best = ([run[end][of] for run in found["seeds"].values()] for end in ("last", "best"))
            means = [[statistics.mean(values) for values in zip(*end, strict=True)] for end in (last, best)]
            gains = [b[1] - a[1] for a, b in zip(last, best, strict=True)]
            cells = [", ".join(f"{end[i]:.3f}" for end in means) for i in (0, 1)]
            change = f"{statistics.mean(gains):+.3f} ({min(gains):+.3f} to {max(gains):+.3f})"
            lines.append(f"| {of} | {cells[0]} | {cells[1]} | {change} |")
        steps = [step for run in found["seeds"].values() for step in run["best_steps"]]
        return "\n".join([*lines, f"\nbest at step {statistics.median(steps):g} in the median"])
    lines = [
        "| setting | of | validation loss: last, best | accuracy: last, best | best − last (range) |"
        " log loss: last, best |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for setting, seeds in found["settings"].items():
        for of in ("adapter", "merge"):
            last, best = ([run[end][of] for run in seeds.values()] for end in ("last", "best"))
            means = [[statistics.mean(values) for values in zip(*end, strict=True)] for end in (last, best)]
            gains = [b[1] - a[1] for a, b in zip(last, best, strict=True)]
            change = f"{statistics.mean(gains):+.2f} ({min(gains):+.2f} to {max(gains):+.2f})"
            cells = [", ".join(f"{end[i]:.{digits}f}" for end in means) for i, digits in enumerate((3, 2, 3))]
            lines.append(f"| {setting} | {of} | {cells[0]} | {cells[1]} | {change} | {cells[2]} |")
    for setting, seeds in found["settings"].items():
        steps = [step for run in seeds.values() for step in run["best_steps"]]
        (total,) = {run["steps"] for run in seeds.values()}
        lines.append(f"\n{setting}: best at step {statistics.median(steps):g} of {total} in the median")
    return "\n".join(lines)


def some_rows(file: Path, rows: list[Any]) -> Path:
    file.write_text(json.dumps(rows))
    return file


def few_rows(file: Path) -> Path:
    """The first rows of each benchmark's train.json, and 120 more to validate on, as one file."""
    count = FEW_ROWS + 120 // len(BENCHMARKS)
    parts = [json.loads(path.read_text())[:count] for path in sorted(DATA_DIR.glob("*/train.json"))]
    return some_rows(file, [row for part in parts for row in part])


def demo(a: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both of `SETTINGS`."""
    results = Results(a.out, {"overrides": a.overrides}, {"settings": {name: {} for name in SETTINGS}})
    rows = {"demo": DATA_DIR, "few rows": few_rows(folder / "few.json")}
    model, tokenizer = Setting(()).load()
    scorer = Scorer(model, tokenizer, QUESTIONS)
    for seed in range(*a.seeds):
        for name, changes in SETTINGS.items():
            if str(seed) not in results.found["settings"][name]:
                setting = Setting(["data.validation=120", *changes, *a.overrides], rows=rows[name])
                config = setting.config(f"adapters.seed={seed}")
                results.found["settings"][name][str(seed)] = one_seed(
                    config, model, tokenizer, lambda pack: score(pack, scorer)
                )
                results.save()
    return results.found


def real(a: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The setting with --model."""
    results = Results(a.out, {"model": a.model.name, "overrides": a.overrides}, {"seeds": {}})
    train, heldout = (
        some_rows(folder / name, json.loads((a.rows / name).read_text())[::stride][:count])
        for name, stride, count in SELECTED
    )
    setting = Setting([*REAL, *a.overrides], a.model, train)
    model, tokenizer = setting.load()
    asked = replace(setting, rows=heldout).config("data.validation=0", "train.batch_size=1")
    others = list(prepare_data(asked, tokenizer).train)

    def run(seed: int) -> dict[str, Any]:
        config = setting.config(f"adapters.seed={seed}")
        return one_seed(config, model, tokenizer, lambda pack: held_out(pack, others))

    run_seeds(a, results, run)
    return results.found


def main() -> None:
    parser = parser_of(__doc__, seeds=(0, 3), packs=False, limit=False)
    parser.add_argument("--model", type=Path, help="another base than the demo's")
    parser.add_argument("--rows", type=Path, help="with --model: a folder with train.json and heldout.json")
    a = parser.parse_args()
    if a.summary:
        print(summary(json.loads(a.summary.read_text())))
        return
    with tempfile.TemporaryDirectory() as folder:
        print(summary((real if a.model else demo)(a, Path(folder))))


if __name__ == "__main__":
    main()
