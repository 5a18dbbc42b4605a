"""From answers to Results: accuracies with their standard errors, the prediction ensemble and paired tests.

Standard errors are those of sampling the test questions, with the adapters fixed. They say nothing about other training
seeds.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from poc_lora import rng
from poc_lora.adapters.adapter import written_bytes
from poc_lora.artifacts.results import Calibration, Difference, Estimate, Results, Scored, TruncatedMerge
from poc_lora.artifacts.run_folder import RESULTS, variant_file
from poc_lora.artifacts.variant_scores import BenchmarkAccuracy, VariantAccuracy, VariantScores
from poc_lora.data.questions import Question
from poc_lora.evaluation.answers import Answer, Item
from poc_lora.evaluation.calibration import calibrate
from poc_lora.evaluation.sampling import group_numbers, standard_error
from poc_lora.evaluation.variants import Variants, adapter_key, rank_key

RESAMPLES = 10_000
MAX_DRAWN = 10_000_000  # counts at once
SMALLEST = 2.802  # standard errors: the normal quantiles of 0.975, for the 5 % level, and of 0.8, for the power
DISCORDANT = 0.2


def summarise(
    answers: Mapping[str, Mapping[Item, Answer]],
    items: Sequence[Item],
    *,
    adapters: Sequence[str],
    seed: int,
    **described: Any,
) -> Results:
    """Compute Results from answers.

    Args:
        answers: By variant: `base`, the `adapter_key` of each adapter and, where they exist, `merged`, `ensemble` and
            `control`. Adapters answer all `items`, the other variants only test questions.
        seed: The seed of the bootstrap.
        described: The fields of Results that do not depend on answers.
    """
    test = [item for item in items if item.split == "test"]
    validation = [item for item in items if item.split == "validation"]
    groups = groups_by_benchmark(test)
    correct = {variant: correct_by_benchmark(test, given) for variant, given in answers.items()}
    benchmarks = list(correct["base"])
    members = [correct[adapter_key(a)] for a in adapters] or [correct["base"]]  # a model alone is its own average
    rivals = {"average": {b: torch.stack([member[b] for member in members]).mean(0) for b in benchmarks}}
    per_byte = {variant: correct_per_byte(test, given) for variant, given in answers.items() if variant != "ensemble"}
    own = [per_byte[adapter_key(a)] for a in adapters] or [per_byte["base"]]
    per_byte["average"] = {b: torch.stack([member[b] for member in own]).mean(0) for b in per_byte["base"]}
    scored = {variant: _scored(parts, groups, per_byte.get(variant)) for variant, parts in (correct | rivals).items()}
    chosen_on = {a: _scored(correct_by_benchmark(validation or test, answers[adapter_key(a)]), {}) for a in adapters}
    best = max(adapters, key=lambda a: chosen_on[a].average.value, default="")
    if best:
        rivals = {"best": correct[adapter_key(best)]} | rivals
    if "control" in correct:
        rivals["control"] = correct["control"]
    merged, together = answers.get("merged"), answers.get("ensemble")
    calibrated = _calibrations(answers, test)
    shown = {"base": "base", "best": adapter_key(best), "merged": "merged", "ensemble": "ensemble"}
    return Results(
        questions={b: len(values) for b, values in correct["base"].items()},
        questions_sha256=hashlib.sha256(json.dumps([asdict(item) for item in test]).encode()).hexdigest(),
        too_long={b: sum(i.benchmark == b and answers["base"][i].too_long for i in test) for b in benchmarks},
        unread=_unread(answers, test) if described["protocol"] == "generate" else {},
        base=scored["base"],
        adapters={a: scored[adapter_key(a)] for a in adapters},
        best=best,
        best_chosen_on="validation" if validation else "test",
        average=scored["average"],
        merged=scored.get("merged"),
        ensemble=scored.get("ensemble"),
        control=scored.get("control"),
        groups={benchmark: int(own.max()) + 1 for benchmark, own in groups.items()},
        comparisons={
            name: paired_difference(correct["merged"], rival, seed=seed, groups=groups)
            for name, rival in rivals.items()
        }
        if merged
        else {},
        calibration={name: calibrated[key] for name, key in shown.items() if key in calibrated},
        calibration_of_adapters={a: calibrated[key] for a in adapters if (key := adapter_key(a)) in calibrated},
        agreement=agreement(merged, together) if merged and together else None,
        **described,
    )


def score_truncated(
    variants: Variants, answers: Mapping[str, Mapping[Item, Answer]], items: Sequence[Item], *, seed: int
) -> list[TruncatedMerge]:
    """Score the merge truncated to smaller ranks against the merge itself.

    Args:
        variants: With the truncated merges.
        answers: By variant, as for `summarise`.
        items: The test questions.
        seed: The seed of the bootstrap.
    """
    groups = groups_by_benchmark(items)
    found = []
    for rank, merged in variants.truncated.items():
        given = answers[rank_key(rank)]
        correct = correct_by_benchmark(items, given)
        whole = correct_by_benchmark(items, answers["merged"])
        scored = _scored(correct, groups, correct_per_byte(items, given))
        found.append(
            TruncatedMerge(
                benchmarks=scored.benchmarks,
                average=scored.average,
                per_byte=scored.per_byte,
                rank=rank,
                bytes=written_bytes(merged.adapter, merged.report.rank),
                error=max(module.error for module in merged.report.modules.values()),
                difference=paired_difference(correct, whole, seed=seed, groups=groups),
            )
        )
    return found


def write_results(variants: Variants, results: Results, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Write `VariantScores` for each variant, then results.json: if it is there, the others are complete.

    Args:
        settings: By variant, what its answers depend on besides the questions; its `adapters` are digests.
    """
    read = {adapter_key(name): adapter for name, adapter in variants.adapters.items()}
    read |= {"merged": variants.merged} if variants.merged else {}
    found: dict[str, Scored | None] = {adapter_key(name): scored for name, scored in results.adapters.items()}
    found |= {name: getattr(results, name) for name in ("base", "merged", "ensemble")}
    found |= {rank_key(one.rank): one for one in results.truncated}
    for variant, scored in found.items():
        if scored is None:
            continue
        VariantScores(
            variant=variant,
            source=read[variant].source if variant in read else None,
            adapter_digest=settings[variant]["adapters"][0] if variant in read else None,
            base_model=results.base_model,
            protocol=results.protocol,
            prompt=results.prompt,
            benchmarks={
                benchmark: BenchmarkAccuracy(accuracy=value, error=error, questions=results.questions[benchmark])
                for benchmark, (value, error) in scored.benchmarks.items()
            },
            average=VariantAccuracy(accuracy=scored.average.value, error=scored.average.error),
            settings=dict(settings[variant]),
        ).write(variants.out / variant_file(variant))
    results.write(variants.out / RESULTS)


