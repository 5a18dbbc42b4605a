"""Environment variables set by users, launchers and accelerate. Each is read when it is needed."""

import os
from collections.abc import Callable
from typing import TypeVar

from poc_lora.errors import RequestError

TRUE = ("1", "true", "t", "yes", "y", "on")  # as accelerate reads them
FALSE = ("", "0", "false", "f", "no", "n", "off")
MOST_SECONDS = 1e9  # thirty years: below the limits of timeouts

T = TypeVar("T")


def whole_number(name: str, default: int | None = None, *, least: int = 0) -> int:
    """Read an integer of at least `least`. Raises RequestError, also if it is unset without a default."""
    return _read(name, default, _at_least(least), f"a whole number of at least {least}")


def seconds(name: str, default: float) -> float:
    """Read a positive number of seconds. Raises RequestError."""
    return _read(name, default, _duration, "a number of seconds above 0, such as 1800")


def flag(name: str) -> bool:
    """Read a switch; False if unset. Raises RequestError."""
    return _read(name, False, _switch, "1 or 0, true or false")


def one_of(name: str, choices: tuple[str, ...], default: str) -> str:
    """Read one of some words, ignoring case. Raises RequestError."""
    return _read(name, default, lambda text: choices[choices.index(text.lower())], " or ".join(choices))


def _read(name: str, default: T | None, parse: Callable[[str], T], form: str) -> T:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None:
        raise RequestError(f"the environment variable {name} is not set", where=name, fix=f"set {name} to {form}")
    try:
        return parse(text.strip())
    except ValueError as problem:
        raise RequestError(
            f"the environment variable {name} is {text!r}, not {form}",
            where=name,
            fix=f"set {name} to {form}, or unset it",
        ) from problem


def _at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        number = int(text)
        if number < least:
            raise ValueError(f"below {least}")
        return number

    return parse


def _duration(text: str) -> float:
    number = float(text)
    if not 0 < number <= MOST_SECONDS:  # NaN is refused here too
        raise ValueError(f"not between 0 and {MOST_SECONDS:g}")
    return number


def _switch(text: str) -> bool:
    if text.lower() not in TRUE + FALSE:
        raise ValueError("neither on nor off")
    return text.lower() in TRUE
