"""Does it pay to choose a merge's weights, or its scale, on rows that were held out?

    python scripts/benchmarks/tune.py --seeds 100 105 --out scripts/benchmarks/results/tune.json
    python scripts/benchmarks/tune.py --model SMOLLM2 --rows rows/docstrings --seeds 100 105 --out FILE
    python scripts/benchmarks/tune.py --summary scripts/benchmarks/results/tune.json

For every seed it trains the adapters of configs/demo.yaml and measures the loss per token of answers on tuning rows,
here half of the validation questions. Starting from the plain mean, it then chooses by that loss:

- `soup`: the adapters to average; each, from the best to the worst, is added if that lowers the loss (Wortsman et al.,
  2022).
- `weights`: one weight for each adapter, not negative and of sum 1; two steps of exponentiated gradient descent.
- `scale`: one factor γ of the whole update; steps of a quarter up or down, then the vertex of a parabola in log γ.
- `scales`: a factor for each kind of module (q_proj, ...), from γ on, each by steps of a quarter down its gradient.

Each is reported on other rows, all test questions: as it was chosen, and where the plain mean is kept unless the gain
on the tuning rows is above one or two of its standard errors, paired over rows. With --model another base is trained on
the `docstrings` of real_model.py; even rows held out tune and odd ones report. With --halves the first half of the rows
tunes and the second reports: of other modules there. The last form prints a finished file as Markdown. A seed that is
in the file already is not run again.
"""

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from demo_runs import Results, Scorer, Setting, parser_of, run_seeds, train_pack
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from poc_lora.data.batches import micro_batches, supervised_tokens
from poc_lora.data.prompts import Example, encode_rows
from poc_lora.data.rows import read_sources
from poc_lora.devices import by_device
from poc_lora.evaluation.intervals import mean_interval
from poc_lora.lora.bank import AdapterBank
from poc_lora.microworld import DATA_DIR
from poc_lora.models.forward import has_plain_head
from poc_lora.training.data import TrainingData, prepare_data
from poc_lora.training.loss import packed_loss
from poc_lora.training.memory import FAST_TOKENS
from poc_lora.training.step import Pack

STEP, STEPS = 1.25, 6  # of a scale: the factor of each, and the most of them, about fourfold
LOG_STEPS = (0.5, 1.0, 2.0)  # the largest change of a weight's logarithm in a step
# Of the setting with --model; the demo's configuration has all else.
REAL = "model.dtype=bfloat16 optim.lr=1e-3 optim.temperature=1e-5 train.max_steps=100".split()


