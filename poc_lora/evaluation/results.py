"""What an evaluation found: in memory, and as results.json."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poc_lora.errors import RunError
from poc_lora.evaluation import statistics as scores
from poc_lora.evaluation.answers import Answer, Item
from poc_lora.evaluation.control import Control
from poc_lora.evaluation.statistics import Difference, Estimate
from poc_lora.evaluation.variants import Variants, adapter_key
from poc_lora.files import read_json, write_json

RESULTS_FILE = "results.json"
ROWS = ("base", "average", "merged", "ensemble", "control")
NESTED = (*ROWS, "adapters", "comparisons", "unread")


@dataclass(frozen=True)
class Scored:
    """The accuracy of one thing: by benchmark folder, and their plain average."""

    benchmarks: dict[str, Estimate]
    average: Estimate


@dataclass(frozen=True)
class Results:
    """Everything the paper's table needs. Accuracies are shares of 1, in the paper's order of benchmarks.

    best: the adapter of the largest average, chosen on `best_chosen_on`: a validation split, or the test questions
    themselves, as in the paper, which flatters it. average: the mean over adapters. control: another run's merge.
    comparisons: the merge minus `best`, minus `average` and minus `control`. agreement: how often merge and ensemble
    choose the same label. unread: by thing, the share of generated answers in which no label was found; NaN where no
    question fitted. subsets: see `poc_lora.evaluation.subsets`. merged: of the run's merged/ or, with exact_average, of
    the adapters' exact average, which is in no folder; None for one adapter without a merge. ensemble is None where
    there are fewer than two adapters or nothing but generated text. too_long: questions that do not fit the context,
    which are wrong, or, by the protocol harness, scored with their prompts cut.
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
    unread: dict[str, float] = field(default_factory=dict)
    control: Scored | None = None
    control_name: str | None = None
    subsets: dict[str, Any] | None = None
    exact_average: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain values; what cannot be told (NaN) is null."""
        return _without_nan(asdict(self))


def summarise(
    answers: Mapping[str, Mapping[Item, Answer]],
    items: Sequence[Item],
    *,
    adapters: Sequence[str],
    control: Control | None,
    seed: int,
    **described: Any,
) -> Results:
    """Turn answers into Results.

    answers: of each thing (`base`, the `adapter_key` of each adapter, `merged`, `ensemble`; the last two may be absent)
    to the test questions among `items`, of adapters to all. seed: of the bootstrap. described: the fields of Results
    that answers do not tell.
    """
    test = [item for item in items if item.split == "test"]
    validation = [item for item in items if item.split == "validation"]
    correct = {thing: scores.correct_by_benchmark(test, given) for thing, given in answers.items()}
    benchmarks = list(correct["base"])
    mean_correct = {b: torch.stack([correct[adapter_key(a)][b] for a in adapters]).mean(0) for b in benchmarks}
    scored = {thing: _scored(parts) for thing, parts in correct.items()}
    chosen_on = {a: _scored(scores.correct_by_benchmark(validation or test, answers[adapter_key(a)])) for a in adapters}
    best = max(adapters, key=lambda a: chosen_on[a].average.value)
    rivals = {"best": correct[adapter_key(best)], "average": mean_correct}
    if control is not None:
        rivals["control"] = control.correct
    both = "merged" in answers and "ensemble" in answers
    return Results(
        questions={b: len(values) for b, values in correct["base"].items()},
        too_long={b: sum(i.benchmark == b and answers["base"][i].too_long for i in test) for b in benchmarks},
        unread=_unread(answers, test) if described["protocol"] == "generate" else {},
        base=scored["base"],
        adapters={a: scored[adapter_key(a)] for a in adapters},
        best=best,
        best_chosen_on="validation" if validation else "test",
        average=_scored(mean_correct),
        merged=scored.get("merged"),
        ensemble=scored.get("ensemble"),
        control=None if control is None else _scored(control.correct),
        control_name=None if control is None else control.name,
        comparisons={
            name: scores.paired_difference(correct["merged"], rival, seed=seed) for name, rival in rivals.items()
        }
        if "merged" in correct
        else {},
        agreement=scores.agreement(answers["merged"], answers["ensemble"]) if both else None,
        **described,
    )


def _unread(answers: Mapping[str, Mapping[Item, Answer]], items: Sequence[Item]) -> dict[str, float]:
    """The share of answers in which no label was found, of questions that fit."""
    shares = {}
    for thing, given in answers.items():
        asked = [given[item] for item in items if not given[item].too_long]
        shares[thing] = sum(answer.choice is None for answer in asked) / len(asked) if asked else math.nan
    return shares


def write_results(subjects: Variants, results: Results, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """A JSON for everything scored, then results.json: where it stands, the rest is of the same evaluation.

    settings: of each thing, what its answers depend on beside the questions; its `adapters` are digests.
    """
    sources = {adapter_key(name): adapter.source for name, adapter in subjects.adapters.items()}
    if subjects.merged is not None:
        sources["merged"] = subjects.merged.source
    found: dict[str, Scored | None] = {adapter_key(name): scored for name, scored in results.adapters.items()}
    found |= {"base": results.base, "merged": results.merged, "ensemble": results.ensemble}
    for thing, scored in found.items():
        if scored is None:
            continue
        summary = {
            "thing": thing,
            "source": sources.get(thing),
            "adapter_digest": settings[thing]["adapters"][0] if thing in sources else None,
            "base_model": results.base_model,
            "protocol": results.protocol,
            "prompt": results.prompt,
            "benchmarks": {b: _plain(e) | {"questions": results.questions[b]} for b, e in scored.benchmarks.items()},
            "average": _plain(scored.average),
            "settings": settings[thing],
        }
        write_json(subjects.out / f"{thing}.json", summary)
    write_json(subjects.out / RESULTS_FILE, results.to_json())


def _plain(estimate: Estimate) -> dict[str, float | None]:
    return {"accuracy": estimate.value, "error": None if math.isnan(estimate.error) else estimate.error}


def read_results(folder: Path) -> Results:
    """The Results that an evaluation wrote to `folder`. Raises RunError."""
    path = folder / RESULTS_FILE
    raw = read_json(path, error=RunError)
    try:
        rows = {name: _read_scored(raw[name]) for name in ROWS if raw[name] is not None}
        return Results(
            **{name: raw[name] for name in Results.__dataclass_fields__ if name not in NESTED},
            unread={thing: math.nan if share is None else share for thing, share in raw["unread"].items()},
            **{name: rows.get(name) for name in ROWS},  # type: ignore[arg-type]
            adapters={name: _read_scored(row) for name, row in raw["adapters"].items()},
            comparisons={name: Difference(**x) for name, x in raw["comparisons"].items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise RunError(f"not the results of an evaluation ({problem!r})", where=path, fix="evaluate again") from problem


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
