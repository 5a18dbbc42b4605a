"""Are a model's probabilities honest? Log loss, Brier score and expected calibration error of its answers."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from poc_lora.artifacts.results import Calibration, Measure
from poc_lora.evaluation.answers import Answer, Item

DIGITS = 4  # saved: batching changes log-probabilities in the sixth
BINS = 15  # of equal width, as Guo et al. (ICML 2017) take


def calibrate(items: Sequence[Item], answers: Mapping[Item, Answer]) -> Calibration | None:
    """Compute the calibration of one variant: plain means over benchmarks, with errors of sampling the questions.

    The probabilities are those of the question's labels, normalised to one. Questions without them, such as those that
    are too long, are left out; None if a benchmark has no other.
    """
    benchmarks: dict[str, list[tuple[Tensor, int]]] = {item.benchmark: [] for item in items}
    for item in items:
        if found := answers[item].log_probs:
            log_p = torch.tensor(found, dtype=torch.float64).log_softmax(-1)  # those of long texts lie far apart
            benchmarks[item.benchmark].append((log_p, item.question.answer_index))
    if not benchmarks or not all(benchmarks.values()):
        return None
    parts = [
        (
            torch.stack([-log_p[right] for log_p, right in own]),
            torch.stack([brier_score(log_p.exp(), right) for log_p, right in own]),
            calibration_terms(
                torch.stack([log_p.max().exp() for log_p, _ in own]),
                torch.tensor([float(log_p.argmax() == right) for log_p, right in own]),
            ),
        )
        for own in benchmarks.values()
    ]
    nll, brier, ece = (_mean_over_benchmarks(values) for values in zip(*parts, strict=True))
    return Calibration(nll=nll, brier=brier, ece=ece)


def brier_score(p: Tensor, right: int) -> Tensor:
    """The sum over labels of (probability − 1 for the right one, − 0 for others)², from 0 to 2 (Brier 1950)."""
    return (p - torch.nn.functional.one_hot(torch.tensor(right), len(p))).square().sum()


def calibration_terms(confidence: Tensor, correct: Tensor) -> Tensor:
    """Values whose mean is the expected calibration error, Σ_bins |Σ (confidence − correct)| / n.

    Each is (confidence − correct) times the sign of its bin's sum, so their sample variance gives the error of the mean
    to first order. With few questions the expected calibration error is too large on average, for all variants alike.

    Args:
        confidence: The probability of the chosen label [n].
        correct: Whether it is right, 1 or 0 [n].
    """
    gap = confidence - correct.to(confidence.dtype)
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    sums = torch.zeros(BINS, dtype=gap.dtype).index_add_(0, bins, gap)
    return gap * sums.sign()[bins]


def _mean_over_benchmarks(parts: Sequence[Tensor]) -> Measure:
    errors = [part.std().item() / math.sqrt(len(part)) if len(part) > 1 else math.nan for part in parts]
    value = max(0.0, sum(part.mean().item() for part in parts) / len(parts))
    error = math.sqrt(math.fsum(error**2 for error in errors)) / len(parts)
    return Measure(round(value, DIGITS), round(error, DIGITS))
