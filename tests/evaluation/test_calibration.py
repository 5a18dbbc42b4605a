"""Calibration against loops over questions that follow the definitions."""

import math

import numpy as np
import pytest
import torch

from poc_lora.data.questions import Question
from poc_lora.evaluation.answers import Answer, Item
from poc_lora.evaluation.calibration import calibrate, calibration_terms

LABELS = ("a", "b", "c")


def answered(n, benchmark, seed, k=3):
    draws = np.random.default_rng(seed)
    items = [
        Item(benchmark, "test", i, Question("q", "", LABELS[:k], LABELS[int(draws.integers(k))]))
        for i in range(1, n + 1)
    ]
    scores = draws.normal(size=(n, k)) * 2 - 40  # log-probabilities of whole texts are far below zero
    return {
        item: Answer(LABELS[int(row.argmax())], log_probs=tuple(row)) for item, row in zip(items, scores, strict=True)
    }


def plain(answers):
    """Log loss, Brier score and expected calibration error of one benchmark."""
    losses, briers, bins = [], [], {}
    for item, answer in answers.items():
        odds = [math.exp(x - max(answer.log_probs)) for x in answer.log_probs]
        p = [x / sum(odds) for x in odds]
        right = item.question.answer_index
        losses.append(-math.log(p[right]))
        briers.append(sum((x - (j == right)) ** 2 for j, x in enumerate(p)))
        bins.setdefault(int(max(p) * 15), []).append(max(p) - (p.index(max(p)) == right))
    ece = sum(abs(sum(gaps) / len(gaps)) * len(gaps) / len(answers) for gaps in bins.values())
    return losses, briers, ece


def test_each_measure_is_its_definition_averaged_over_benchmarks():
    one, other = answered(50, "quiz", 1), answered(80, "labels", 2, k=2)
    found = calibrate([*one, *other], one | other)
    (nll1, brier1, ece1), (nll2, brier2, ece2) = plain(one), plain(other)
    for measure, a, b in ((found.nll, nll1, nll2), (found.brier, brier1, brier2)):
        assert measure.value == pytest.approx((np.mean(a) + np.mean(b)) / 2, abs=5e-5)  # four digits are saved
        errors = [np.std(x, ddof=1) / math.sqrt(len(x)) for x in (a, b)]
        assert measure.error == pytest.approx(math.hypot(*errors) / 2, abs=5e-5)
    assert found.ece.value == pytest.approx((ece1 + ece2) / 2, abs=5e-5)


def test_the_error_of_the_calibration_error_is_that_of_a_bootstrap():
    """Where bins are far from calibrated; 400 resamples tell a standard error to 1/sqrt(800), 4 %: three times that."""
    draws = np.random.default_rng(3)
    confidence = torch.from_numpy(draws.uniform(0.5, 1, 2000))
    correct = torch.from_numpy((draws.uniform(size=2000) < 0.3).astype(float))
    terms = calibration_terms(confidence, correct)
    resampled = []
    for _ in range(400):
        rows = torch.from_numpy(draws.integers(2000, size=2000))
        resampled.append(calibration_terms(confidence[rows], correct[rows]).mean().item())
    assert terms.std().item() / math.sqrt(2000) == pytest.approx(np.std(resampled), rel=0.12)


def test_a_model_that_is_right_as_often_as_it_says_has_little_error():
    draws = np.random.default_rng(4)
    confidence = torch.from_numpy(draws.uniform(0.4, 1, 20_000))
    honest = torch.from_numpy((draws.uniform(size=20_000) < confidence.numpy()).astype(float))
    assert calibration_terms(confidence, honest).mean() < 0.015  # fifteen bins, each within sqrt(0.25 / 1300) = 0.014
    assert calibration_terms(confidence, torch.zeros(20_000)).mean() == pytest.approx(0.7, abs=0.01)


def test_texts_whose_probabilities_underflow_have_a_log_loss():
    """Long choices differ by thousands of nats, of which no double holds the probability."""
    item = Item("quiz", "test", 1, Question("q", "", ("short", "long"), "long", "question"))
    found = calibrate([item], {item: Answer("short", log_probs=(-10.0, -2010.0))})
    assert found.nll.value == 2000
    assert (found.brier.value, found.ece.value) == (2, 1)


def test_questions_without_probabilities_are_left_out():
    answers = answered(10, "quiz", 5)
    long = Item("quiz", "test", 99, Question("q", "", LABELS, "a"))
    with_long = answers | {long: Answer(None, too_long=True)}
    assert calibrate([*with_long], with_long) == calibrate([*answers], answers)
    assert calibrate([long], with_long) is None
