"""`train.keep`: the last step's weights, or those of the lowest validation loss? On the demo's model, several seeds.

    python scripts/benchmarks/keep.py --seeds 0 3 --out scripts/benchmarks/results/keep.json
    python scripts/benchmarks/keep.py --summary scripts/benchmarks/results/keep.json

Each setting trains the adapters of configs/demo.yaml once per seed, with 120 validation rows: `demo` as it is, `few
rows` on 240 rows for twice as long. Both ends of each training, of adapters and merge, are then scored: the loss on the
validation rows, which choose for `best` and so favour it, and accuracy (%) and log loss of the label on half the test
questions. The second form prints a finished file as Markdown. A seed that is in the file already is not run again.
"""

import argparse
import json
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from demo_seeds import CONFIG, accuracy
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


def one_seed(
    config: RunConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prepared: Questions
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
    found: dict[str, Any] = {"last": score(pack, prepared)}
    pack.bank.weights.copy_(best)
    found |= {"best": score(pack, prepared), "best_steps": best_step, "steps": data.total_steps}
    pack.close()
    return found


def summary(found: dict[str, Any]) -> str:
    """The file as a Markdown table: means over seeds, and best minus last with the range over seeds."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs=2, metavar=("FIRST", "PAST_LAST"), default=(0, 3))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--summary", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    a = parser.parse_args()
    if a.summary:
        print(summary(json.loads(a.summary.read_text())))
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
                found["settings"][name][str(seed)] = one_seed(load_config(CONFIG, own), model, tokenizer, prepared)
                if a.out:
                    write_json(a.out, found)
    print(summary(found))


if __name__ == "__main__":
    main()
