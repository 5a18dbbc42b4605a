"""Which merge method? The plain mean of B·A against the methods of the literature, on packs of several seeds.

    python scripts/benchmarks/merge_methods.py --seeds 100 105 --out scripts/benchmarks/results/merge_methods.json
    python scripts/benchmarks/merge_methods.py --model SMOLLM2 --rows rows/docstrings --seeds 100 105 --out FILE
    python scripts/benchmarks/merge_methods.py --summary FILE...

For every seed it trains the adapters of configs/demo.yaml, and makes one update of every module from theirs by each of
`METHODS`. All are scored on all test questions: accuracy (%), and the log loss of the right label among the labels.
What has to be chosen, the best adapter and the factors of `SCALES`, is chosen by the log loss of 192 validation
questions. Two more packs are trained per seed: one in which adapter 2k + 1 gets the negative of adapter 2k's noise, and
one with two adapters at each λ of `TEMPERATURES`.

With --model, another base is trained for 100 steps on a task that real_model.py has written, with the settings of
`REAL`. The score is the loss per token of the answers of every fourth row of heldout.json, from the second on; every
eighth row, from the first on, chooses.

The last form prints finished files side by side as Markdown: means over seeds, and the difference to the mean of B·A
with the half-width of its 95 % t-interval over seeds. What is in the file already is not run again.
"""

import contextlib
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from demo_runs import Results, Scorer, Setting, parser_of, train_pack
from merge_rivals import METHODS, Module, Update, mean
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from poc_lora import rng
from poc_lora.config import RunConfig
from poc_lora.data.batches import micro_batches
from poc_lora.data.commonsense import BENCHMARKS
from poc_lora.data.prompts import Example, encode_rows
from poc_lora.data.questions import read_questions
from poc_lora.data.rows import read_sources
from poc_lora.evaluation.intervals import mean_interval
from poc_lora.evaluation.protocols.label import prepare
from poc_lora.lora.bank import AdapterBank
from poc_lora.microworld import DATA_DIR
from poc_lora.models.forward import hidden_at, logits_at
from poc_lora.optim.noisy_adamw import NoisyAdamW
from poc_lora.training.data import prepare_data
from poc_lora.training.loss import chunked_cross_entropy
from poc_lora.training.step import Pack

TEMPERATURES = (0.0, 1e-5, 1e-4, 1e-3)
CALIBRATION_ROWS = 64
# Of the setting with --model; the demo's configuration has all else.
REAL = """
    model.dtype=bfloat16 optim.lr=1e-3 optim.temperature=1e-5 optim.warmup_steps=10 train.max_steps=100
""".split()
SPLITS = {"validation": slice(0, None, 8), "test": slice(1, None, 4)}  # of heldout.json
TOKENS = 2048  # of a micro-batch

Factors = dict[str, tuple[Tensor, Tensor]]  # every module's A [M, r, d_in] and B [M, d_out, r]


# Factors of which validation rows choose one: the mean shrinks what adapters do not share, TIES grows what it keeps.
SCALES = {
    "mean": (1.0, 1.25, 1.5, 2.0),
    "TIES, density 0.2": (0.25, 0.5, 0.75, 1.0),
    "KnOTS-TIES, density 0.2": (0.25, 0.5, 0.75, 1.0),
}


def times(update: Update, factor: float) -> Update:
    """The update, scaled."""
    A, B = update
    return Update(A * factor) if B is None else Update(A, B * factor)


@contextlib.contextmanager
def applied(model: PreTrainedModel, updates: Mapping[str, Update]) -> Iterator[None]:
    """Within the block, the modules of these paths compute W x + ΔW x, in the dtype of W."""

    def hook(update: Update) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            hidden = functional.linear(inputs[0], update.A)
            return output + (hidden if update.B is None else functional.linear(hidden, update.B))

        return add

    hooks = []
    for path, (A, B) in updates.items():
        linear = model.get_submodule(path)
        dtype = next(linear.parameters()).dtype
        update = Update(A.to(dtype), None if B is None else B.to(dtype))
        hooks.append(linear.register_forward_hook(hook(update)))
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