class Mixture:
    """A merge of M trained adapters, Σ_j c_kj B_j A_j / M in modules of kind k, whose factors c [K, M] can change.

    All factors are 1 for the plain mean. The merge is one adapter of rank M·r in a bank of its own.
    """

    def __init__(self, model: PreTrainedModel, pack: Pack, rows: list[Example]):
        self.model, self.rows, self.M, self.passes = model, rows, pack.bank.size, 0.0
        self.tokens = torch.tensor([supervised_tokens(row) for row in rows], dtype=torch.float64)
        factors = {path: (m.factors.A.detach(), m.factors.B.detach()) for path, m in pack.bank.modules.items()}
        scale = pack.bank.scales.values[0] / self.M
        pack.close()
        rank = self.M * pack.bank.rank
        self.bank = AdapterBank.blank(model, targets=pack.config.lora.targets, rank=rank, adapters=[0])
        kinds = [path.rpartition(".")[2] for path in self.bank.modules]
        self.kinds = list(dict.fromkeys(kinds))
        self.kind = dict(zip(self.bank.modules, map(self.kinds.index, kinds), strict=True))
        self.B = {path: B * scale for path, (_, B) in factors.items()}  # [M, r, d_out]
        with torch.no_grad():
            for path, module in self.bank.modules.items():
                module.factors.A[0].copy_(factors[path][0].flatten(0, 1))
        self.mean = torch.ones(len(self.kinds), self.M, dtype=torch.float64)

    @torch.no_grad()
    def use(self, c: Tensor) -> None:
        """Compute the merge with the factors c from now on."""
        for path, module in self.bank.modules.items():
            module.factors.B[0].copy_((self.B[path] * c[self.kind[path]].float()[:, None, None]).flatten(0, 1))

    def losses(self, c: Tensor, rows: list[Example] | None = None) -> Tensor:
        """The loss of each row's answer, summed over its tokens; of the tuning rows by default."""
        self.use(c)
        self.passes += rows is None
        with torch.no_grad():
            return self._run(self.rows if rows is None else rows)

    def loss(self, c: Tensor) -> float:
        """The loss per token on the tuning rows."""
        return float(self.losses(c).sum() / self.tokens.sum())

    def gradient(self, c: Tensor) -> Tensor:
        """The derivatives of `loss` by c, [K, M]."""
        self.use(c)
        self.passes += 3  # a backward pass takes about twice as long
        self.bank.zero_grad()
        self._run(self.rows)
        found = torch.zeros_like(c)
        for path, module in self.bank.modules.items():
            found[self.kind[path]] += (module.factors.grad_B[0].view_as(self.B[path]) * self.B[path]).sum((1, 2))
        return found / self.tokens.sum()

    def _run(self, rows: list[Example]) -> Tensor:
        losses = torch.zeros(len(rows), dtype=torch.float64)
        self.model.eval()
        size, plain = by_device(FAST_TOKENS, self.model.device.type), has_plain_head(self.model)
        for batch in micro_batches(rows, [range(len(rows))], tokens=size, device=self.model.device):
            ones = torch.ones(len(batch.examples), device=self.model.device)
            total, found = packed_loss(self.model, replace(batch, slot=batch.row), ones, plain_head=plain)
            losses[batch.examples] = found.double().cpu()
            if torch.is_grad_enabled():
                total.backward()
        return losses


def soup(mixture: Mixture, adapters: list[float], mean: float) -> Tensor:
    """The factors of a greedy soup, from the loss of each adapter alone; the mean's own loss is known."""
    order = sorted(range(mixture.M), key=adapters.__getitem__)
    chosen, best = order[:1], adapters[order[0]]
    for adapter in order[1:]:
        members = [*chosen, adapter]
        loss = mean if len(members) == mixture.M else mixture.loss(of_members(mixture, members))
        if loss < best:
            chosen, best = members, loss
    return of_members(mixture, chosen)


def of_members(mixture: Mixture, members: list[int]) -> Tensor:
    """The factors of the plain mean of some of the adapters."""
    c = torch.zeros_like(mixture.mean)
    c[:, members] = mixture.M / len(members)
    return c


def tuned_weights(mixture: Mixture, mean: float) -> Tensor:
    """Weights by exponentiated gradient descent; each step's length is the best of three."""
    weights, best = mixture.mean.clone(), mean
    for _ in range(2):
        gradient = mixture.gradient(weights).sum(0)
        gradient -= (gradient * weights[0]).mean()
        tried = {}
        for length in LOG_STEPS:
            log = weights[0].log() - length * gradient / gradient.abs().max()
            c = (mixture.M * log.softmax(0)).expand_as(weights)
            tried[mixture.loss(c)] = c
        if min(tried) >= best:
            break
        best = min(tried)
        weights = tried[best]
    return weights


def walk(loss: Callable[[float], float], found: dict[float, float], step: float) -> float:
    """The best log of a scale; from the best one in `found` on as long as `step` lowers the loss, which it adds."""
    best = min(found, key=found.__getitem__)
    for _ in range(STEPS):
        found[best + step] = loss(best + step)
        if found[best + step] >= found[best]:
            break
        best += step
    return best


