"""What an evaluation found: in memory, and as results.json."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poc_lora.errors import RunError
from poc_lora.evaluation import scores
from poc_lora.evaluation.scores import Difference, Estimate
from poc_lora.files import read_json

RESULTS_FILE = "results.json"
ROWS = ("base", "average", "merged", "ensemble")
NESTED = (*ROWS, "adapters", "comparisons")


def adapter_key(name: str) -> str:
    """What an adapter is called among the things scored, and its file: never `base`, `merged` or `ensemble`."""
    return f"adapter-{name}"


@dataclass(frozen=True)
class Scored:
    """The accuracy of one thing: by benchmark folder, and their plain average."""

    benchmarks: dict[str, Estimate]
    average: Estimate


@dataclass(frozen=True)
class Results:
    """Everything the paper's table needs. Accuracies are shares of 1, in the paper's order of benchmarks.

    best: the adapter of the largest average, chosen on `best_chosen_on`: the test questions themselves, as in the
    paper, which flatters it. average: the mean over adapters. comparisons: the merge minus `best` and minus
    `average`. agreement: how often merge and ensemble choose the same label. merged is None where there is no merge,
    ensemble where there are fewer than two adapters.
    """

    base_model: str
    prompt: str
    limit: int | None
    questions: dict[str, int]
    too_long: dict[str, int]
    chance: dict[str, float]
    base: Scored
    adapters: dict[str, Scored]
    best: str
    average: Scored
    merged: Scored | None
    ensemble: Scored | None
    comparisons: dict[str, Difference]
    agreement: float | None
    protocol: str = "label"
    best_chosen_on: str = "test"

    def to_json(self) -> dict[str, Any]:
        """Plain values; what cannot be told (NaN) is null."""
        return _without_nan(asdict(self))


def summarise(
    log_probs: Mapping[str, Mapping[str, Tensor]],
    answers: Mapping[str, Tensor],
    too_long: Mapping[str, Tensor],
    *,
    adapters: Sequence[str],
    seed: int,
    **described: Any,
) -> Results:
    """Turn label scores into Results.

    log_probs: thing (`base`, the `adapter_key` of each adapter, `merged`, `ensemble`) to benchmark to scores [n, k];
    the last two may be absent. seed: of the bootstrap. described: the fields of Results that scores do not tell.
    """
    correct = {
        thing: {b: scores.is_correct(parts[b], answers[b], too_long[b]) for b in parts}
        for thing, parts in log_probs.items()
    }
    mean_correct = {b: torch.stack([correct[adapter_key(a)][b] for a in adapters]).mean(0) for b in answers}
    scored = {thing: _scored(parts) for thing, parts in correct.items()}
    best = max(adapters, key=lambda a: scored[adapter_key(a)].average.value)
    rivals = {"best": correct[adapter_key(best)], "average": mean_correct} if "merged" in correct else {}
    both = "merged" in log_probs and "ensemble" in log_probs
    return Results(
        questions={b: len(a) for b, a in answers.items()},
        too_long={b: int(x.sum()) for b, x in too_long.items()},
        base=scored["base"],
        adapters={a: scored[adapter_key(a)] for a in adapters},
        best=best,
        average=_scored(mean_correct),
        merged=scored.get("merged"),
        ensemble=scored.get("ensemble"),
        comparisons={
            name: scores.paired_difference(correct["merged"], rival, seed=seed) for name, rival in rivals.items()
        },
        agreement=scores.agreement(log_probs["merged"], log_probs["ensemble"], too_long) if both else None,
        **described,
    )


def read_results(folder: Path) -> Results:
    """The Results that an evaluation wrote to `folder`. Raises RunError."""
    path = folder / RESULTS_FILE
    raw = read_json(path, error=RunError)
    try:
        rows = {name: _read_scored(raw[name]) for name in ROWS if raw[name] is not None}
        return Results(
            **{name: raw[name] for name in Results.__dataclass_fields__ if name not in NESTED},
            **{name: rows.get(name) for name in ROWS},  # type: ignore[arg-type]
            adapters={name: _read_scored(row) for name, row in raw["adapters"].items()},
            comparisons={name: Difference(**x) for name, x in raw["comparisons"].items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise RunError(f"not the results of an evaluation ({problem!r})", where=path, fix="evaluate again") from None


def _scored(correct: Mapping[str, Tensor]) -> Scored:
    parts = {b: scores.mean(values) for b, values in correct.items()}
    return Scored(parts, scores.macro_average(parts))


def _read_scored(raw: dict[str, Any]) -> Scored:
    return Scored({b: _estimate(pair) for b, pair in raw["benchmarks"].items()}, _estimate(raw["average"]))


def _estimate(pair: list[float | None]) -> Estimate:
    value, error = (math.nan if x is None else float(x) for x in pair)
    return Estimate(value, error)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value