def correct_by_benchmark(items: Sequence[Item], answers: Mapping[Item, Answer]) -> dict[str, Tensor]:
    """For each benchmark 1.0 (correct) or 0.0 per question, float64 [n], in the order of `items`.

    A question that was too long, or whose answer has no label, counts as wrong.
    """
    found: dict[str, list[bool]] = {}
    for item in items:
        found.setdefault(item.benchmark, []).append(answers[item].choice == item.question.answer)
    return {benchmark: torch.tensor(values, dtype=torch.float64) for benchmark, values in found.items()}


def correct_per_byte(items: Sequence[Item], answers: Mapping[Item, Answer]) -> dict[str, Tensor]:
    """As `correct_by_benchmark`, for questions with choices of free text, by log-probability per byte of the choice.

    Longer texts have lower probabilities; lm-eval calls this acc_bytes (and its acc_norm divides by characters).
    """
    found: dict[str, list[bool]] = {}
    for item in items:
        if item.question.form == "labels":
            continue
        log_probs, labels = answers[item].log_probs, item.question.labels
        values = [p / len(label.encode()) for p, label in zip(log_probs or (), labels, strict=bool(log_probs))]
        right = bool(values) and labels[values.index(max(values))] == item.question.answer
        found.setdefault(item.benchmark, []).append(right)
    return {benchmark: torch.tensor(values, dtype=torch.float64) for benchmark, values in found.items()}


def groups_by_benchmark(items: Sequence[Item]) -> dict[str, Tensor]:
    """For each benchmark whose questions name groups, each question's number of its group [n], as `items` has them."""
    questions: dict[str, list[Question]] = {}
    for item in items:
        questions.setdefault(item.benchmark, []).append(item.question)
    found = {benchmark: group_numbers(own) for benchmark, own in questions.items()}
    return {benchmark: numbers for benchmark, numbers in found.items() if numbers is not None}


def mean(values: Tensor, groups: Tensor | None = None) -> Estimate:
    """The mean of `values` [n] and its `standard_error`."""
    return Estimate(values.mean().item(), standard_error(values, groups))


def macro_average(parts: Mapping[str, Estimate]) -> Estimate:
    """The unweighted mean over benchmarks, which are independent samples: its error is sqrt(Σ error²) / number."""
    total = math.fsum(part.value for part in parts.values())
    error = math.sqrt(math.fsum(part.error**2 for part in parts.values()))
    return Estimate(total / len(parts), error / len(parts))


def ensemble(item: Item, members: Sequence[Answer]) -> Answer:
    """The prediction ensemble's answer: the label with the largest mean probability over the members.

    Each member's label probabilities are normalised to sum to one before the mean is taken.

    Returns:
        The answer with the logarithms of the mean probabilities, or one marked `too_long` if a member has none.
    """
    members_log_probs = [answer.log_probs for answer in members]
    if None in members_log_probs:
        return Answer(None, too_long=True)
    values = torch.tensor(members_log_probs, dtype=torch.float64).log_softmax(-1)  # [members, labels]
    mean = values.logsumexp(0) - math.log(len(members))
    log_probs = tuple(round(value, 6) for value in mean.tolist())
    return Answer(item.question.labels[int(mean.argmax())], log_probs=log_probs)


