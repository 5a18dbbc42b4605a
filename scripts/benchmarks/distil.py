"""Does it pay to distil the prediction ensemble of the demo's adapters into one adapter?

    python scripts/benchmarks/distil.py --seeds 100 105 --out scripts/benchmarks/results/distil.json
    python scripts/benchmarks/distil.py --summary scripts/benchmarks/results/distil.json

For every seed it trains the adapters of configs/demo.yaml. From the best approximations of their merge, of rank 16 and
32, students then learn the ensemble's predictions on the training rows: the loss is the divergence of the student's
predictions from the mean of the adapters' probabilities, at every token of the answers. One more student of rank 16
learns the answers themselves, in the same steps on the same rows. Everything is scored on all test questions. The
second form prints a finished file as Markdown. A seed that is in the file already is not run again.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from demo_runs import Results, Scorer, Setting, parser_of, run_seeds, train_pack
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from poc_lora.config import RunConfig
from poc_lora.data.batches import BatchOrder, micro_batches
from poc_lora.data.prompts import Example
from poc_lora.lora.bank import AdapterBank
from poc_lora.merging.decomposition import decompose
from poc_lora.models.forward import logits_at
from poc_lora.optim.schedules import learning_rate
from poc_lora.training.data import TrainingData, prepare_data

RANKS = (16, 32)
STUDENTS = ((16, "ensemble"), (32, "ensemble"), (16, "answers"))  # rank, what is learnt
ROWS_AT_ONCE = 16
EVERY_TOKEN = 10**9  # of a micro-batch


@torch.no_grad()
def ensemble_predictions(model: PreTrainedModel, examples: Sequence[Example], M: int) -> list[Tensor]:
    """The mean of M packed adapters' probabilities at the tokens of each row that have a loss, [tokens, V] each."""
    found: list[Tensor] = []
    for first in range(0, len(examples), ROWS_AT_ONCE):
        rows = range(first, min(len(examples), first + ROWS_AT_ONCE))
        (batch,) = micro_batches(examples, [rows] * M, tokens=EVERY_TOKEN, device=model.device)
        p = logits_at(model, batch.input_ids, batch.row, batch.column).softmax(-1)
        mean = p.view(M, len(p) // M, -1).mean(0)
        tokens = batch.row[: len(mean)].bincount(minlength=len(rows)).tolist()
        by_row = dict(zip(batch.examples, mean.split(tokens), strict=False))
        found += [by_row[row] for row in rows]
    return found


def divergences(logits: Tensor, p: Tensor) -> Tensor:
    """KL(p ‖ softmax(logits)) of K students, [K, n], from logits [K, n, V] and p [n, V]."""
    terms: Tensor = torch.special.xlogy(p, p) - p * logits.log_softmax(-1)
    return terms.sum(-1)


def train_students(
    model: PreTrainedModel,
    bank: AdapterBank,
    data: TrainingData,
    predictions: Sequence[Tensor],
    seed: int,
    a: argparse.Namespace,
) -> list[float]:
    """Train the students of a bank. Returns their mean losses over the last 20 steps."""
    K, steps, lr = bank.size, a.steps, a.lr
    optimizer = torch.optim.AdamW([{"params": [row]} for row in bank.rows], weight_decay=0.0)
    order = BatchOrder([len(example.ids) for example in data.train], a.batch, seed, group_by_length=True)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate("linear", step, peak=lr, warmup_steps="auto", total_steps=steps)
        bank.zero_grad()
        rows = order.rows(K, step)
        (packed,) = micro_batches(data.train, [rows] * K, tokens=EVERY_TOKEN, device=model.device)
        logits = logits_at(model, packed.input_ids, packed.row, packed.column)
        logits = logits.view(K, len(logits) // K, -1)
        soft = divergences(logits, torch.cat([predictions[i] for i in packed.examples[: len(rows)]])).mean(1)
        hard = functional.cross_entropy(logits.flatten(0, 1), packed.target, reduction="none").view(K, -1).mean(1)
        each = torch.stack([(soft if STUDENTS[k][1] == "ensemble" else hard)[k] for k in range(K)])
        each.sum().backward()
        bank.clip_grad_norm(1.0)
        optimizer.step()
        losses.append(each.detach())
    return [round(x, 4) for x in torch.stack(losses[-20:]).mean(0).tolist()]


def one_seed(config: RunConfig, scorer: Scorer, a: argparse.Namespace) -> dict[str, Any]:
    """Train the adapters and the students of one seed, and score them all."""
    data = prepare_data(config, scorer.tokenizer)
    model, M, seed = scorer.model, config.adapters.count, config.adapters.seed
    pack = train_pack(config, model, data, a.packs)
    packed = scorer.answers(M)
    with pack.bank.merged():
        merge = scorer.answers(1)
    found: dict[str, Any] = {
        "adapters": [scorer.measures({b: x[slot] for b, x in packed.items()}) for slot in range(M)],
        "merge": scorer.measures({b: x[0] for b, x in merge.items()}),
        # The mean of the members' probabilities, up to a factor.
        "ensemble": scorer.measures({b: x.log_softmax(-1).logsumexp(0) for b, x in packed.items()}),
    }
    predictions = ensemble_predictions(model, data.train, M)
    merged = {
        path: decompose(
            module.factors.A.detach().double().flatten(0, 1),
            module.factors.B.detach().double().flatten(0, 1).T * (pack.bank.scales.values[0] / M),
        )
        for path, module in pack.bank.modules.items()
    }
    pack.close()
    targets, largest = config.lora.targets, max(rank for rank, _ in STUDENTS)
    bank = AdapterBank.blank(model, targets=targets, rank=largest, adapters=range(len(STUDENTS)))
    with torch.no_grad():
        for path, module in bank.modules.items():
            for slot, (rank, _) in enumerate(STUDENTS):  # what is zero in A and B stays so: a smaller rank
                A, B = merged[path].truncated(rank)
                module.factors.A[slot, : len(A)].copy_(A)
                module.factors.B[slot, : len(A)].copy_(B.T)
    before = scorer.answers(bank.size)
    found["truncated"] = {
        str(STUDENTS[slot][0]): scorer.measures({b: x[slot] for b, x in before.items()}) for slot in range(len(RANKS))
    }
    losses = train_students(model, bank, data, predictions, seed, a)
    after = scorer.answers(bank.size)
    found["students"] = [
        {"rank": rank, "learns": learns, "last_loss": losses[slot]}
        | scorer.measures({b: x[slot] for b, x in after.items()})
        for slot, (rank, learns) in enumerate(STUDENTS)
    ]
    bank.remove()
    return found


def summary(found: dict[str, Any]) -> str:
    """The file as a Markdown table: means over seeds, and the share of the gap from merge to ensemble."""
    runs = list(found["seeds"].values())
    variants: dict[str, list[dict[str, float]]] = {
        "average adapter": [
            {x: statistics.mean(adapter[x] for adapter in run["adapters"]) for x in ("accuracy", "nll", "ece")}
            for run in runs
        ],
        "merge": [run["merge"] for run in runs],
    }
    for rank in RANKS:
        variants[f"merge, rank {rank}"] = [run["truncated"][str(rank)] for run in runs]
    variants["prediction ensemble"] = [run["ensemble"] for run in runs]
    for slot, (rank, learns) in enumerate(STUDENTS):
        name = f"rank {rank}, distilled" if learns == "ensemble" else f"rank {rank}, trained on the answers"
        variants[name] = [run["students"][slot] for run in runs]
    lines = [
        f"| {len(runs)} seeds | accuracy | minus the merge (range) | share of the gap | NLL | calibration error |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    gap = sum(run["ensemble"]["accuracy"] - run["merge"]["accuracy"] for run in runs)
    for name, measured in variants.items():
        ahead = [x["accuracy"] - run["merge"]["accuracy"] for x, run in zip(measured, runs, strict=True)]
        cells = [
            f"{statistics.mean(x['accuracy'] for x in measured):.2f}",
            f"{statistics.mean(ahead):+.2f} ({min(ahead):+.2f} to {max(ahead):+.2f})",
            f"{100 * sum(ahead) / gap:.0f} %" if gap else "",
            f"{statistics.mean(x['nll'] for x in measured):.3f}",
            f"{statistics.mean(x['ece'] for x in measured):.3f}",
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=300, help="the students' optimizer steps")
    parser.add_argument("--batch", type=int, default=16, help="rows of a step")
    parser.add_argument("--lr", type=float, default=1e-3, help="the students' peak learning rate")
    a = parser.parse_args()
    if a.summary:
        print(summary(json.loads(a.summary.read_text())))
        return
    demo = Setting(a.overrides)
    settings = demo.described() | {"students": {"steps": a.steps, "batch_size": a.batch, "lr": a.lr}}
    results = Results(a.out, {"settings": settings, "limit": a.limit}, {"seeds": {}})
    scorer = Scorer(*demo.load(), a.limit)
    run_seeds(a, results, lambda seed: one_seed(demo.config(f"adapters.seed={seed}"), scorer, a))
    print(summary(results.found))


if __name__ == "__main__":
    main()
