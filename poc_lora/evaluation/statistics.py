"""Accuracy with its standard error, the prediction ensemble and paired tests: pure functions of answers.

Standard errors are those of sampling the test questions, with the adapters fixed. They say nothing about other training
seeds.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from poc_lora import rng
from poc_lora.artifacts.results import Difference, Estimate
from poc_lora.evaluation.answers import Answer, Item

RESAMPLES = 10_000


def correct_by_benchmark(items: Sequence[Item], answers: Mapping[Item, Answer]) -> dict[str, Tensor]:
    """Whether each question was answered correctly.

    A question that was too long, or whose answer holds no label, counts as wrong.

    Args:
        items: Questions, all of them in `answers`.
        answers: The answers of one variant.

    Returns:
        For each benchmark 1.0 (correct) or 0.0 per question, float64 [n], in the order of `items`.
    """
    found: dict[str, list[bool]] = {}
    for item in items:
        found.setdefault(item.benchmark, []).append(answers[item].choice == item.question.answer)
    return {benchmark: torch.tensor(values, dtype=torch.float64) for benchmark, values in found.items()}


def mean(values: Tensor) -> Estimate:
    """The mean of `values` [n] and its standard error, sqrt(sample variance / n)."""
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(values.mean().item(), error)


def macro_average(parts: Mapping[str, Estimate]) -> Estimate:
    """The unweighted mean over benchmarks; as they are independent samples, its error is sqrt(Σ error²) / number."""
    total = math.fsum(part.value for part in parts.values())
    error = math.sqrt(math.fsum(part.error**2 for part in parts.values()))
    return Estimate(total / len(parts), error / len(parts))


def ensemble(item: Item, members: Sequence[Answer]) -> Answer:
    """The prediction ensemble's answer: the label with the largest mean probability over the members.

    Each member's label probabilities are normalised to sum to one before the mean is taken.

    Args:
        item: The question.
        members: The members' answers to it, with `log_probs`.

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


def paired_difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], *, seed: int) -> Difference:
    """The macro average of `ours` minus that of `theirs`, with a percentile bootstrap (Efron 1979).

    Questions are resampled within each benchmark. p is twice the smaller share of resamples on one side of zero, with
    one resample added to each side so that it is never zero.

    Args:
        ours: For each benchmark a value per question [n].
        theirs: Values of the same questions in the same order.
        seed: Of the bootstrap.
    """
    resampled = np.zeros(RESAMPLES)
    observed = 0.0
    for benchmark in ours:
        difference = (ours[benchmark] - theirs[benchmark]).double().numpy()
        values, counts = np.unique(difference, return_counts=True)
        # n draws with replacement take few distinct values, so their counts are drawn: the same law, much less work.
        stream = np.random.default_rng(rng.key(seed, 0, "bootstrap", name=benchmark))
        drawn = stream.multinomial(len(difference), counts / len(difference), size=RESAMPLES)
        resampled += drawn @ values / len(difference)
        observed += difference.mean()
    resampled /= len(ours)
    low, high = np.quantile(resampled, (0.025, 0.975))
    tail = min((resampled <= 0).sum(), (resampled >= 0).sum())
    p = min(1.0, 2 * (int(tail) + 1) / (RESAMPLES + 1))
    return Difference(value=float(observed / len(ours)), low=float(low), high=float(high), p=p)


def agreement(ours: Mapping[Item, Answer], theirs: Mapping[Item, Answer]) -> float:
    """The share of questions that fit the context on which two variants choose the same label; NaN if none fits."""
    same = [ours[item].choice == theirs[item].choice for item in ours if not ours[item].too_long]
    return sum(same) / len(same) if same else math.nan