@torch.no_grad()
def second_moments(model: PreTrainedModel, paths: Sequence[str], rows: Sequence[Example]) -> dict[str, Tensor]:
    """E[x xᵀ] of the inputs of modules over all tokens of rows, float64 [d_in, d_in] each."""
    sums: dict[str, Tensor] = {}

    def hook(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2).float()
            sums[path] = sums.get(path, 0.0) + (x.T @ x).double()

        return add

    hooks = [model.get_submodule(path).register_forward_pre_hook(hook(path)) for path in paths]
    first = torch.zeros(1, dtype=torch.int64)
    for row in rows:  # one at a time: no padding
        logits_at(model, torch.tensor([row.ids]), first, first)
    for handle in hooks:
        handle.remove()
    tokens = sum(len(row.ids) for row in rows)
    return {path: total / tokens for path, total in sums.items()}


class Task(Protocol):
    """What a model is scored on; `answers` are of any kind that `measures` and `ensemble` know."""

    model: PreTrainedModel

    def answers(self, split: str) -> Any:
        """What the model computes on the rows of a split, `validation` or `test`."""

    def measures(self, answers: Any, split: str) -> dict[str, float]:
        """The log loss, `nll`, and maybe more."""

    def ensemble(self, answers: Sequence[Any]) -> Any:
        """The answers that the mean of several models' probabilities gives."""


class Questions:
    """The micro-world's questions."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, limit: int | None):
        self.model = model
        self.scorers = {split: Scorer(model, tokenizer, limit) for split in SPLITS}
        self.scorers["validation"].prepared = {
            b.folder: prepare(read_questions(DATA_DIR, b, split="validation")[::2][:limit], tokenizer, prompt="bare")
            for b in BENCHMARKS
        }

    def answers(self, split: str) -> dict[str, Tensor]:
        return {b: x[0] for b, x in self.scorers[split].answers(1).items()}

    def measures(self, answers: dict[str, Tensor], split: str) -> dict[str, float]:
        return self.scorers[split].measures(answers)

    def ensemble(self, answers: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        # Up to a factor.
        return {b: torch.stack([each[b].log_softmax(-1) for each in answers]).logsumexp(0) for b in answers[0]}


class Rows:
    """Rows held out; the answers are −log p of their tokens."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, file: Path, limit: int | None):
        self.model = model
        rows = encode_rows(read_sources([str(file)]), tokenizer, template="bare", max_length=TOKENS, learn="last")
        self.rows = {split: rows.answers[part][:limit] for split, part in SPLITS.items()}

    @torch.no_grad()
    def answers(self, split: str) -> Tensor:
        self.model.eval()
        head, rows = self.model.get_output_embeddings(), self.rows[split]  # type: ignore[no-untyped-call, unused-ignore]
        losses = []
        for batch in micro_batches(rows, [range(len(rows))], tokens=TOKENS, device=self.model.device):
            hidden = hidden_at(self.model, batch.input_ids, batch.row, batch.column)
            losses.append(chunked_cross_entropy(hidden, head.weight, None, batch.target))
        return torch.cat(losses)

    def measures(self, answers: Tensor, split: str) -> dict[str, float]:
        return {"nll": round(float(answers.double().mean()), 5)}

    def ensemble(self, answers: Sequence[Tensor]) -> Tensor:
        return math.log(len(answers)) - torch.stack([-each for each in answers]).logsumexp(0)


def factors(bank: AdapterBank) -> Factors:
    """A [M, r, d_in] and B [M, d_out, r] of every module, in float64, with the scale in B."""
    return {
        path: (
            module.factors.A.detach().double(),
            module.factors.B.detach().double().transpose(1, 2) * bank.scales.values[0],
        )
        for path, module in bank.modules.items()
    }


def singles(task: Task, found: Factors, split: str) -> list[Any]:
    """The answers of each adapter."""
    answers = []
    for slot in range(len(next(iter(found.values()))[0])):
        with applied(task.model, {path: Update(A[slot], B[slot]) for path, (A, B) in found.items()}):
            answers.append(task.answers(split))
    return answers


def means(found: Factors) -> dict[str, Update]:
    """The mean of every module."""
    return {path: mean(Module(path, 0, A, B)) for path, (A, B) in found.items()}


def average(measures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.mean(each[name] for each in measures) for name in measures[0]}


