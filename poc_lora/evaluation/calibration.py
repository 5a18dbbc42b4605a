"""Calibration: log loss, Brier score and expected calibration error of a variant's answers."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from poc_lora.artifacts.results import Calibration, Measure
from poc_lora.data.questions import Question
from poc_lora.evaluation.answers import Answer, Item
from poc_lora.evaluation.sampling import group_numbers, standard_error

DIGITS = 4  # saved: batching changes log-probabilities in the sixth
BINS = 15  # of equal width, as Guo et al. (ICML 2017) take


def calibrate(items: Sequence[Item], answers: Mapping[Item, Answer]) -> Calibration | None:
    """Compute the calibration of one variant: means over benchmarks, with the standard errors of sampling questions.

    The probabilities are those of the question's labels, normalised to sum to one. Questions without them, such as
    those that are too long, are left out. Returns None if a benchmark has no others.
    """
    benchmarks: dict[str, list[tuple[tuple[float, ...], Question]]] = {item.benchmark: [] for item in items}
    for item in items:
        if found := answers[item].log_probs:
            benchmarks[item.benchmark].append((found, item.question))
    if not benchmarks or not all(benchmarks.values()):
        return None
    parts = []
    for own in benchmarks.values():
        k = max(len(found) for found, _ in own)
        padded = [(*found, *(k - len(found)) * [-math.inf]) for found, _ in own]  # absent labels have probability 0
        # [n, k]; texts may lie thousands of nats apart, so that their probabilities are zero in float64
        log_p = torch.tensor(padded, dtype=torch.float64).log_softmax(-1)
        right = torch.tensor([question.answer_index for _, question in own])
        confidence, chosen = log_p.exp().max(-1)
        losses = -log_p.gather(-1, right[:, None])[:, 0]
        parts.append((losses, brier_score(log_p.exp(), right), calibration_terms(confidence, chosen == right)))
    groups = [group_numbers([question for _, question in own]) for own in benchmarks.values()]
    nll, brier, ece = (_mean_over_benchmarks(values, groups) for values in zip(*parts, strict=True))
    return Calibration(nll=nll, brier=brier, ece=ece)


def brier_score(p: Tensor, right: Tensor) -> Tensor:
    """Σ_l (p_l − y_l)² over the labels, with y_l = 1 for the right one and 0 for others; from 0 to 2 (Brier 1950).

    Args:
        p: Probabilities of the labels [n, k].
        right: The number of the right label [n].
    """
    return (p - torch.nn.functional.one_hot(right, p.shape[-1])).square().sum(-1)


def calibration_terms(confidence: Tensor, correct: Tensor) -> Tensor:
    """Values whose mean is the expected calibration error, Σ_bins |Σ (confidence − correct)| / n.

    Each is (confidence − correct) times the sign of its bin's sum, so their sample variance gives the standard error of
    the mean to first order. With few questions the expected calibration error is biased upwards for all variants.

    Args:
        confidence: The probability of the chosen label [n].
        correct: Whether it is right, 1 or 0 [n].
    """
    gap = confidence - correct.to(confidence.dtype)
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    sums = torch.zeros(BINS, dtype=gap.dtype).index_add_(0, bins, gap)
    return gap * sums.sign()[bins]


def _mean_over_benchmarks(parts: Sequence[Tensor], groups: Sequence[Tensor | None]) -> Measure:
    errors = [standard_error(part, own) for part, own in zip(parts, groups, strict=True)]
    value = max(0.0, sum(part.mean().item() for part in parts) / len(parts))
    error = math.sqrt(math.fsum(error**2 for error in errors)) / len(parts)
    return Measure(round(value, DIGITS), round(error, DIGITS))
