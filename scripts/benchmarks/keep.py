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
from pathlib import Path
from typing import Any

import torch
from demo_seeds import CONFIG, accuracy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from poc_lora.config import RunConfig, load_config
from poc_lora.data.batches import supervised_tokens
from poc_lora.data.commonsense import BENCHMARKS
from poc_lora.data.prompts import Example
from poc_lora.data.questions import read_questions
from poc_lora.devices import by_device
from poc_lora.environment import environment
from poc_lora.evaluation.protocols.label import PreparedQuestions, prepare, score_labels
from poc_lora.files import write_json
from poc_lora.microworld import DATA_DIR, MODEL_DIR
from poc_lora.models.load import load_base
from poc_lora.training.data import prepare_data
from poc_lora.training.memory import FAST_TOKENS, Sizes
from poc_lora.training.step import Pack
from poc_lora.training.validation import validate

FEW_ROWS = 30  # of each benchmark
QUESTIONS = 200  # of each benchmark's 400
SETTINGS = {
    "demo": ["train.validate_every=10"],
    "few rows": ["train.validate_every=20", "train.max_steps=300"],
}
Questions = dict[str, PreparedQuestions]
# Of the setting with --model; the demo's configuration has all else.
REAL = """
    model.dtype=bfloat16 lora.rank=32 lora.alpha=64 data.validation=60 optim.lr=1e-3 optim.temperature=1e-5
    optim.warmup_steps=12 train.batch_size=4 train.max_steps=120 train.validate_every=20
""".split()
REAL_ROWS, REAL_HELD_OUT = 150 + 60, 100
STRIDE = {"train": 20, "heldout": 2}  # rows of one module stand together


def log_loss(log_probs: dict[str, torch.Tensor], prepared: Questions) -> float:
    """The mean over benchmarks of −log p(right label), among the question's labels."""
    losses = []
    for benchmark, questions in prepared.items():
        right = log_probs[benchmark].log_softmax(-1).gather(-1, questions.answers[:, None]).squeeze(-1)
        losses.append(-right[~questions.too_long].double().mean())
    return float(torch.stack(losses).mean())


@torch.no_grad()
def score(pack: Pack, prepared: Questions) -> dict[str, list[float]]:
    """Validation loss, accuracy and log loss of the average adapter and of the merge."""
    measures = validate(pack) or {}
    pack.model.eval()
    M = pack.bank.size
    packed = {b: score_labels(pack.model, q, copies=M) for b, q in prepared.items()}
    with pack.bank.merged():
        merge = {b: score_labels(pack.model, q)[0] for b, q in prepared.items()}
    singles = [{b: x[slot] for b, x in packed.items()} for slot in range(M)]
    return {
        "adapter": [
            statistics.mean(measures[adapter]["validation_loss"] for adapter in pack.bank.adapters),
            statistics.mean(accuracy(one, prepared) for one in singles),
            statistics.mean(log_loss(one, prepared) for one in singles),
        ],
        "merge": [measures["merge"]["validation_loss"], accuracy(merge, prepared), log_loss(merge, prepared)],
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
    sizes = Sizes(by_device(FAST_TOKENS, model.device.type), M, gradient_checkpointing=False)
    pack = Pack(config, model, data, range(M), sizes=sizes)
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


def few_rows(folder: Path) -> str:
    """The first rows of each benchmark's train.json, and 120 more to validate on, as one file."""
    rows = []
    for path in sorted(DATA_DIR.glob("*/train.json")):
        rows += json.loads(path.read_text())[: FEW_ROWS + 120 // len(BENCHMARKS)]
    file = folder / "few.json"
    file.write_text(json.dumps(rows))
    return str(file)


def real(folder: str, rows: Path, seeds: range, out: Path | None, overrides: list[str]) -> dict[str, Any]:
    """The setting with --model."""
    model, tokenizer = load_base(folder, dtype="bfloat16")
    found: dict[str, Any] = {"model": Path(folder).name, "seeds": {}, "overrides": overrides, **environment()}
    if out and out.exists():
        found = json.loads(out.read_text())
    with tempfile.TemporaryDirectory() as place:
        files = {}
        for name, count in (("train", REAL_ROWS), ("heldout", REAL_HELD_OUT)):
            files[name] = Path(place) / f"{name}.json"
            files[name].write_text(json.dumps(json.loads((rows / f"{name}.json").read_text())[:: STRIDE[name]][:count]))
        base = [f"model.name={json.dumps(folder)}", *REAL]

        def config(name: str, *own: str) -> RunConfig:
            return load_config(CONFIG, [*base, f"data.train={json.dumps([str(files[name])])}", *own, *overrides])

        others = list(prepare_data(config("heldout", "data.validation=0", "train.batch_size=1"), tokenizer).train)
        for seed in seeds:
            if str(seed) not in found["seeds"]:
                own = config("train", f"adapters.seed={seed}")
                found["seeds"][str(seed)] = one_seed(own, model, tokenizer, lambda pack: held_out(pack, others))
                if out:
                    write_json(out, found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs=2, metavar=("FIRST", "PAST_LAST"), default=(0, 3))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--summary", type=Path)
    parser.add_argument("--model", help="another base than the demo's")
    parser.add_argument("--rows", type=Path, help="with --model: a folder with train.json and heldout.json")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    a = parser.parse_args()
    if a.summary:
        print(summary(json.loads(a.summary.read_text())))
        return
    if a.model:
        print(summary(real(a.model, a.rows, range(*a.seeds), a.out, a.overrides)))
        return
    model, tokenizer = load_base(str(MODEL_DIR))
    prepared = {
        b.folder: prepare(read_questions(DATA_DIR, b)[:QUESTIONS], tokenizer, prompt="bare") for b in BENCHMARKS
    }
    found: dict[str, Any] = {"settings": {name: {} for name in SETTINGS}, "overrides": a.overrides, **environment()}
    if a.out and a.out.exists():
        found = json.loads(a.out.read_text())
    with tempfile.TemporaryDirectory() as folder:
        rows = {"demo": str(DATA_DIR), "few rows": few_rows(Path(folder))}
        for seed in range(*a.seeds):
            for name, changes in SETTINGS.items():
                if str(seed) in found["settings"][name]:
                    continue
                place = [f"model.name={json.dumps(str(MODEL_DIR))}", f"data.train={json.dumps([rows[name]])}"]
                own = [*place, "data.validation=120", *changes, f"adapters.seed={seed}", *a.overrides]
                found["settings"][name][str(seed)] = one_seed(
                    load_config(CONFIG, own), model, tokenizer, lambda pack: score(pack, prepared)
                )
                if a.out:
                    write_json(a.out, found)
    print(summary(found))


if __name__ == "__main__":
    main()
