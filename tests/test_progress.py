"""Progress: a bar with the time left on a terminal; without one a plain line now and then."""

import io
import re

import pytest
from rich.console import Console

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


NOTE = "loss 0.313 (0.131 to 0.625), held out 1.294 to 1.305, merge 1.422, 8,840 tokens/s"


def test_in_80_columns_a_long_note_leaves_the_time_left_to_be_seen(monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=80)
    monkeypatch.setattr(progress, "Console", lambda **_: console)
    with progress_bar(150, "training 8 adapters, 8 on other ranks") as bar:
        bar.advance(1)
        bar.advance(29, NOTE)
    plain = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", console.file.getvalue())
    lines = [line.strip() for line in plain.splitlines()[-3:]]
    assert re.fullmatch(r"training 8 adapters, 8 on other ranks \S+ +30/150 [\d:-]+", lines[0])
    assert " ".join(lines[1:]) == NOTE
