"""Every error a user can meet. Each says what is wrong, where, and how to fix it.

The command line prints them without a traceback and exits with `exit_status`: 2 for a request that cannot be carried
out as written, 1 for a run that failed on the way.
"""

import errno
import os
import re
from collections.abc import Sequence
from pathlib import Path

MAX_SHOWN = 2000
MAX_DETAILS = 20
_MAKE_ROOM = "make room on that disk, or name a folder on another one"
_PERMISSIONS = "check the permissions of it and of the folders above it, or name another one"
_DISK = "check the disk"
SYSTEM_FIXES = {
    errno.ENOSPC: _MAKE_ROOM,
    errno.EDQUOT: _MAKE_ROOM,
    errno.EFBIG: "name a folder on a disk that takes files of this size, and check ulimit -f",
    errno.EROFS: "name a folder on a disk that can be written to",
    errno.EACCES: _PERMISSIONS,
    errno.EPERM: _PERMISSIONS,
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ENOENT: "check that it was not removed, nor a folder above it",
    errno.ENOTDIR: "a part of the path is a file: name a folder",
    errno.EISDIR: "name a file",
    errno.ELOOP: "a link in the path leads back to itself: name the folder itself",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close other programs, which have too many open files",
    errno.EIO: _DISK,
    errno.ESTALE: _DISK,
}


class PocLoraError(Exception):
    """Base class of all errors raised on purpose.

    Texts that come from a file may stand in all arguments: control characters are escaped, line breaks too, so that no
    text can pass for another line of the message.

    Args:
        what: one sentence naming the problem.
        details: more about it, each on a line of its own; the first are shown, the others counted.
        where: the file, key or adapter concerned.
        fix: what to do about it.

    Attributes:
        exit_status: of the command line.
        reported_elsewhere: True where another process of the run prints this error, so that it is printed once.
    """

    exit_status = 1
    reported_elsewhere = False

    def __init__(
        self, what: str, *, details: Sequence[str] = (), where: str | Path | None = None, fix: str | None = None
    ):
        self.what = _shown(what)
        self.where = None if where is None else _shown(str(where))
        self.fix = None if fix is None else _shown(fix)
        lines = [self.what, *(f"  - {_shown(line)}" for line in details[:MAX_DETAILS])]
        if len(details) > MAX_DETAILS:
            lines.append(f"  - and {len(details) - MAX_DETAILS:,} more")
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  fix:   {self.fix}")
        super().__init__("\n".join(lines))


def _shown(text: str) -> str:
    return visible(text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "...")


def visible(text: str) -> str:
    """Replace characters that cannot be seen, such as control characters and direction marks, by their escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def first_line(problem: BaseException) -> str:
    """The first line of an exception's message, or its repr if it has no message."""
    return (str(problem).strip() or repr(problem)).split("\n")[0]


def system_problem(problem: Exception) -> tuple[str, str | None]:
    """Returns what an OSError, or what safetensors makes of one, means in words, and what to do about it if known."""
    number = problem.errno if isinstance(problem, OSError) else None
    if number is None and (found := re.search(r"\(os error (\d+)\)", str(problem))):
        number = int(found[1])
    return first_line(problem) if number is None else os.strerror(number), SYSTEM_FIXES.get(number or 0)


class WriteError(PocLoraError, OSError):
    """A file or folder that could not be written, such as on a full disk. Also an OSError, as Python raises."""


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
    """Another rank of the run failed, died or hangs. `what` may hold all lines of its error."""

    def __init__(self, what: str, *, fix: str | None = None, exit_status: int = 1):
        first, *rest = what.split("\n")
        super().__init__(first, details=[line.strip().removeprefix("- ") for line in rest], fix=fix)
        self.exit_status = exit_status


class Interrupted(PocLoraError):
    """Stopped by Ctrl-C or SIGTERM, with everything saved or nothing changed."""

    exit_status = 130
