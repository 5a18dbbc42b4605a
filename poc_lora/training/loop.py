"""The training loop: the packs of one rank, one after another; their steps, commits and validation."""

import math
import os
import shlex
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from poc_lora.config import RunConfig
from poc_lora.distributed import Ranks
from poc_lora.envvars import whole_number
from poc_lora.errors import Interrupted
from poc_lora.models.sharding import all_reduce_max
from poc_lora.progress import ProgressBar, progress_bar
from poc_lora.training.checkpoint import Commits
from poc_lora.training.data import TrainingData
from poc_lora.training.memory import Sizes
from poc_lora.training.metrics import MetricsLogger
from poc_lora.training.placement import Placement, Progress
from poc_lora.training.run import Run
from poc_lora.training.step import Pack, StepResult
from poc_lora.training.validation import validate

SHUTDOWN_SECONDS = 30  # that torchelastic waits after SIGTERM before it kills, unless it is configured otherwise


@dataclass
class TrainingResult:
    """What a call of `train` did; the totals are over all ranks.

    Attributes:
        folder: The run folder.
        progress: Step and status of every adapter.
        steps: Optimizer steps of the whole run.
        truncated: Rows that were cut to `data.max_length`.
        dropped: Rows that were left out because the cut took their whole answer.
        skipped: Rows that were left out because they could not be used, under `data.skip_bad_rows`.
        tokens: Tokens trained on in this call, over all adapters.
        padded_tokens: The same with padding.
        seconds: Time in optimizer steps, on the slowest rank.
        commit_seconds: Time that training waited for commits, on the slowest rank.
        peak_bytes: Peak memory of one device; on the CPU, of one process.
        is_rank_0: Whether this process is rank 0, which reports the result.
    """

    folder: Path
    progress: dict[int, Progress]
    steps: int
    truncated: int
    dropped: int
    skipped: int
    tokens: int = 0
    padded_tokens: int = 0
    seconds: float = 0.0
    commit_seconds: float = 0.0
    peak_bytes: int = 0
    is_rank_0: bool = True


