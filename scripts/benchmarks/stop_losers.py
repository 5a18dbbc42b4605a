"""Does it pay to stop the losers of a sweep early, and is the eventual winner among them?

    python scripts/benchmarks/stop_losers.py --seeds 100 105 --out scripts/benchmarks/results/stop_losers.json
    python scripts/benchmarks/stop_losers.py --summary scripts/benchmarks/results/stop_losers.json

For every seed it trains the adapters of configs/demo.yaml with eight learning rates in one pack, and measures each on
half of the validation questions after a third, after half and after all of the steps. An adapter's bits do not depend
on the others, so this one training says who would have been stopped, and what that would have lost. The better half
after a third is also trained on from there with twice the rows per step, the place of those stopped. Scores are on all
test questions, which choose nothing; times are of the processor, per step. The second form prints a finished file as
Markdown. A seed that is in the file already is not run again.
"""

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from demo_runs import Results, Scorer, Setting, new_pack, parser_of, prepare_with_questions, run_seeds

from poc_lora.config import RunConfig
from poc_lora.data.batches import BatchOrder, supervised_tokens
from poc_lora.training.data import TrainingData
from poc_lora.training.step import Pack

RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 16e-3, 32e-3, 64e-3)  # optim.lr of the demo is 8e-3
M, KEPT = len(RATES), len(RATES) // 2
TIMED = 10  # steps of the smaller pack


def steps(pack: Pack, start: int, end: int) -> float:
    """Train, and return the processor's seconds per step."""
    began = time.process_time()
    for step in range(start, end):
        pack.step(step)
    return (time.process_time() - began) / (end - start)


def validation_losses(pack: Pack) -> list[float]:
    """Each adapter's loss per token of the validation questions' answers; infinity if it diverged."""
    tokens = sum(supervised_tokens(example) for example in pack.data.validation)
    losses = [float("inf")] * pack.bank.size
    for slot in pack.live:
        with pack.bank.only(slot):
            losses[slot] = sum(pack.row_losses(pack.data.validation) or []) / tokens
    return losses


def best(losses: Sequence[float], count: int) -> list[int]:
    """The slots of the lowest losses, in order of the slots."""
    return sorted(sorted(range(len(losses)), key=losses.__getitem__)[:count])


def scores(pack: Pack, scorer: Scorer, merges: dict[str, list[int]]) -> dict[str, Any]:
    """Test measures of every adapter, and of the merges of some."""
    packed = scorer.answers(pack.bank.size)
    found: dict[str, Any] = {
        "adapters": [
            scorer.measures({b: x[slot] for b, x in packed.items()}) if slot in pack.live else None
            for slot in range(pack.bank.size)
        ]
    }
    for name, slots in merges.items():
        with pack.bank.merged([slot for slot in slots if slot in pack.live]):
            found[name] = scorer.measures({b: x[0] for b, x in scorer.answers(1).items()})
    return found


def smaller_pack(pack: Pack, data: TrainingData, config: RunConfig, slots: list[int], state: dict[str, Any]) -> Pack:
    """A pack of some of the adapters, as they were in `state`."""
    smaller = new_pack(config, pack.model, data, [pack.bank.adapters[slot] for slot in slots])
    with torch.no_grad():
        smaller.bank.weights.copy_(state["weights"][slots])
    for slot, row, group in zip(slots, smaller.bank.rows, smaller.optimizer.param_groups, strict=True):
        smaller.optimizer.state[row] = {name: x.clone() for name, x in state["moments"][slot].items()}
        group["noise_step"] = state["step"]
    return smaller


