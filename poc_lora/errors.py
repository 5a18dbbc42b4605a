"""Every error a user can meet. Each says what is wrong, where, and how to fix it.

The command line prints them without a traceback and exits with `exit_status`: 2 for a request that cannot be carried
out as written, 1 for a run that failed on the way.
"""

from pathlib import Path

MAX_SHOWN = 2000


class PocLoraError(Exception):
    """Base class of all errors raised on purpose.

    Args:
        what: one sentence naming the problem.
        where: the file, key or adapter concerned.
        fix: what to do about it.

    Attributes:
        exit_status: of the command line.
        reported_elsewhere: True where another process of the run prints this error, so that it is printed once.
    """

    exit_status = 1
    reported_elsewhere = False

    def __init__(self, what: str, *, where: str | Path | None = None, fix: str | None = None):
        self.what = _shown(what)
        self.where = None if where is None else _shown(str(where))
        self.fix = fix
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if fix:
            lines.append(f"  fix:   {fix}")
        super().__init__("\n".join(lines))


def _shown(text: str) -> str:
    return printable(text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "...")


def printable(text: str) -> str:
    """Escape control characters, so that a text that may quote a file is safe to show on a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def first_line(problem: BaseException) -> str:
    """The first line of an exception's message, or its repr if it has no message."""
    return (str(problem).strip() or repr(problem)).split("\n")[0]


class RequestError(PocLoraError, ValueError):
    """The request itself is wrong; nothing was done. Also a ValueError, as PyTorch raises for a bad argument."""

    exit_status = 2


class ConfigError(RequestError):
    """A configuration file, override or optimizer setting that is not valid."""


class DataError(RequestError):
    """Training or benchmark rows that cannot be read or used."""


class ModelError(RequestError):
    """A base model that cannot be loaded or lacks what the run needs."""


class AdapterError(RequestError):
    """An adapter on disk that is damaged, unsafe, or of a kind that is not supported."""


class RunError(RequestError):
    """A run folder that cannot be used as asked."""


class CheckpointError(PocLoraError):
    """A checkpoint that is missing, damaged, or of another run."""


class TrainingError(PocLoraError):
    """Training could not continue, for example because every adapter diverged."""


class HubError(PocLoraError):
    """The Hub could not be reached or refused an upload. The repository has all of the upload or is unchanged."""


class PeerError(PocLoraError):
    """Another rank of the run failed, died or hangs."""

    def __init__(self, what: str, *, where: str | Path | None = None, fix: str | None = None, exit_status: int = 1):
        super().__init__(what, where=where, fix=fix)
        self.exit_status = exit_status


class Interrupted(PocLoraError):
    """Stopped by Ctrl-C or SIGTERM after the state was saved."""

    exit_status = 130
