import pytest

from poc_lora.errors import (
    AdapterError,
    ConfigError,
    DataError,
    ModelError,
    RequestError,
    RunError,
    TrainingError,
    first_line,
)


def test_what_a_file_says_can_neither_drive_a_terminal_nor_fill_it():
    problem = AdapterError("a \x1b[2J \ud800 ü " + "x" * 10_000, where="a\rb", fix="first\nsecond")
    text = str(problem)
    assert text.startswith("a \\x1b[2J \\ud800 ü x")
    assert "a\\rb" in text
    assert text.endswith("first\nsecond")
    assert 2000 < len(text) < 2200


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
