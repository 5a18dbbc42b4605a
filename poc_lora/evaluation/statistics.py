"""Accuracy, its error, the prediction ensemble and paired tests: pure functions of label scores.

Errors are those of sampling test questions from what could have been asked, with the adapters as they are; they say
nothing about other seeds.
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


def is_right(item: Item, answer: Answer) -> float:
    """1.0 where the choice is the answer, else 0.0, also where the question was too long or no label could be read."""
    return float(answer.choice == item.question.answer)


def ensemble(item: Item, members: Sequence[Answer]) -> Answer:
    """The prediction ensemble's answer: the label of the largest mean probability over the members.

    Each member's label scores are normalised to sum to one before the mean is taken.
    """
    said = [answer.log_probs for answer in members]
    if None in said:
        return Answer(None, too_long=True)
    mean = torch.tensor(said, dtype=torch.float64).log_softmax(-1).logsumexp(0) - math.log(len(said))
    log_probs = tuple(round(value, 6) for value in mean.tolist())
    return Answer(item.question.labels[int(mean.argmax())], log_probs=log_probs)


def mean(values: Tensor) -> Estimate:
    """The mean of one value per question and its standard error, sqrt(sample variance / n). `values`: [n]."""
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(values.mean().item(), error)


def macro_average(parts: Mapping[str, Estimate]) -> Estimate:
    """The plain mean over benchmarks, each an independent sample: its error is sqrt(Σ error²) / number."""
    total = math.fsum(part.value for part in parts.values())
    error = math.sqrt(math.fsum(part.error**2 for part in parts.values()))
    return Estimate(total / len(parts), error / len(parts))


def paired_difference(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], *, seed: int, resamples: int = RESAMPLES
) -> Difference:
    """Bootstrap of the macro average of `ours` minus `theirs`, drawing questions within each benchmark.

    ours, theirs: benchmark to a value per question [n], of the same questions. p is twice the smaller tail share
    beyond zero, each tail counted with one resample added.
    """
    resampled = np.zeros(resamples)
    observed = 0.0
    for benchmark in ours:
        difference = (ours[benchmark] - theirs[benchmark]).double().numpy()
        values, counts = np.unique(difference, return_counts=True)
        # n draws with replacement take few distinct values, so their counts are drawn: the same law, much less work.
        stream = np.random.default_rng(rng.key(seed, 0, "bootstrap", name=benchmark))
        drawn = stream.multinomial(len(difference), counts / len(difference), size=resamples)
        resampled += drawn @ values / len(difference)
        observed += difference.mean()
    resampled /= len(ours)
    low, high = np.quantile(resampled, (0.025, 0.975))
    tail = min((resampled <= 0).sum(), (resampled >= 0).sum())
    p = min(1.0, 2 * (int(tail) + 1) / (resamples + 1))
    return Difference(value=float(observed / len(ours)), low=float(low), high=float(high), p=p)


def agreement(ours: Mapping[Item, Answer], theirs: Mapping[Item, Answer]) -> float:
    """The share of questions on which two models choose the same label, of those that fit; NaN if none did."""
    same = [ours[item].choice == theirs[item].choice for item in ours if not ours[item].too_long]
    return sum(same) / len(same) if same else math.nan
