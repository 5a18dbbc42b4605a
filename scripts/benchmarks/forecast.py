"""Can a validation tell what one more adapter would bring, or that the learning rate is wrong for averaging?

    python scripts/benchmarks/forecast.py --seeds 100 105 --out scripts/benchmarks/results/forecast.json
    python scripts/benchmarks/forecast.py --summary scripts/benchmarks/results/forecast.json

For every seed and learning rate it trains the adapters of configs/demo.yaml. At every quarter of the steps (--quarters)
it measures losses per token of answers, on half of the validation questions: of single adapters, of merges of 2, 4 and
8, and how similar the adapters are; at the end on the other half too, with merges of one half of the adapters and one
more. From each half of the adapters it then forecasts what one more, and all of the other half, bring to the merge. The
second form prints a finished file as Markdown, with the same forecasts for packs of real_model.py (--studies). A
training that is in the file already is not run again.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean as mean
from statistics import variance
from typing import Any

import torch
from demo_runs import Results, Setting, new_pack, parser_of, prepare_with_questions
from transformers import PreTrainedModel

from poc_lora.adapters.factors import Factors
from poc_lora.config import RunConfig
from poc_lora.data.batches import supervised_tokens
from poc_lora.evaluation.intervals import Interval, mean_interval, student_quantile
from poc_lora.merging.gram import gram
from poc_lora.merging.gram import summary as similarity
from poc_lora.merging.stacked import exact_device, stack
from poc_lora.training.data import TrainingData
from poc_lora.training.step import Pack

RATES = ("8e-3", "1e-3", "2e-2", "3e-3")
QUARTERS = 4
Subset = tuple[int, ...]


def blocks(count: int, size: int) -> list[Subset]:
    """Disjoint subsets of consecutive adapters."""
    return [tuple(range(first, first + size)) for first in range(0, count, size)]


def subsets(M: int) -> Iterator[Subset]:
    """The adapters of each merge to measure, by size."""
    size = 1
    while size <= M:
        yield from blocks(M, size)
        size *= 2


def one_more(M: int) -> Iterator[tuple[Subset, Subset]]:
    """Each half of M adapters, and it with each adapter of the other half."""
    halves = blocks(M, M // 2)
    for half, others in zip(halves, reversed(halves), strict=True):
        yield from ((half, (*half, j)) for j in others)


def name(subset: Subset) -> str:
    return ",".join(map(str, subset))


def losses_of(pack: Pack, chosen: Iterable[Subset], parts: Sequence[slice]) -> dict[str, list[float]]:
    """The loss per token of the merge of each subset on each part of the validation rows."""
    rows = [row for part in parts for row in pack.data.validation[part]]
    counts = [len(pack.data.validation[part]) for part in parts]
    found = {}
    for subset in chosen:
        with pack.bank.merged(subset):
            each = iter(zip(pack.row_losses(rows) or [], map(supervised_tokens, rows), strict=True))
        sums = [[sum(values) for values in zip(*(next(each) for _ in range(count)), strict=True)] for count in counts]
        found[name(subset)] = [round(loss / tokens, 5) for loss, tokens in sums]
    return found


@torch.no_grad()
def similarities(pack: Pack) -> dict[str, float | None]:
    """`merging.gram.summary` of the adapters."""
    M = pack.bank.size
    inner = torch.zeros(M, M, dtype=torch.float64, device=exact_device(pack.device))
    for module in pack.bank.modules.values():
        A, B, scales = module.factors.A, module.factors.B, pack.bank.scales.values
        inner += gram(stack([Factors(A[slot], B[slot].T, scales[slot]) for slot in range(M)]))
    return dict(similarity(inner))


def one_training(
    config: RunConfig, model: PreTrainedModel, data: TrainingData, quarters: Sequence[int], folder: Path | None
) -> dict[str, dict[str, Any]]:
    """Train a pack, and measure it at quarters of the steps; what `folder` has of an earlier call is not trained."""
    M, steps = config.adapters.count, data.total_steps
    pack = new_pack(config, model, data)
    known, fresh = slice(0, None, 2), slice(1, None, 2)
    kept = {quarter: folder / f"{quarter}.pt" for quarter in quarters} if folder else {}
    trained = bool(kept) and all(file.exists() for file in kept.values())
    found, step = {}, 0
    for quarter in quarters:
        while step < steps * quarter // QUARTERS and not trained:
            pack.step(step)
            step += 1
        if trained:
            with torch.no_grad():
                pack.bank.weights.copy_(torch.load(kept[quarter]))
        elif kept:
            kept[quarter].parent.mkdir(parents=True, exist_ok=True)
            torch.save(pack.bank.weights.clone(), kept[quarter])
        final = quarter == QUARTERS
        merges = [*subsets(M), *((after for _, after in one_more(M)) if final else ())]
        losses = losses_of(pack, merges, [known, fresh] if final else [known])
        found[f"{quarter}/{QUARTERS}"] = {"losses": losses, "similarity": similarities(pack)}
    pack.close()
    return found


def more_adapters(losses: Sequence[float], merge: float, more: int) -> Interval:
    """How much `more` adapters would lower the loss of the merge of M, by the losses on the same rows.

    By propagation of chaos the expected loss of a merge of m is L + c/m. The adapters, at m = 1, and the merge, at
    m = M, give c = (mean − merge) M/(M − 1), and with k more the loss falls by (mean − merge) k / ((M − 1)(M + k)).
    Which adapters come is chance: the merge moves by k/(M + k) times the difference of two means, of k and of M
    adapters. The variance S² of the adapters' losses, M − 1 degrees of freedom, makes that S² k / (M (M + k)).

    Args:
        losses: Of each adapter [M], two or more.
        merge: The loss of their merge.
        more: k, the number of adapters to add.

    Returns:
        The expected gain, and the half-width of the 95 % interval of what may come.
    """
    M = len(losses)
    share = more / (M + more)
    chance = student_quantile(M - 1) * math.sqrt(variance(losses) * share / M)
    return Interval((mean(losses) - merge) / (M - 1) * share, chance)


@dataclass(frozen=True)
class Forecast:
    """What more adapters were expected to bring, and brought: on the rows that forecast, and on fresh ones."""

    expected: Interval
    came: float
    fresh: float | None = None

    def within(self, gain: float) -> bool:
        """Whether a gain is in the 95 % interval of the forecast."""
        return abs(gain - self.expected.mean) <= self.expected.half_width


def of_training(run: dict[str, Any], M: int) -> dict[str, list[Forecast]]:
    """Forecasts at the end of a training, by the numbers of adapters before and after."""
    losses = run[f"{QUARTERS}/{QUARTERS}"]["losses"]
    found: dict[str, list[Forecast]] = {}

    def add(before: Subset, after: Subset) -> None:
        gains = [a - b for a, b in zip(losses[name(before)], losses[name(after)], strict=True)]
        singles = [losses[str(j)][0] for j in before]
        expected = more_adapters(singles, losses[name(before)][0], len(after) - len(before))
        found.setdefault(f"{len(before)} → {len(after)}", []).append(Forecast(expected, *gains))

    everyone = tuple(range(M))
    for half in blocks(M, M // 2):
        add(half, everyone)
    for half, after in one_more(M):
        add(half, after)
    return found


def of_study(path: Path) -> Iterator[dict[str, list[Forecast]]]:
    """Forecasts for each pack of a result of real_model.py; none if they have one adapter each."""
    study = json.loads(path.read_text())
    losses, M = study["heldout"], study["job"]["members"]
    for first in range(0, study["job"]["packs"] * M, M) if M > 2 else ():
        forecasts = []
        for half in range(first, first + M, M // 2):
            singles, before = [losses[f"adapter_{half + i}"] for i in range(M // 2)], losses[f"merge_{M // 2}_{half}"]
            gain = before - losses[f"merge_{M}_{first}"]
            forecasts.append(Forecast(more_adapters(singles, before, M // 2), gain))
        yield {f"{M // 2} → {M}": forecasts}


def forecasts_table(packs: dict[str, list[dict[str, list[Forecast]]]]) -> list[str]:
    """Forecasts at the end of training and what came: means over packs, by the packs' name."""
    lines = [
        "| packs | adapters | expected gain | came | on fresh rows | came − expected (95 % over packs) | error |"
        " of expecting none | within 95 % | on fresh rows |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for title, by_pack in packs.items():
        for sizes in by_pack[0]:
            each = [f for found in by_pack for f in found[sizes]]
            fresh = [f.fresh for f in each if f.fresh is not None]
            gap = mean_interval([mean(f.came - f.expected.mean for f in found[sizes]) for found in by_pack])
            cells = [
                f"{mean(f.expected.mean for f in each):.4f}",
                f"{mean(f.came for f in each):.4f}",
                f"{mean(fresh):.4f}" if fresh else "",
                f"{gap.mean:+.4f} ± {gap.half_width:.4f}" if len(by_pack) > 1 else f"{gap.mean:+.4f}",
                f"{rms([f.came - f.expected.mean for f in each]):.4f}",
                f"{rms([f.came for f in each]):.4f}",
                f"{sum(f.within(f.came) for f in each)} of {len(each)}",
                f"{sum(f.within(f.fresh) for f in each if f.fresh is not None)} of {len(fresh)}" if fresh else "",
            ]
            lines.append(f"| {title} ({len(by_pack)}) | {sizes} | " + " | ".join(cells) + " |")
    return lines


def rates_table(rates: dict[str, list[dict[str, Any]]], M: int) -> list[str]:
    """What half of the steps and all of them showed, by learning rate: means over packs."""
    titles = [f"{quarter}/{QUARTERS}" for quarter in (QUARTERS // 2, QUARTERS)]
    lines = [
        "| lr (packs) | mean cosine: at half of the steps, at the end | adapters − merge | merges of two −"
        " adapters | loss of the merge | at the end on fresh rows |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for rate, trained in rates.items():
        runs = [run for run in trained if run.keys() >= set(titles)]
        if not runs:
            continue
        columns: dict[str, list[float]] = {}
        for title in titles:
            losses = [run[title]["losses"] for run in runs]
            of = {size: mean(x[name(s)][0] for x in losses for s in blocks(M, size)) for size in (1, 2, M)}
            values = {
                "cosine": mean(run[title]["similarity"]["mean_cosine"] for run in runs),
                "gain": of[1] - of[M],
                "barrier": of[2] - of[1],
                "merge": of[M],
            }
            for key, value in values.items():
                columns.setdefault(key, []).append(value)
        fresh = mean(run[titles[-1]]["losses"][name(tuple(range(M)))][1] for run in runs)
        cells = [", ".join(f"{x:.3f}" for x in column) for column in columns.values()]
        lines.append(f"| {rate} ({len(runs)}) | " + " | ".join(cells) + f" | {fresh:.3f} |")
    return lines


def summary(found: dict[str, Any], studies: Sequence[Path]) -> str:
    """Both tables, in Markdown."""
    M: int = found["adapters"]
    rates = {rate: list(runs.values()) for rate, runs in sorted(found["rates"].items(), key=lambda x: float(x[0]))}
    packs = {f"demo, lr {rate}": [of_training(run, M) for run in runs] for rate, runs in rates.items()}
    packs |= {path.stem: forecasts for path in studies if (forecasts := list(of_study(path)))}
    return "\n".join([*forecasts_table(packs), "", *rates_table(rates, M)])


def rms(values: Sequence[float]) -> float:
    """The root of the mean square."""
    return math.sqrt(mean(value**2 for value in values))


def main() -> None:
    parser = parser_of(__doc__, limit=False)
    parser.add_argument("--rates", nargs="+", default=RATES, help="peak learning rates")
    parser.add_argument("--quarters", type=int, nargs="+", default=range(1, QUARTERS + 1), help="when to measure")
    parser.add_argument("--studies", type=Path, nargs="*", default=[], help="with --summary: JSON of real_model.py")
    a = parser.parse_args()
    if a.summary:
        print(summary(json.loads(a.summary.read_text()), a.studies))
        return
    demo = Setting(a.overrides)
    fixed = {"settings": demo.described(), "adapters": demo.config().adapters.count}
    results = Results(a.out, fixed, {"rates": {}})
    model, tokenizer = demo.load()
    for seed in range(*a.seeds):
        for rate in a.rates:
            done = results.found["rates"].setdefault(rate, {})
            if str(seed) not in done:
                config = demo.config(f"adapters.seed={seed}", f"optim.lr={rate}")
                data = prepare_with_questions(config, tokenizer)
                saved = a.packs and a.packs / f"lr{rate}_seed{seed}"  # a file for every quarter
                done[str(seed)] = one_training(config, model, data, a.quarters, saved)
                results.save()
    print(summary(results.found, a.studies))


if __name__ == "__main__":
    main()
