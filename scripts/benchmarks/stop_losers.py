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

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from demo_seeds import CONFIG
from distil import Scorer
from screening import with_validation_questions

from poc_lora.config import RunConfig, load_config
from poc_lora.data.batches import BatchOrder, supervised_tokens
from poc_lora.devices import by_device
from poc_lora.environment import environment
from poc_lora.files import write_json
from poc_lora.microworld import DATA_DIR, MODEL_DIR
from poc_lora.models.load import load_base
from poc_lora.training.data import TrainingData, prepare_data
from poc_lora.training.memory import FAST_TOKENS, Sizes
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
    sizes = Sizes(by_device(FAST_TOKENS, "cpu"), len(slots), gradient_checkpointing=False)
    smaller = Pack(config, pack.model, data, [pack.bank.adapters[slot] for slot in slots], sizes=sizes)
    with torch.no_grad():
        smaller.bank.weights.copy_(state["weights"][slots])
    for slot, row, group in zip(slots, smaller.bank.rows, smaller.optimizer.param_groups, strict=True):
        smaller.optimizer.state[row] = {name: x.clone() for name, x in state["moments"][slot].items()}
        group["noise_step"] = state["step"]
    return smaller


def one_seed(config: RunConfig, scorer: Scorer, data: TrainingData) -> dict[str, Any]:
    """Train the sweep, and go on with the better half."""
    total = data.total_steps
    third, half = total // 3, total // 2
    sizes = Sizes(by_device(FAST_TOKENS, "cpu"), M, gradient_checkpointing=False)
    pack = Pack(config, scorer.model, data, range(M), sizes=sizes)
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs=2, metavar=("FIRST", "PAST_LAST"), default=(100, 105))
    parser.add_argument("--limit", type=int, help="only the first test questions of each benchmark")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--summary", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the demo's configuration")
    a = parser.parse_args()
    if a.summary:
        print(summary(json.loads(a.summary.read_text())))
        return
    model_name, train = json.dumps(str(MODEL_DIR)), json.dumps([str(DATA_DIR)])
    sweep = f"adapters.vary.optim.lr={json.dumps(list(RATES))}"
    place = [f"model.name={model_name}", f"data.train={train}", sweep, *a.overrides]
    config = load_config(CONFIG, place)
    model, tokenizer = load_base(str(MODEL_DIR))
    settings = {name: config.model_dump(mode="json")[name] for name in ("lora", "adapters", "optim", "train")}
    found = {"seeds": {}, "settings": settings, **environment()}
    if a.out and a.out.exists():
        found = json.loads(a.out.read_text())
        if found["settings"] != settings:
            parser.error(f"{a.out} was made with other settings")
    scorer = Scorer(model, tokenizer, a.limit)
    for seed in range(*a.seeds):
        if str(seed) not in found["seeds"]:
            run = load_config(CONFIG, [*place, f"adapters.seed={seed}"])
            data = with_validation_questions(prepare_data(run, tokenizer), tokenizer)
            found["seeds"][str(seed)] = one_seed(run, scorer, data)
            if a.out:
                write_json(a.out, found)
    print(summary(json.loads(json.dumps(found))))


if __name__ == "__main__":
    main()
