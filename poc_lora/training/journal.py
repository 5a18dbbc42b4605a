"""What a run writes down while it trains: metrics.jsonl, and the same to the trackers."""

from collections.abc import Mapping
from typing import Any

from poc_lora.training.run import Run
from poc_lora.training.step import Pack, Step
from poc_lora.training.trackers import Trackers

LOGGED_STEPS = 1000  # metrics.jsonl holds about so many steps of a run at most


class Journal:
    """Turns what happened into metric lines: one per step and adapter.

    Rank 0 writes its own lines at once, and those of the others as they come with a commit.
    """

    def __init__(self, run: Run, trackers: Trackers, rank: int = 0):
        self.run = run
        self._trackers, self._rank = trackers, rank
        self._unsent: list[tuple[list[int], list[dict[str, Any]]]] = []

    def step(self, pack: Pack, result: Step, step: int) -> None:
        """Write down an optimizer step, or only that an adapter diverged where steps are many."""
        adapters = pack.bank.adapters
        lines: list[dict[str, Any]] = [
            {"step": step, "adapter": adapters[slot], "diverged": True} for slot in result.diverged
        ]
        if step % max(1, pack.data.total_steps // LOGGED_STEPS) == 0 or step == pack.data.total_steps:
            lines += [
                {
                    "step": step,
                    "adapter": adapters[slot],
                    "loss": result.losses[slot],
                    "grad_norm": result.grad_norms[slot],
                    "noise_norm": result.noise_norms[slot],
                    "lr": result.lr,
                }
                for slot in pack.live
            ]
        self._write(pack, lines)

    def validation(self, pack: Pack, step: int, measures: Mapping[int | str, dict[str, Any]]) -> None:
        """Write down what `validate` measured."""
        members = [pack.bank.adapters[slot] for slot in pack.live]  # of the merge; others may train in other packs
        lines = [{"step": step, "adapter": name, **measured, "members": members} for name, measured in measures.items()]
        self._write(pack, lines)

    def _write(self, pack: Pack, lines: list[dict[str, Any]]) -> None:
        if self._rank == 0:
            self._put_down(pack.bank.adapters, lines)
        else:
            self._unsent.append((pack.bank.adapters, lines))

    def send(self) -> list[tuple[list[int], list[dict[str, Any]]]]:
        """What this rank has for rank 0 to write, each time once."""
        unsent, self._unsent = self._unsent, []
        return unsent

    def receive(self, sent: list[tuple[list[int], list[dict[str, Any]]]]) -> None:
        """Write down what another rank sent."""
        for adapters, lines in sent:
            self._put_down(adapters, lines)

    def _put_down(self, adapters: list[int], lines: list[dict[str, Any]]) -> None:
        self.run.log(lines)
        self._trackers.log(lines, adapters)