def tuned_scale(mixture: Mixture, mean: float) -> float:
    """log γ: the vertex of the parabola through the three best places of a walk, if it is better than they are."""
    found, step = {0.0: mean}, math.log(STEP)

    def loss(log: float) -> float:
        return mixture.loss(mixture.mean * math.exp(log))

    best = walk(loss, found, step)
    if best == 0:
        best = walk(loss, found, -step)
    if {best - step, best + step} <= found.keys():  # else the walk has gone as far as it may
        below, above = found[best - step], found[best + step]
        vertex = best + step * (below - above) / (2 * (below + above - 2 * found[best]))
        found[vertex] = loss(vertex)
    return min(found, key=found.__getitem__)


def tuned_scales(mixture: Mixture, start: Tensor, known: float) -> Tensor:
    """A scale for each kind of module, one after another, from the same scale for all."""
    c, best = start.clone(), known
    downhill = -(mixture.gradient(c) * c).sum(1).sign()
    for kind in torch.eye(len(c), dtype=c.dtype)[:, :, None]:

        def loss(log: float, start: Tensor = c, kind: Tensor = kind) -> float:
            return mixture.loss(start * (log * kind).exp())

        found = {0.0: best}
        log = walk(loss, found, float((downhill * kind[:, 0]).sum()) * math.log(STEP))
        c, best = c * (log * kind).exp(), found[log]
    return c


def gain(mean: Tensor, tuned: Tensor, tokens: Tensor) -> tuple[float, float]:
    """By how much the loss per token is lower than the mean's, and the standard error of that ratio over rows."""
    found = (mean - tuned).sum() / tokens.sum()
    rest = mean - tuned - found * tokens
    return float(found), float(rest.std() * len(rest) ** 0.5 / tokens.sum())


def tuned(mixture: Mixture, report: Callable[[Tensor], dict[str, float]]) -> dict[str, Any]:
    """Tune the merge in each way, and report every result."""
    M, plain = mixture.M, mixture.losses(mixture.mean)
    mean = float(plain.sum() / mixture.tokens.sum())
    adapters = [mixture.loss(of_members(mixture, [j])) for j in range(M)]
    found: dict[str, Any] = {
        "adapters": adapters,
        "mean": {"tuning_loss": mean, **report(mixture.mean)},
    }
    log = 0.0

    def scale() -> Tensor:
        nonlocal log
        log = tuned_scale(mixture, mean)
        return mixture.mean * math.exp(log)

    def scales() -> Tensor:
        start = mixture.mean * math.exp(log)
        return tuned_scales(mixture, start, mixture.loss(start))

    ways: dict[str, tuple[float, Callable[[], Tensor]]] = {
        "soup": (M, lambda: soup(mixture, adapters, mean)),
        "weights": (0, lambda: tuned_weights(mixture, mean)),
        "scale": (0, scale),
        "scales": (0, scales),
    }
    for name, (spent, tune) in ways.items():
        before = mixture.passes
        c = tune()
        passes = mixture.passes - before + spent
        gained, error = gain(plain, mixture.losses(c), mixture.tokens)
        found[name] = {
            "factors": [round(x, 4) for x in (c[:, 0] if name.startswith("scale") else c[0]).tolist()],  # [K] or [M]
            "passes": passes,
            "tuning_gain": gained,
            "tuning_error": error,
            **report(c),
        }
    found["scales"]["passes"] += found["scale"]["passes"]
    mixture.bank.remove()
    return found