def paired_difference(
    ours: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    *,
    seed: int,
    groups: Mapping[str, Tensor] | None = None,
) -> Difference:
    """The macro average of `ours` minus that of `theirs`, with a percentile bootstrap (Efron 1979).

    Questions are resampled within each benchmark, or whole groups of them where they have groups. p is twice the
    smaller share of resamples on one side of zero, with one resample added to each side so that it is never zero. It is
    at least `smallest_p` of the questions or groups that differ, and where that is above 5 % the interval holds zero:
    resamples of a few equal values are all equal.

    Args:
        ours, theirs: For each benchmark a value per question [n], in the same order.
        seed: Of the bootstrap.
        groups: For each benchmark that has some, each question's number of its group [n].
    """
    resampled = np.zeros(RESAMPLES)
    observed, differing = 0.0, 0
    for benchmark in ours:
        difference = (ours[benchmark] - theirs[benchmark]).double().numpy()
        sums, sizes = _sums_of_groups(difference, (groups or {}).get(benchmark))
        values, counts = np.unique(np.stack([sums, sizes], 1), axis=0, return_counts=True)
        # n draws with replacement take few distinct values, so their counts are drawn: the same law, much less work.
        stream = np.random.default_rng(rng.key(seed, 0, "bootstrap", name=benchmark))
        rows = max(1, MAX_DRAWN // len(values))
        for first in range(0, RESAMPLES, rows):
            size = min(rows, RESAMPLES - first)
            drawn = stream.multinomial(len(sums), counts / len(sums), size=size)
            resampled[first : first + size] += (drawn @ values[:, 0]) / (drawn @ values[:, 1])
        observed += difference.mean()
        differing += int(np.count_nonzero(sums))
    resampled /= len(ours)
    low, high = np.quantile(resampled, (0.025, 0.975))
    tail = min((resampled <= 0).sum(), (resampled >= 0).sum())
    p = min(1.0, max(2 * (int(tail) + 1) / (RESAMPLES + 1), smallest_p(differing)))
    if smallest_p(differing) > 0.05:
        low, high = min(low, 0.0), max(high, 0.0)
    detectable = SMALLEST * float(resampled.std())
    return Difference(
        value=float(observed / len(ours)), low=float(low), high=float(high), p=p, detectable=detectable or None
    )


def _sums_of_groups(values: np.ndarray, groups: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """The sum of the values [n] of each group, and how many they are; without groups each value is one."""
    if groups is None:
        return values, np.ones(len(values))
    numbers = groups.numpy()
    return np.bincount(numbers, weights=values), np.bincount(numbers).astype(float)


def smallest_p(differing: int) -> float:
    """The smallest two-sided p-value of n paired differences, 2^(1 − n): a sign test's where all have one sign."""
    return 2.0 ** (1 - differing)


def smallest_difference(questions: Mapping[str, int]) -> float:
    """The smallest difference of macro averages that an evaluation shows with 80 % power at the 5 % level.

    It assumes that on one question in five exactly one of the two variants is right, so that the difference per
    question has variance 1/5. Variants that differ more often need more questions.

    Args:
        questions: Their number, by benchmark.
    """
    return SMALLEST * math.sqrt(math.fsum(DISCORDANT / n for n in questions.values())) / len(questions)


def agreement(ours: Mapping[Item, Answer], theirs: Mapping[Item, Answer]) -> float:
    """The share of questions, of those that fit the context, on which two variants agree; NaN if none fits."""
    same = [ours[item].choice == theirs[item].choice for item in ours if not ours[item].too_long]
    return sum(same) / len(same) if same else math.nan


def _calibrations(answers: Mapping[str, Mapping[Item, Answer]], test: Sequence[Item]) -> dict[str, Calibration]:
    found = {variant: calibrate(test, given) for variant, given in answers.items() if variant != "control"}
    return {variant: calibration for variant, calibration in found.items() if calibration}


def _unread(answers: Mapping[str, Mapping[Item, Answer]], items: Sequence[Item]) -> dict[str, float]:
    """The share of answers without a label, among the questions that fit."""
    shares = {}
    for variant, given in answers.items():
        if variant == "control":
            continue
        asked = [given[item] for item in items if not given[item].too_long]
        shares[variant] = sum(answer.choice is None for answer in asked) / len(asked) if asked else math.nan
    return shares


def _scored(
    correct: Mapping[str, Tensor], groups: Mapping[str, Tensor], per_byte: Mapping[str, Tensor] | None = None
) -> Scored:
    parts = {b: mean(values, groups.get(b)) for b, values in correct.items()}
    by_bytes = {b: mean(values, groups.get(b)) for b, values in (per_byte or {}).items()}
    return Scored(benchmarks=parts, average=macro_average(parts), per_byte=by_bytes)
