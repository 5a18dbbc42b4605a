"""Progress without a terminal: a plain line now and then, with the time left."""

import pytest

from poc_lora import progress
from poc_lora.progress import progress_bar


@pytest.fixture
def clock(monkeypatch):
    """A clock to be set by hand, in seconds."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_tells_what_is_done_and_the_time_left(clock, capsys):
    with progress_bar(20, "training") as bar:
        clock[0] += 9
        bar.advance(2, "fast")  # too soon for a line
        assert capsys.readouterr().err == ""
        clock[0] += 11
        bar.advance(3, "loss 2.5")
        assert capsys.readouterr().err == "training 5/20, loss 2.5, 0:01:00 left\n"  # 20 s for 5, so 60 for 15
        clock[0] += 3600
        bar.advance(5)
        assert capsys.readouterr().err == "training 10/20, 1:00:20 left\n"
        bar.advance(10, "loss 0.5")
        assert capsys.readouterr().err == "training 20/20, loss 0.5\n"


def test_what_was_done_before_does_not_count_as_speed(clock, capsys):
    with progress_bar(100, "training", done=90) as bar:
        clock[0] += 20
        bar.advance(5)
    assert capsys.readouterr().err == "training 95/100, 0:00:20 left\n"


@pytest.mark.parametrize("done", [0, 90])
def test_nothing_done_yet_tells_no_nonsense(clock, capsys, done):
    with progress_bar(100, "training", done=done) as bar:
        clock[0] += 20
        bar.advance(0, "waiting")
    assert capsys.readouterr().err == f"training {done}/100, waiting\n"