def score_methods(
    config: RunConfig,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    packs: Path | None,
    run: dict[str, Any],
    save: Callable[[], None],
) -> None:
    """Score the adapters of one seed, and what each method makes of them, but for what `run` has already."""
    seed, variants, chosen = config.adapters.seed, run["variants"], run["chosen"]
    found, rows = train(config, task, tokenizer, packs)

    def scored(updates: Mapping[str, Update], split: str = "test") -> dict[str, float]:
        with applied(task.model, updates):
            return task.measures(task.answers(split), split)

    moments: dict[str, Tensor] = {}
    for name, method in METHODS.items():
        scaled = name in SCALES and f"{name}, scaled" not in variants
        if name in variants and not scaled:
            continue
        if not moments:
            order = rng.permutation(len(rows), rng.key(seed, 0, "calibration"))
            with applied(task.model, means(found)):
                moments = second_moments(task.model, list(found), [rows[i] for i in order[:CALIBRATION_ROWS]])
        updates = {path: method(Module(path, seed, A, B, moments[path])) for path, (A, B) in found.items()}
        if name not in variants:
            variants[name] = scored(updates)
            print(f"seed {seed}: {name} {variants[name]}", flush=True)
        if scaled:
            losses = {
                factor: scored({path: times(update, factor) for path, update in updates.items()}, "validation")["nll"]
                for factor in SCALES[name]
            }
            factor = chosen[f"{name}, scaled"] = min(losses, key=lambda factor: losses[factor])
            variants[f"{name}, scaled"] = scored({path: times(update, factor) for path, update in updates.items()})
            print(f"seed {seed}: {name}, scaled by {factor} {variants[f'{name}, scaled']}", flush=True)
        save()
    if "adapters" not in run:
        answers = singles(task, found, "test")
        run["adapters"] = [task.measures(each, "test") for each in answers]
        variants["average adapter"] = average(run["adapters"])
        variants["prediction ensemble"] = task.measures(task.ensemble(answers), "test")
        save()
    if "best adapter" not in variants:
        validation = [task.measures(each, "validation")["nll"] for each in singles(task, found, "validation")]
        chosen["best adapter"] = min(range(len(validation)), key=lambda slot: validation[slot])
        variants["best adapter"] = run["adapters"][chosen["best adapter"]]
        save()


class AntitheticAdamW(NoisyAdamW):
    """NoisyAdamW in which adapter 2k + 1 gets the negative of adapter 2k's noise."""

    def _add_noise(self, group: dict[str, Any], first: int) -> list[Tensor]:
        if group["adapter"] % 2 == 0:
            return super()._add_noise(group, first)
        before = [parameter.clone() for parameter in group["params"]]
        partner = group | {"adapter": group["adapter"] - 1}
        norms = super()._add_noise(partner, first)
        group["noise_step"] = partner["noise_step"]
        for parameter, value in zip(group["params"], before, strict=True):
            parameter.copy_(2 * value - parameter)
        return norms


def antithetic(pack: Pack) -> None:
    pack.optimizer = AntitheticAdamW(pack.optimizer.param_groups)


