"""One rank's share of a run, from its first step to the last commit."""

import contextlib
import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from poc_lora.config import RunConfig
from poc_lora.distributed import Ranks
from poc_lora.envvars import whole_number
from poc_lora.errors import Interrupted
from poc_lora.progress import Tracker, track
from poc_lora.training.checkpoint import Commits, Placement, Progress, parsed, plain
from poc_lora.training.journal import Journal
from poc_lora.training.run import Run
from poc_lora.training.step import Pack, Step
from poc_lora.training.validation import validate

LAUNCHER_PATIENCE = 30  # seconds that torchelastic gives its processes after SIGTERM, unless told otherwise


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
    commit_seconds: float = 0.0  # in which training stood still for a commit
    peak_bytes: int = 0  # of one device's memory; on the CPU, of a whole process
    tells: bool = True  # whether this is the process, of several, that speaks for them all


class Worker:
    """One rank's share of a run: its packs, one after another, with a commit by all ranks every so many steps."""

    def __init__(
        self,
        config: RunConfig,
        ranks: Ranks,
        run: Run,
        journal: Journal,
        commits: Commits,
        placement: Placement,
        done: Trained,
    ):
        self.config, self.ranks, self.run, self.journal, self.commits = config, ranks, run, journal, commits
        self.placement, self.done = placement, done
        self.sharded = config.model.shard and ranks.size > 1
        self.own = placement.of(ranks.rank)
        self._packs: list[tuple[list[int], int]] = []  # and the step that each starts from
        for packs in placement.rounds:
            # It holds a part of a sharded base: with nothing to do it runs along with another rank.
            adapters = packs[ranks.rank] or (next(filter(None, packs)) if self.sharded else [])
            if adapters:
                states = [done.progress[a] for a in adapters]
                self._packs.append((adapters, max(s.step for s in states if s.status == "training")))
        self._since_commit = 0  # steps
        self._warned = False

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
            if start > 0:
                self.commits.restore(self.done.progress, pack.bank, pack.optimizer)
            self._train(pack, start, bar)
            pack.close()
        while self._left():
            self._commit(None)
        self.commits.wait()
        self.done.commit_seconds = self.commits.seconds

    def _train(self, pack: Pack, start: int, bar: Tracker) -> None:
        """Train one pack from step `start` to the end, committing on the way; then write and validate its adapters."""
        config, done = self.config, self.done
        ours = pack if pack.bank.adapters[0] in self.own else None
        if start < done.steps:
            self._validate_if_due(pack, start, ours, bar)
        for step in range(start, done.steps):
            self.ranks.beat(f"at step {step + 1} of {done.steps}")
            self.commits.check()
            began = time.perf_counter()
            result = pack.step(step, self.ranks.stop.is_set)
            done.seconds += time.perf_counter() - began
            if result is None:
                self._commit(ours)
                return  # not reached: some rank was asked to stop, so the commit ends in Interrupted
            self._since_commit += 1
            if ours:
                self._note(pack, result, step + 1)
            if not pack.live and not self.sharded:
                bar.advance(done.steps - step, "every adapter diverged")
                self._commit(ours)
                return
            bar.advance(1, f"{_spread(pack, result)}{done.real_tokens / done.seconds:,.0f} tokens/s")
            if step + 1 < done.steps:
                self._validate_if_due(pack, step + 1, ours, bar)
                if self._since_commit >= config.checkpoint.every_steps:
                    self._commit(ours)
        # What is trained is saved before anything else happens: validation may take longer than the training did.
        if ours:
            self._write_adapters(pack)
        self._commit(ours)
        self._validate(pack, done.steps, ours, bar)
        if ours:
            done.progress |= {a: replace(done.progress[a], status="finished") for a in self._live(pack)}
        self._commit(ours)

    def _note(self, pack: Pack, result: Step, step: int) -> None:
        """Write down what an optimizer step did."""
        done, adapters = self.done, pack.bank.adapters
        done.real_tokens += result.real_tokens
        done.computed_tokens += result.computed_tokens
        done.progress |= {a: replace(done.progress[a], step=step) for a in self._live(pack)}
        diverged = [adapters[slot] for slot in result.diverged]
        done.progress |= {a: replace(done.progress[a], step=step, status="diverged") for a in diverged}
        self.journal.step(pack, result, step)

    def _validate_if_due(self, pack: Pack, step: int, ours: Pack | None, bar: Tracker) -> None:
        """Validate on the way, unless that was done before the run was interrupted; what is trained is saved first."""
        every = self.config.train.validate_every
        if not every or step % every:
            return
        if self._since_commit:
            self._commit(ours)
        self._validate(pack, step, ours, bar)

    def _validate(self, pack: Pack, step: int, ours: Pack | None, bar: Tracker) -> None:
        """Validate and write it down, unless that was done before. Raises Interrupted when asked to stop."""
        due = any(self.done.progress[a].validated < step for a in self._live(pack))
        if not (any(pack.largest([due])) if pack.largest else due):
            return

        def stop() -> bool:
            self.ranks.beat(f"validating after step {step}")
            return self.ranks.stop.is_set()

        measures = validate(pack, stop=stop, tell=bar.tell)
        if measures is None:
            self._commit(ours)
        elif ours and pack.live:
            self.journal.validation(pack, step, measures)
            self.done.progress |= {a: replace(self.done.progress[a], validated=step) for a in self._live(pack)}

    def _live(self, pack: Pack) -> list[int]:
        return [pack.bank.adapters[slot] for slot in pack.live]

    def _write_adapters(self, pack: Pack) -> None:
        section = self.config.model
        for slot in pack.live:
            done = pack.bank.adapter(slot, base_model=section.name, revision=section.revision, task_type="CAUSAL_LM")
            self.run.write_adapter(pack.bank.adapters[slot], done)

    def _left(self) -> bool:
        """Whether any rank had work left at the last commit."""
        return any(state.status == "training" for state in self.done.progress.values())

    def _commit(self, ours: Pack | None) -> None:
        """Begin a commit with all ranks. Raises Interrupted, once it stands, if one of them was asked to stop."""
        done = self.done
        self.commits.check()
        reports = self.ranks.gather(
            {
                "adapters": plain(done.progress, self.own),
                "stop": self.ranks.stop.is_set(),
                "lines": self.journal.send(),
            }
        )
        for report in reports:
            done.progress |= parsed(report["adapters"])
        if self.ranks.rank == 0:
            for report in reports:
                self.journal.receive(report["lines"])
            self.run.settle()
        self.commits.start(done.progress, ours.bank if ours else None, ours.optimizer if ours else None)
        self._since_commit = 0
        self._warn_of_the_launcher()
        if self._left() and any(report["stop"] for report in reports):
            self.commits.wait()
            raise self.ranks.jointly(self._interrupted())

    def _interrupted(self) -> Interrupted:
        done = self.done
        step = min(state.step for state in done.progress.values() if state.status == "training")
        launcher = "poc-lora" if self.ranks.size == 1 else "accelerate launch ... -m poc_lora"
        return Interrupted(
            f"stopped after step {step} of {done.steps}; everything up to it is saved"
            + (": only the validation at the end is left" if step == done.steps else ""),
            where=done.folder,
            fix=f"go on with: {launcher} train {shlex.quote(str(done.folder / 'config.yaml'))} --resume",
        )

    def _warn_of_the_launcher(self) -> None:
        """Say it once, where a launcher would kill this process before a commit could be written."""
        if self._warned or "TORCHELASTIC_RUN_ID" not in os.environ:
            return
        patience = whole_number("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", LAUNCHER_PATIENCE)
        if self.commits.slowest < patience:
            return
        self._warned = True
        print(  # noqa: T201
            f"a commit takes {self.commits.slowest:.0f} s to write, but the launcher kills {patience} s after SIGTERM:"
            " what was trained since the commit before would be lost (fix: with torch 2.13 or later set"
            f" TORCH_ELASTIC_SHUTDOWN_TIMEOUT={2 * round(self.commits.slowest)}, or lower checkpoint.every_steps)",
            file=sys.stderr,
        )


def _spread(pack: Pack, result: Step) -> str:
    losses = [result.losses[slot] for slot in pack.live]
    return f"loss {sum(losses) / len(losses):.3f} ({min(losses):.3f} to {max(losses):.3f}), " if losses else ""
