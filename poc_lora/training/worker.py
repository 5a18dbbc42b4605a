"""One rank's share of a run, from its first step to the last commit."""

import contextlib
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poc_lora.config import RunConfig
from poc_lora.errors import Interrupted
from poc_lora.progress import Tracker, track
from poc_lora.ranks import Ranks
from poc_lora.training.checkpoint import Commits, Placement, Progress, restore
from poc_lora.training.journal import Journal
from poc_lora.training.pack import Pack, Step
from poc_lora.training.run import Run
from poc_lora.training.validation import validate


@dataclass
class Trained:
    """What a call of `train` did; the figures are those of all ranks together."""

    folder: Path
    progress: dict[int, Progress]
    steps: int
    shortened: int  # rows cut to max_length
    lost: int  # rows left out because the cut took their whole answer
    real_tokens: int = 0  # over all adapters
    computed_tokens: int = 0  # the same with padding
    seconds: float = 0.0  # in optimizer steps, on the rank that took longest
    peak_bytes: int = 0  # of one device's memory; on the CPU, of a whole process
    tells: bool = True  # whether this is the process, of several, that speaks for them all


class Worker:
    """One rank's share of a run: its packs, one after another, with a commit by all ranks every so many steps."""

    def __init__(
        self, config: RunConfig, ranks: Ranks, run: Run, journal: Journal, placement: Placement, done: Trained
    ):
        self.config, self.ranks, self.run, self.journal = config, ranks, run, journal
        self.placement, self.done = placement, done
        self.sharded = config.model.shard and ranks.size > 1
        self.commits = Commits(run.checkpoints, ranks, keep=config.checkpoint.keep)
        self.own = [a for packs in placement.rounds for a in packs[ranks.rank]]
        self._packs: list[tuple[list[int], int]] = []  # and the step that each starts from
        for packs in placement.rounds:
            # It holds a part of a sharded base: with nothing to do it runs along with another rank.
            adapters = packs[ranks.rank] or (next(filter(None, packs)) if self.sharded else [])
            if adapters:
                states = [done.progress[a] for a in adapters]
                self._packs.append((adapters, max(s.step for s in states if s.status == "training")))
        self._taken = 0

    def progress_bar(self) -> contextlib.AbstractContextManager[Tracker]:
        """Of rank 0, which stands for all."""
        others = sum(len(pack) for packs in self.placement.rounds for pack in packs) - len(self.own)
        title = f"training {len(self.own)} adapters" + (f", {others} on other ranks" if others else "")
        before = sum(start for _, start in self._packs)
        return track(self.done.steps * len(self._packs), title, done=before, hidden=self.ranks.rank > 0)

    def work(self, make_pack: Callable[[list[int]], Pack], bar: Tracker) -> None:
        """Train all packs of this rank, then stay for the commits of the others until they are through as well."""
        for adapters, start in self._packs:
            self.ranks.beat(f"preparing adapters {adapters}")
            pack = make_pack(adapters)
            if self.run.commit is not None and start > 0:
                restore(self.run.commit, pack.bank, pack.optimizer)
            self._train(pack, start, bar)
            pack.close()
        while any(self._commit(None)):
            pass

    def _train(self, pack: Pack, start: int, bar: Tracker) -> None:
        """Train one pack from step `start` to the end, committing on the way, and write its adapters."""
        config, bank, done = self.config, pack.bank, self.done
        ours = bank.adapters[0] in self.own
        for step in range(start, done.steps):
            self.ranks.beat(f"at step {step + 1} of {done.steps}")
            began = time.perf_counter()
            result = pack.step(step, self.ranks.stop.is_set)
            done.seconds += time.perf_counter() - began
            if result is None:
                self._commit(pack if ours else None)
                return  # not reached: some rank was asked to stop, so the commit ends in Interrupted
            self._taken += 1
            if ours:
                self._note(pack, result, step + 1)
            if not pack.live and not self.sharded:
                bar.advance(done.steps - step, "every adapter diverged")
                break
            bar.advance(1, f"{_spread(pack, result)}{done.real_tokens / done.seconds:,.0f} tokens/s")
            if step + 1 == done.steps:
                break
            if config.train.validate_every and (step + 1) % config.train.validate_every == 0:
                self._validate(pack, step + 1, ours)
            if self._taken % config.checkpoint.every_steps == 0:
                self._commit(pack if ours else None)
        if pack.live or self.sharded:
            self._validate(pack, done.steps, ours)
        if ours:
            self._write_adapters(pack)

    def _note(self, pack: Pack, result: Step, step: int) -> None:
        """Write down what an optimizer step did."""
        done, adapters = self.done, pack.bank.adapters
        done.real_tokens += result.real_tokens
        done.computed_tokens += result.computed_tokens
        done.progress |= {adapters[slot]: Progress(step) for slot in pack.live}
        done.progress |= {adapters[slot]: Progress(step, "diverged") for slot in result.diverged}
        self.journal.step(pack, result, step)

    def _validate(self, pack: Pack, step: int, ours: bool) -> None:
        self.ranks.beat(f"validating after step {step}")
        measures = validate(pack)
        if ours and pack.live:
            self.journal.validation(pack, step, measures)

    def _write_adapters(self, pack: Pack) -> None:
        section = self.config.model
        for slot in pack.live:
            number = pack.bank.adapters[slot]
            done = pack.bank.adapter(slot, base_model=section.name, revision=section.revision, task_type="CAUSAL_LM")
            self.run.write_adapter(number, done)
            self.done.progress[number] = Progress(self.done.steps, "finished")

    def _commit(self, pack: Pack | None) -> list[bool]:
        """Commit with all ranks; returns which of them have work left. Raises Interrupted if one was asked to stop."""
        done = self.done
        messages = self.commits.save(
            self.placement,
            done.progress,
            pack.bank if pack else None,
            pack.optimizer if pack else None,
            message={
                "left": any(done.progress[a].status == "training" for a in self.own),
                "stop": self.ranks.stop.is_set(),
                "lines": self.journal.send(),
            },
            receive=self._receive,
        )
        left = [message["left"] for message in messages]
        if any(left) and any(message["stop"] for message in messages):
            step = min(state.step for state in done.progress.values() if state.status == "training")
            launcher = "poc-lora" if self.ranks.size == 1 else "accelerate launch ... -m poc_lora"
            problem = Interrupted(
                f"stopped after step {step} of {done.steps}; everything up to it is saved",
                where=done.folder,
                fix=f"go on with: {launcher} train {shlex.quote(str(done.folder / 'config.yaml'))} --resume",
            )
            raise self.ranks.jointly(problem)
        return left

    def _receive(self, messages: list[Any]) -> None:
        for message in messages:
            self.journal.receive(message["lines"])
        self.run.settle()


def _spread(pack: Pack, result: Step) -> str:
    losses = [result.losses[slot] for slot in pack.live]
    return f"loss {sum(losses) / len(losses):.3f} ({min(losses):.3f} to {max(losses):.3f}), " if losses else ""