def temperatures(pack: Pack) -> None:
    groups = pack.optimizer.param_groups
    for slot, group in enumerate(groups):
        group["temperature"] = TEMPERATURES[slot * len(TEMPERATURES) // len(groups)]


TRAININGS = {"antithetic noise": antithetic, "four λ": temperatures}


def train(
    config: RunConfig, task: Task, tokenizer: PreTrainedTokenizerBase, packs: Path | None, name: str = ""
) -> tuple[Factors, list[Example]]:
    """The trained factors of one of `TRAININGS`, or of the plain training, and the rows."""
    data = prepare_data(config, tokenizer)
    pack = train_pack(config, task.model, data, packs, TRAININGS.get(name, lambda pack: None), name)
    found = factors(pack.bank)
    pack.close()
    return found, data.train


def score_trainings(
    config: RunConfig, task: Task, tokenizer: PreTrainedTokenizerBase, packs: Path | None, run: dict[str, Any]
) -> None:
    """Train and score the packs of `TRAININGS` that `run` lacks."""
    variants = run["variants"]
    for name in TRAININGS:
        if f"{name}: mean" in variants:
            continue
        found, _ = train(config, task, tokenizer, packs, name)
        measured = [task.measures(each, "test") for each in singles(task, found, "test")]
        with applied(task.model, means(found)):
            variants[f"{name}: mean"] = task.measures(task.answers("test"), "test")
        variants[f"{name}: average adapter"] = average(measured)


COLUMNS = {"accuracy": 2, "nll": 3}  # decimals


def summary(files: Sequence[dict[str, Any]]) -> str:
    """The files side by side as a Markdown table of what was scored on every seed."""
    tables = []
    for found in files:
        runs = [
            {**run["variants"], **({"base": found["base"]} if "base" in found else {})}
            for run in found["seeds"].values()
        ]
        tables += [(found["model"], measure, runs) for measure in COLUMNS if measure in runs[0]["mean"]]

    def difference(runs: list[dict[str, Any]], name: str, of: str, measure: str, more: int = 0) -> str:
        change, digits = mean_interval([run[name][measure] - run[of][measure] for run in runs]), COLUMNS[measure] + more
        return f"{change.mean:+.{digits}f} ± {change.half_width:.{digits}f}"

    heads = [f"{model}: {measure} | minus the mean" for model, measure, _ in tables]
    lines = [f"| | {' | '.join(heads)} |", "|---|" + "---:|---:|" * len(tables)]
    names = ["base", "average adapter", "best adapter", "prediction ensemble"]
    names += [variant for name in METHODS for variant in (name, f"{name}, scaled")]
    names += [f"{training}: {what}" for training in TRAININGS for what in ("average adapter", "mean")]
    for name in names:
        cells = []
        for _, measure, runs in tables:
            if all(name in run for run in runs):
                value = statistics.mean(run[name][measure] for run in runs)
                shown = "" if name == "mean" else difference(runs, name, "mean", measure)
                cells.append(f"{value:.{COLUMNS[measure]}f} | {shown}")
            else:
                cells.append(" | ")
        if any(cell != " | " for cell in cells):
            lines.append(f"| {name} | {' | '.join(cells)} |")
    for model, measure, runs in tables:
        for rank in (16, 32):
            plain, other = f"mean, rank {rank}", f"mean, rank {rank}, weighted by inputs"
            if all(other in run for run in runs):
                lines.append(
                    f"\n{model}: {other}, minus {plain}: {measure} {difference(runs, other, plain, measure, 1)}"
                )
    for found in files:
        for name in (f"{name}, scaled" for name in SCALES):
            chosen = [f"{run['chosen'][name]:g}" for run in found["seeds"].values() if name in run["chosen"]]
            lines.append(f"\n{found['model']}: {name} by {', '.join(chosen)} (a seed each)")
    return "\n".join(lines)


def main() -> None:
    parser = parser_of(__doc__, files="+")
    parser.add_argument("--model", type=Path, help="another base than the demo's")
    parser.add_argument("--rows", type=Path, help="with --model: a folder with train.json and heldout.json")
    a = parser.parse_args()
    if a.summary:
        print(summary([json.loads(path.read_text()) for path in a.summary]))
        return
    setting = Setting([*REAL, *a.overrides], a.model, a.rows / "train.json") if a.model else Setting(a.overrides)
    model, tokenizer = setting.load()
    task: Task = (
        Rows(model, tokenizer, a.rows / "heldout.json", a.limit) if a.model else Questions(model, tokenizer, a.limit)
    )
    fixed = {
        "model": a.model.name if a.model else "micro-world",
        "settings": setting.described() | {"limit": a.limit},
    }
    results = Results(a.out, fixed, {"seeds": {}})
    found = results.found
    seeds = {seed: setting.config(f"adapters.seed={seed}") for seed in range(*a.seeds)}
    for seed, config in seeds.items():
        run = found["seeds"].setdefault(str(seed), {"variants": {}, "chosen": {}})
        score_methods(config, task, tokenizer, a.packs, run, results.save)
    if "base" not in found:
        found["base"] = task.measures(task.answers("test"), "test")
        results.save()
    for seed, config in seeds.items() if isinstance(task, Questions) else ():
        score_trainings(config, task, tokenizer, a.packs, found["seeds"][str(seed)])
        results.save()
    print(summary([found]))


if __name__ == "__main__":
    main()
