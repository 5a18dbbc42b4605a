"""Turns the answers of an evaluation into Results, and writes them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from poc_lora.artifacts.results import Estimate, Results, Scored
from poc_lora.artifacts.run_folder import RESULTS
from poc_lora.evaluation import statistics as scores
from poc_lora.evaluation.answers import Answer, Item
from poc_lora.evaluation.control import Control
from poc_lora.evaluation.variants import Variants, adapter_key
from poc_lora.files import write_json


def summarise(
    answers: Mapping[str, Mapping[Item, Answer]],
    items: Sequence[Item],
    *,
    adapters: Sequence[str],
    control: Control | None,
    seed: int,
    **described: Any,
) -> Results:
    """Compute Results from answers.

    Args:
        answers: By variant: `base`, the `adapter_key` of each adapter and, where there are such, `merged` and
            `ensemble`. Adapters answer all `items`, the other variants only test questions.
        seed: The seed of the bootstrap.
        described: The fields of Results that do not depend on answers.
    """
    test = [item for item in items if item.split == "test"]
    validation = [item for item in items if item.split == "validation"]
    correct = {variant: scores.correct_by_benchmark(test, given) for variant, given in answers.items()}
    benchmarks = list(correct["base"])
    mean_correct = {b: torch.stack([correct[adapter_key(a)][b] for a in adapters]).mean(0) for b in benchmarks}
    scored = {variant: _scored(parts) for variant, parts in correct.items()}
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
    """The share of answers without a label, among the questions that fit."""
    shares = {}
    for variant, given in answers.items():
        asked = [given[item] for item in items if not given[item].too_long]
        shares[variant] = sum(answer.choice is None for answer in asked) / len(asked) if asked else math.nan
    return shares


def write_results(variants: Variants, results: Results, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Write a JSON file for each variant, then results.json, which thus proves the others complete.

    Args:
        settings: By variant, what its answers depend on beside the questions; its `adapters` are digests.
    """
    sources = {adapter_key(name): adapter.source for name, adapter in variants.adapters.items()}
    if variants.merged is not None:
        sources["merged"] = variants.merged.source
    found: dict[str, Scored | None] = {adapter_key(name): scored for name, scored in results.adapters.items()}
    found |= {"base": results.base, "merged": results.merged, "ensemble": results.ensemble}
    for variant, scored in found.items():
        if scored is None:
            continue
        summary = {
            "variant": variant,
            "source": sources.get(variant),
            "adapter_digest": settings[variant]["adapters"][0] if variant in sources else None,
            "base_model": results.base_model,
            "protocol": results.protocol,
            "prompt": results.prompt,
            "benchmarks": {b: _plain(e) | {"questions": results.questions[b]} for b, e in scored.benchmarks.items()},
            "average": _plain(scored.average),
            "settings": settings[variant],
        }
        write_json(variants.out / f"{variant}.json", summary)
    results.write(variants.out / RESULTS)


def _plain(estimate: Estimate) -> dict[str, float | None]:
    return {"accuracy": estimate.value, "error": None if math.isnan(estimate.error) else estimate.error}


def _scored(correct: Mapping[str, Tensor]) -> Scored:
    parts = {b: scores.mean(values) for b, values in correct.items()}
    return Scored(benchmarks=parts, average=scores.macro_average(parts))
