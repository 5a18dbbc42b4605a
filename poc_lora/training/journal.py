"""What a run writes down while it trains: metrics.jsonl, and the same to the trackers."""

from typing import Any

from poc_lora.training.pack import Pack, Step
from poc_lora.training.run import Run
from poc_lora.training.trackers import Trackers
from poc_lora.training.validation import validate

LOGGED_STEPS = 1000  # metrics.jsonl holds about so many steps of a run at most


class Journal:
    """Turns what happened into metric lines: one per step and adapter."""

    def __init__(self, run: Run, trackers: Trackers):
        self.run = run
        self._trackers = trackers

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

    def validation(self, pack: Pack, step: int) -> None:
        """Measure the base, each adapter and the running merge, and write it down."""
        members = [pack.bank.adapters[slot] for slot in pack.live]  # of the merge; others may train in other packs
        lines = [
            {"step": step, "adapter": name, **measures, "members": members} for name, measures in validate(pack).items()
        ]
        self._write(pack, lines)

    def _write(self, pack: Pack, lines: list[dict[str, Any]]) -> None:
        self.run.log(lines)
        self._trackers.log(lines, pack.bank.adapters)