@dataclass
class TrainingLoop:
    """Trains one rank's share of a run: its packs, one after another."""

    config: RunConfig
    ranks: Ranks
    run: Run
    metrics: MetricsLogger
    commits: Commits
    placement: Placement
    model: PreTrainedModel
    data: TrainingData
    sizes: Sizes
    result: TrainingResult  # progress at the start; `train` brings it up to date

    def __post_init__(self) -> None:
        self.sharded = self.config.model.is_sharded(self.ranks.size)
        self.own = self.placement.of(self.ranks.process_index)
        self.keeps_best = self.config.train.keep == "best"
        self._steps_since_commit = 0
        self._warned = False

    def train(self) -> TrainingResult:
        """Train this rank's packs to the end, committing on the way; then join the other ranks' commits.

        Raises:
            Interrupted: A rank was asked to stop; everything is saved.
            CheckpointError: A commit could not be written; earlier commits remain valid.
        """
        packs = self._packs()
        total = self.result.steps
        with progress_bar(
            total * len(packs),
            self._title(),
            done=sum(start for _, start in packs),
            hidden=self.ranks.process_index > 0,
        ) as bar:
            for adapters, start in packs:
                self.ranks.heartbeat(f"preparing adapters {adapters}")
                pack = Pack(
                    self.config,
                    self.model,
                    self.data,
                    adapters,
                    sizes=self.sizes,
                    sharded=self.sharded,
                )
                if start > 0:
                    self.commits.restore(self.result.progress, pack.bank, pack.optimizer)
                self._train_pack(pack, start, bar)
                pack.close()
            while any(state.status == "training" for state in self.result.progress.values()):
                self._commit(None)
        self.commits.wait()
        self.result.commit_seconds = self.commits.seconds
        return self.result

    def _packs(self) -> list[tuple[list[int], int]]:
        """This rank's packs, each with the step that it starts from."""
        packs = []
        for placed in self.placement.rounds:
            # Ranks gather the layers of a sharded base together, so all must run it equally often. In a round without
            # a pack of its own a rank trains a copy of another rank's pack, and keeps nothing of it.
            adapters = placed[self.ranks.process_index] or (next(filter(None, placed)) if self.sharded else [])
            if adapters:
                states = [self.result.progress[a] for a in adapters]
                packs.append((adapters, max(s.step for s in states if s.status == "training")))
        return packs

    def _title(self) -> str:
        others = sum(len(pack) for packs in self.placement.rounds for pack in packs) - len(self.own)
        return f"training {len(self.own)} adapters" + (f", {others} on other ranks" if others else "")

    def _train_pack(self, pack: Pack, start: int, bar: ProgressBar) -> None:
        """Train one pack from step `start` to the end; then write, commit and validate its adapters."""
        result, total = self.result, self.result.steps
        own_pack = pack if pack.bank.adapters[0] in self.own else None
        held_out = self._validate_if_due(pack, start, own_pack, bar) if start < total else ""
        for step in range(start, total):
            self.ranks.heartbeat(f"at step {step + 1} of {total}")
            self.commits.check()
            began = time.perf_counter()
            done = pack.step(step, self.ranks.stop.is_set)
            result.seconds += time.perf_counter() - began
            if done is None:
                self._commit(own_pack)
                return  # never: a rank was asked to stop, and then `_commit` raises Interrupted
            self._steps_since_commit += 1
            if own_pack:
                self._record(pack, done, step + 1)
            if not pack.live and not self.sharded:
                bar.advance(total - step, "every adapter diverged")
                self._commit(own_pack)
                return
            bar.advance(1, f"{_spread(pack, done)}{held_out}{result.tokens / result.seconds:,.0f} tokens/s")
            if step + 1 < total:
                held_out = self._validate_if_due(pack, step + 1, own_pack, bar) or held_out
                if self._steps_since_commit >= self.config.checkpoint.every_steps:
                    self._commit(own_pack)
        # What is trained is saved before anything else happens: validation may take longer than training did.
        if own_pack and not self.keeps_best:
            self._write_adapters(pack)
        self._commit(own_pack)
        self._validate(pack, total, own_pack, bar)
        if self.keeps_best:
            self._keep_best(pack, own_pack, bar)
        if own_pack:
            self._update(_live(pack), status="finished")
        self._commit(own_pack)

    def _record(self, pack: Pack, done: StepResult, step: int) -> None:
        self.result.tokens += done.tokens
        self.result.padded_tokens += done.padded_tokens
        self._update(_live(pack), step=step)
        self._update([pack.bank.adapters[slot] for slot in done.diverged], step=step, status="diverged")
        self.metrics.step(pack, done, step)

    def _update(self, adapters: list[int], **changes: int | float | str) -> None:
        """Change the progress of some adapters."""
        self.result.progress |= {a: replace(self.result.progress[a], **changes) for a in adapters}  # type: ignore[arg-type]

    def _validate_if_due(self, pack: Pack, step: int, own_pack: Pack | None, bar: ProgressBar) -> str:
        """Validate in the course of training; what is trained is committed first. Returns the result in words."""
        every = self.config.train.validate_every
        if not every or step % every:
            return ""
        if self._steps_since_commit:
            self._commit(own_pack)
        return self._validate(pack, step, own_pack, bar)

    def _validate(self, pack: Pack, step: int, own_pack: Pack | None, bar: ProgressBar) -> str:
        """Validate and log it, unless that was done before the run was interrupted. Returns the result in words."""
        due = any(self.result.progress[a].validated < step for a in _live(pack))
        if not (all_reduce_max([due])[0] if self.sharded else due):
            return ""
        measures = self._measure(pack, step, bar)
        if measures is None:
            self._commit(own_pack)  # raises Interrupted
            return ""
        losses = {a: measures[a]["validation_loss"] for a in _live(pack) if "validation_loss" in measures.get(a, {})}
        if own_pack and pack.live:
            self.metrics.validation(pack, step, measures)
            self._update(_live(pack), validated=step)
            for adapter, loss in losses.items() if self.keeps_best else ():
                best = self.result.progress[adapter].best_loss
                if loss < (math.inf if best is None else best):
                    self._update([adapter], best_step=step, best_loss=loss)
        if not losses:
            return ""
        least, most, merge = min(losses.values()), max(losses.values()), measures["merge"]["validation_loss"]
        return f"held out {least:.3f} to {most:.3f}, merge {merge:.3f}, "

    def _measure(self, pack: Pack, step: int, bar: ProgressBar) -> dict[int | str, dict[str, Any]] | None:
        """Validate a pack as it is; None if a rank was asked to stop."""

        def stop() -> bool:
            self.ranks.heartbeat(f"validating after step {step}")
            return self.ranks.stop.is_set()

        return validate(pack, stop=stop, report=bar.report)

    def _keep_best(self, pack: Pack, own_pack: Pack | None, bar: ProgressBar) -> None:
        """Give each adapter its weights of lowest validation loss; validate and write these.

        Until the pack is finished, commits keep its last step's state: an interrupted run resumes from there.
        """
        total, progress = self.result.steps, self.result.progress
        changes = own_pack is not None and any(0 < progress[a].best_step < total for a in _live(pack))
        if own_pack and changes:
            self.commits.restore_best(progress, pack.bank)
        if all_reduce_max([changes])[0] if self.sharded else changes:
            measures = self._measure(pack, total, bar)
            if measures is None:
                self._commit(None)  # raises Interrupted
            elif changes:
                self.metrics.validation(pack, total, measures, kept=True)
        if own_pack:
            self._write_adapters(pack)

    def _write_adapters(self, pack: Pack) -> None:
        section = self.config.model
        for slot in pack.live:
            adapter = pack.bank.adapter(slot, base_model=section.name, revision=section.revision, task_type="CAUSAL_LM")
            self.run.write_adapter(pack.bank.adapters[slot], adapter)

    def _commit(self, own_pack: Pack | None) -> None:
        """Start a commit with all ranks. Raises Interrupted, after it is written, if any was asked to stop."""
        self.commits.check()
        reports = self.ranks.gather(
            {
                "adapters": {adapter: asdict(self.result.progress[adapter]) for adapter in self.own},
                "stop": self.ranks.stop.is_set(),
                "metrics": self.metrics.take(),
            }
        )
        for report in reports:
            self.result.progress |= {int(adapter): Progress(**state) for adapter, state in report["adapters"].items()}
        if self.ranks.process_index == 0:
            for adapters, lines in (kept for report in reports for kept in report["metrics"]):
                self.metrics.write(adapters, lines)
            self.run.sync_metrics()
        self.commits.start(
            self.result.progress, own_pack.bank if own_pack else None, own_pack.optimizer if own_pack else None
        )
        self._steps_since_commit = 0
        self._warn_of_slow_commits()
        left = [state.step for state in self.result.progress.values() if state.status == "training"]
        if left and any(report["stop"] for report in reports):
            self.commits.wait()
            raise self.ranks.mark_shared(self._interrupted(min(left)))

    def _interrupted(self, step: int) -> Interrupted:
        total, folder = self.result.steps, self.result.folder
        launcher = "poc-lora" if self.ranks.size == 1 else "accelerate launch ... -m poc_lora"
        return Interrupted(
            f"stopped after step {step} of {total}; everything up to it is saved"
            + (": only the final validation is left to run" if step == total else ""),
            where=folder,
            fix=f"resume with: {launcher} train {shlex.quote(str(self.run.paths.config))} --resume",
        )

    def _warn_of_slow_commits(self) -> None:
        """Warn once if a launcher would kill this process before a commit could be written."""
        if self._warned or "TORCHELASTIC_RUN_ID" not in os.environ:
            return
        timeout, slowest = whole_number("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SHUTDOWN_SECONDS), self.commits.slowest
        if slowest < timeout:
            return
        self._warned = True
        print(  # noqa: T201
            f"commits take {slowest:.0f} s, but the launcher kills its processes {timeout} s after SIGTERM, so steps"
            " since the last commit could be lost (fix: with torch 2.13 or later set"
            f" TORCH_ELASTIC_SHUTDOWN_TIMEOUT={2 * round(slowest)}, or lower checkpoint.every_steps)",
            file=sys.stderr,
        )


def _live(pack: Pack) -> list[int]:
    """Ids of the pack's adapters that have not diverged."""
    return [pack.bank.adapters[slot] for slot in pack.live]


def _spread(pack: Pack, done: StepResult) -> str:
    losses = [done.losses[slot] for slot in pack.live]
    return f"loss {sum(losses) / len(losses):.3f} ({min(losses):.3f} to {max(losses):.3f}), " if losses else ""