def summary(found: dict[str, Any]) -> str:
    """The file as a Markdown table: means over seeds, and differences to the plain mean with 95 % intervals."""
    seeds = list(found["seeds"].values())
    measures = [x for x in ("accuracy", "nll", "loss") if x in seeds[0]["mean"]]
    lines = [
        f"| {len(seeds)} seeds | passes | in use | gain on the tuning rows | "
        + " | ".join(f"{x}: minus the mean's" for x in measures)
        + " |",
        "|---|---:|---:|---:|" + "---:|" * len(measures),
    ]
    for way in ("soup", "weights", "scale", "scales"):
        runs = [seed[way] for seed in seeds]
        for errors, rule in enumerate(("", " if the gain is > 1 error", " > 2 errors")):
            used = [not errors or run["tuning_gain"] > errors * run["tuning_error"] for run in runs]
            gains = [run["tuning_gain"] * use for run, use in zip(runs, used, strict=True)]
            cells = [
                f"{statistics.mean(run['passes'] for run in runs):.0f}",
                f"{sum(used)} of {len(used)}",
                f"{statistics.mean(gains):+.4f}",
            ]
            for x in measures:
                rows = zip(runs, seeds, used, strict=True)
                interval = mean_interval([(run[x] - seed["mean"][x]) * use for run, seed, use in rows])
                digits = 2 if x == "accuracy" else 4
                cells.append(f"{interval.mean:+.{digits}f} ± {interval.half_width:.{digits}f}")
            lines.append(f"| {way}{rule} | " + " | ".join(cells) + " |")
    means = ", ".join(f"{x} {statistics.mean(seed['mean'][x] for seed in seeds):.4f}" for x in measures)
    scale = statistics.mean(seed["scale"]["factors"][0] for seed in seeds)
    kinds = zip(found["kinds"], zip(*(seed["scales"]["factors"] for seed in seeds), strict=True), strict=True)
    by_kind = ", ".join(f"{kind} {statistics.mean(runs):.2f}" for kind, runs in kinds)
    return "\n".join([*lines, "", f"the plain mean: {means}; γ {scale:.2f}; by kind {by_kind}"])


def answers(sources: list[str], tokenizer: PreTrainedTokenizerBase, data: TrainingData) -> list[Example]:
    """The rows of files, as those of the run."""
    encoded = encode_rows(read_sources(sources), tokenizer, template="bare", max_length=data.max_length, learn="last")
    return encoded.answers


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--every", type=int, default=1, help="use one in so many of the rows of each half")
    parser.add_argument("--halves", action="store_true", help="tune on the first half of the rows, not on even ones")
    parser.add_argument("--model", type=Path, help="another base than the demo's")
    parser.add_argument("--rows", type=Path, help="with --model: a folder with train.json and heldout.json")
    a = parser.parse_args()
    if a.summary:
        print(summary(json.loads(a.summary.read_text())))
        return
    if a.model:
        setting = Setting([*REAL, *a.overrides], a.model, a.rows / "train.json")
        sources = [str(a.rows / "heldout.json")]
    else:
        setting = Setting(a.overrides)
        sources = sorted(str(path) for path in DATA_DIR.glob("*/validation.json"))
    fixed: dict[str, Any] = {name: getattr(a, name) for name in ("every", "halves", "limit")}
    fixed |= {"model": setting.model.name, "settings": setting.described()}
    results = Results(a.out, fixed, {"kinds": [], "seeds": {}})
    model, tokenizer = setting.load()
    scorer = None if a.model else Scorer(model, tokenizer, a.limit)

    def one_seed(seed: int) -> dict[str, Any]:
        config = setting.config(f"adapters.seed={seed}")
        data = prepare_data(config, tokenizer)
        rows = answers(sources, tokenizer, data)
        parts = (rows[: len(rows) // 2], rows[len(rows) // 2 :]) if a.halves else (rows[::2], rows[1::2])
        tuning, others = (part[:: a.every] for part in parts)
        mixture = Mixture(model, train_pack(config, model, data, a.packs), tuning)
        results.found["kinds"] = mixture.kinds

        def report(c: Tensor) -> dict[str, float]:
            if scorer is None:
                return {"loss": float(mixture.losses(c, others).sum()) / sum(map(supervised_tokens, others))}
            mixture.use(c)
            with torch.no_grad():
                return scorer.measures({b: x[0] for b, x in scorer.answers(1).items()})

        return tuned(mixture, report)

    run_seeds(a, results, one_seed)
    print(summary(results.as_read()))


if __name__ == "__main__":
    main()
