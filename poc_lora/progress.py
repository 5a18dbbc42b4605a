"""One progress bar on a terminal, plain lines elsewhere."""

import contextlib
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Protocol

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from poc_lora.errors import visible

SECONDS_BETWEEN_LINES = 10.0


class ProgressBar(Protocol):
    """What a `progress_bar` block yields."""

    def advance(self, n: int = 1, note: str = "") -> None:
        """Count `n` more units of work done; `note` is shown below the bar."""

    def report(self, note: str) -> None:
        """Show `note` while work is done that does not count."""


@contextlib.contextmanager
def progress_bar(total: int, title: str, *, done: int = 0, hidden: bool = False) -> Iterator[ProgressBar]:
    """Show the progress of `total` units of work, `done` of them done before the block; nothing if `hidden`."""
    if hidden:
        yield _Nothing()
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(total, title, done)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with _NotesBelow(*columns, console=console) as progress:
        yield _Bar(progress, progress.add_task(title, total=total, completed=done, note=""))


class _NotesBelow(Progress):
    """Shows notes below the bar: beside it, a long one would take the place of the time left in 80 columns."""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield from (Text(task.fields["note"]) for task in self.tasks if task.fields["note"])


class _Nothing:
    def advance(self, n: int = 1, note: str = "") -> None:
        pass

    def report(self, note: str) -> None:
        pass


class _Bar:
    def __init__(self, progress: Progress, task: object):
        self.progress, self.task = progress, task

    def advance(self, n: int = 1, note: str = "") -> None:
        self.progress.update(self.task, advance=n, note=visible(note))  # type: ignore[arg-type]

    def report(self, note: str) -> None:
        self.advance(0, note)


class _Lines:
    def __init__(self, total: int, title: str, done: int):
        self.total, self.title, self.done = total, title, done
        self.before = done
        self.start = self.last = time.monotonic()

    def advance(self, n: int = 1, note: str = "") -> None:
        self.done += n
        if self.done >= self.total or self._due():
            parts = [f"{self.done}/{self.total}", note]
            if self.before < self.done < self.total:
                left = (time.monotonic() - self.start) / (self.done - self.before) * (self.total - self.done)
                parts.append(f"{timedelta(seconds=round(left))} left")
            self._print(*parts)

    def report(self, note: str) -> None:
        if self._due():
            self._print(f"{self.done}/{self.total}", note)

    def _due(self) -> bool:
        return time.monotonic() - self.last >= SECONDS_BETWEEN_LINES

    def _print(self, *parts: str) -> None:
        self.last = time.monotonic()
        with contextlib.suppress(OSError, ValueError):  # a full disk or a closed terminal does not stop the work
            print(self.title, visible(", ".join(filter(None, parts))), file=sys.stderr, flush=True)  # noqa: T201