def one_seed(config: RunConfig, scorer: Scorer) -> dict[str, Any]:
    """Train the sweep, and go on with the better half."""
    data = prepare_with_questions(config, scorer.tokenizer, every=2)
    total = data.total_steps
    third, half = total // 3, total // 2
    pack = new_pack(config, scorer.model, data)
    seconds = {"all": steps(pack, 0, third)}
    losses = {"third": validation_losses(pack)}
    rows = pack.bank.rows
    state = {
        "step": third,
        "weights": pack.bank.weights.clone(),
        "moments": [{name: x.clone() for name, x in pack.optimizer.state[row].items()} for row in rows],
    }
    steps(pack, third, half)
    losses["half"] = validation_losses(pack)
    steps(pack, half, total)
    losses["end"] = validation_losses(pack)
    merges = {"all": list(range(M))} | {f"best half, {when}": best(found, KEPT) for when, found in losses.items()}
    survivors = best(losses["third"], KEPT)
    found: dict[str, Any] = {"losses": losses, "test": scores(pack, scorer, merges), "survivors": survivors}
    pack.close()

    smaller = smaller_pack(pack, data, config, survivors, state)
    seconds["half of them"] = steps(smaller, third, third + TIMED)
    smaller.close()
    batch = 2 * config.train.batch_size
    lengths, section = [len(example.ids) for example in data.train], config.data
    order = BatchOrder(lengths, batch, config.adapters.seed, group_by_length=section.group_by_length)
    more = smaller_pack(pack, replace(data, order=order), config, survivors, state)
    seconds["half of them, twice the rows"] = steps(more, third, total)
    found["more_rows"] = {
        "losses": validation_losses(more),
        "test": scores(more, scorer, {"all": list(range(KEPT))}),
    }
    more.close()
    return found | {"seconds": seconds}


def summary(found: dict[str, Any]) -> str:
    """The file as Markdown: what stopping saves, whom it stops, and what merges of the rest are worth."""
    seeds = list(found["seeds"].values())
    cost = {name: statistics.median(seed["seconds"][name] for seed in seeds) for name in seeds[0]["seconds"]}
    lines = [
        f"Seconds of the processor per step: {', '.join(f'{name} {x:.2f}' for name, x in cost.items())}.",
        "",
        "| stopped after | kept | time saved | seeds in which the winner was kept | places of the winner then |"
        " test loss of the winner: kept − all (per seed) |",
        "|---|---:|---:|---:|---|---|",
    ]
    for when, share in (("third", 1 / 3), ("half", 1 / 2)):
        for kept in (KEPT, KEPT // 2):
            inside, places, regret = 0, [], []
            for seed in seeds:
                then, end = seed["losses"][when], seed["losses"]["end"]
                winner = best(end, 1)[0]
                places.append(1 + sorted(range(M), key=then.__getitem__).index(winner))
                inside += places[-1] <= kept
                chosen = min(best(then, kept), key=end.__getitem__)
                test = seed["test"]["adapters"]
                regret.append(test[chosen]["nll"] - test[winner]["nll"])
            each = (cost["all"] - cost["half of them"]) / (M - KEPT)  # what an adapter adds to a step
            saved = (1 - share) * (M - kept) * each / cost["all"]
            lines.append(
                f"| a {when} | {kept} of {M} | {saved:.0%} | {inside} of {len(seeds)} | {', '.join(map(str, places))}"
                f" | {', '.join(f'{x:+.3f}' for x in regret)} |"
            )
    lines += ["", "| merge of | accuracy | log loss |", "|---|---:|---:|"]
    kinds = {name: [seed["test"][name] for seed in seeds] for name in seeds[0]["test"] if name != "adapters"}
    kinds["best half, third, twice the rows from there"] = [seed["more_rows"]["test"]["all"] for seed in seeds]
    winners = [(seed, best(seed["losses"]["end"], 1)[0]) for seed in seeds]
    kinds["the winner alone"] = [seed["test"]["adapters"][winner] for seed, winner in winners]
    kinds["the winner alone, twice the rows"] = [
        seed["more_rows"]["test"]["adapters"][best(seed["more_rows"]["losses"], 1)[0]] for seed in seeds
    ]
    for name, runs in kinds.items():
        cells = [
            f"{statistics.mean(run[x] for run in runs):.{d}f} ({min(run[x] for run in runs):.{d}f} to"
            f" {max(run[x] for run in runs):.{d}f})"
            for x, d in (("accuracy", 2), ("nll", 3))
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    a = parser_of(__doc__, packs=False).parse_args()
    if a.summary:
        print(summary(json.loads(a.summary.read_text())))
        return
    sweep = Setting([f"adapters.vary.optim.lr={json.dumps(list(RATES))}", *a.overrides])
    settings = sweep.described("lora", "adapters", "optim", "train")
    results = Results(a.out, {"settings": settings, "limit": a.limit}, {"seeds": {}})
    scorer = Scorer(*sweep.load(), a.limit)
    run_seeds(a, results, lambda seed: one_seed(sweep.config(f"adapters.seed={seed}"), scorer))
    print(summary(results.as_read()))


if __name__ == "__main__":
    main()
