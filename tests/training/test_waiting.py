"""Adapters that had begun and now wait for their turn, while others train and commit: none of their steps is lost."""

import os
import signal
from contextlib import contextmanager

import pytest
import torch

from poc_lora.errors import Interrupted
from poc_lora.training.step import Pack
from poc_lora.training.train import train
from tests.launch import finish
from tests.training.conftest import config, metrics, weights
from tests.training.test_many_ranks import launch_stopping

STEPS = 12


@contextmanager
def stopped_at(call):
    """Within the block the process is asked to stop, as by SIGTERM, when it comes to its optimizer step `call`."""
    with pytest.MonkeyPatch.context() as patch:
        original, calls = Pack.step, []

        def step(self, number, *rest):
            calls.append(number)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(self, number, *rest)

        patch.setattr(Pack, "step", step)
        with pytest.raises(Interrupted):
            yield


@pytest.fixture
def four(settings, tmp_path):
    """Settings of four adapters, and the folder where a run trained them straight through."""
    settings["adapters"]["count"] = 4
    settings["train"]["max_steps"] = STEPS
    return settings, train(config(settings, output=str(tmp_path / "straight"))).folder


def assert_as_trained_straight(straight, resumed):
    drawn = [
        {(e["step"], e["adapter"]): e["noise_norm"] for e in metrics(f) if "loss" in e} for f in (straight, resumed)
    ]
    assert drawn[0] == drawn[1]
    assert len([e for e in metrics(resumed) if "loss" in e]) == 4 * STEPS
    for adapter in range(4):
        a, b = weights(straight, adapter), weights(resumed, adapter)
        assert a.keys() == b.keys()
        for name in a:  # packs of other sizes round differently, and Adam divides by small moments
            torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("again", [None, 5, 10], ids=["once", "again in the first pack", "again in the second pack"])
def test_adapters_begun_together_go_on_in_smaller_packs(four, keep, again):
    settings, straight = four
    with stopped_at(6):
        train(config(settings, checkpoint__keep=keep))
    smaller = config(settings, checkpoint__keep=keep, adapters__per_device=2)
    if again:
        with stopped_at(again):
            train(smaller, resume=True)
    done = train(smaller, resume=True)
    assert_as_trained_straight(straight, done.folder)


@pytest.mark.slow
def test_adapters_of_two_ranks_go_on_in_turns_on_one(four, tmp_path):
    settings, straight = four
    with launch_stopping(2, config(settings), tmp_path / "run.yaml", after=5) as ranks:
        ended = finish(ranks)
    assert [status for status, _, _ in ended] == [130, 130], [errors for _, _, errors in ended]
    for _ in range(2):
        with stopped_at(5):
            train(config(settings), resume=True)
    done = train(config(settings), resume=True)
    assert_as_trained_straight(straight, done.folder)
