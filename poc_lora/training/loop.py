"""`train`: M adapters of one base model, packed together on each device, over as many processes as were started."""

import contextlib
import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from poc_lora.config import RunConfig, flatten
from poc_lora.errors import Interrupted, RunError, TrainingError
from poc_lora.lora.bank import matching_linears
from poc_lora.lora.base import (
    context_length,
    default_device,
    empty_base,
    load_base,
    load_tokenizer,
    require_quantization,
    resolve_dtype,
)
from poc_lora.progress import Tracker, track
from poc_lora.ranks import Ranks, open_ranks
from poc_lora.training.checkpoint import Commits, Placement, Progress, restore
from poc_lora.training.fused import gradient_checkpointing, require_compiler
from poc_lora.training.journal import Journal
from poc_lora.training.memory import Sizes, free_bytes, peak_bytes, resolve_sizes
from poc_lora.training.pack import Pack, Step
from poc_lora.training.placement import place
from poc_lora.training.plan import TrainingData, disk_bytes, prepare_data, require_processes, require_room
from poc_lora.training.run import Run, environment, find_run, run_lock
from poc_lora.training.shard import largest, shard_base
from poc_lora.training.trackers import Trackers, open_trackers, require_trackers
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


def train(config: RunConfig, *, resume: bool = False, device: torch.device | None = None) -> Trained:
    """Train `config.adapters.count` adapters; they end up in `config.output`/adapters, in PEFT format.

    Started by `accelerate launch` or the like in several processes, it trains whole adapters on each: all processes
    call it, with the same config. resume: go on with the run in that folder; a launcher that restarts the process
    resumes by itself.
    Raises RequestErrors for what is wrong with the request, TrainingError when every adapter diverged, PeerError when
    another process failed, and Interrupted, with everything saved, after Ctrl-C or SIGTERM.
    """
    device = device or default_device()
    with open_ranks(device) as ranks, contextlib.ExitStack() as held:
        ranks.agree(_facts_of(config, resume))
        with ranks.together():
            require_processes(config, ranks.size)
            if ranks.rank == 0:
                held.enter_context(run_lock(Path(config.output)))
        return _train(config, resume, device, ranks)


def _train(config: RunConfig, resume: bool, device: torch.device, ranks: Ranks) -> Trained:
    section = config.model
    sharded = section.shard and ranks.size > 1
    free = min(ranks.gather(free_bytes(device)))
    ranks.beat("loading the base model and the rows")
    with ranks.together():
        run = find_run(config, resume=resume or _restarted(config))
        require_trackers(config)
        require_quantization(section.quantization)
        if config.train.compile:
            require_compiler(device)
        dtype = run.facts.get("dtype") or resolve_dtype(section.dtype, device)
        tokenizer = load_tokenizer(section.name, revision=section.revision)
        if sharded and ranks.rank:
            model = empty_base(section.name, revision=section.revision, dtype=dtype)
        else:
            model = load_base(
                section.name,
                revision=section.revision,
                dtype=dtype,
                quantization=section.quantization,
                device=torch.device("cpu") if sharded else device,
                floats_only=sharded,
            )[0]
        matching_linears(model, config.lora.targets)
        data = prepare_data(config, tokenizer, context=context_length(model))
        sizes = _sizes(run, config, data, model, device, free, ranks)
    ranks.agree(data.files | asdict(sizes) | {"commit": run.commit.number if run.commit else None})
    with ranks.together():
        if ranks.rank == 0:
            _begin(run, config, data, dtype, sizes, ranks)
    if sharded:
        ranks.beat("sharing out the base model")
        model = shard_base(model if ranks.rank == 0 else None, device)

    done = Trained(
        run.folder, _progress(config, run), data.total_steps, data.shortened, data.lost, tells=ranks.rank == 0
    )
    before = run.commit.placement if run.commit else None
    placement = place(done.progress, done.steps, ranks=ranks.size, per_device=sizes.per_device, before=before)
    with open_trackers(config, run) if ranks.rank == 0 else contextlib.nullcontext(Trackers()) as trackers:
        worker = _Worker(config, ranks, run, Journal(run, trackers, ranks.rank), placement, done)
        with worker.progress_bar() as bar:

            def make_pack(adapters: list[int]) -> Pack:
                return Pack(
                    config,
                    model,
                    data,
                    adapters,
                    tokens=sizes.tokens_per_microbatch,
                    pad_id=tokenizer.pad_token_id or 0,
                    checkpointing=sizes.gradient_checkpointing,
                    largest=largest if sharded else None,
                )

            worker.work(make_pack, bar)
    _sum_up(done, run, ranks, device)
    return done


def _sizes(
    run: Run,
    config: RunConfig,
    data: TrainingData,
    model: PreTrainedModel,
    device: torch.device,
    free: int,
    ranks: Ranks,
) -> Sizes:
    """The sizes of the work, as they were chosen when the run first began. Refuses what cannot be carried out."""
    if run.facts.get("data_sha256", data.files) != data.files:
        raise RunError(
            "the training files have changed since the run began", where=run.folder, fix="put them back, or start anew"
        )
    sizes = resolve_sizes(
        config, model, device=device, free=free, longest=data.longest, ranks=ranks.size, before=run.facts
    )
    if sizes.gradient_checkpointing:
        with gradient_checkpointing(model):
            pass  # a model that has no such layers is refused here, before anything is written
    if not run.facts:
        linears = matching_linears(model, config.lora.targets).values()
        parameters = config.lora.rank * sum(m.in_features + m.out_features for m in linears)
        require_room(run.folder, disk_bytes(config, parameters, sizes.per_device * ranks.size))
    return sizes


def _begin(run: Run, config: RunConfig, data: TrainingData, dtype: str, sizes: Sizes, ranks: Ranks) -> None:
    """Open the run folder, on rank 0."""
    for problem in run.problems:
        print(f"a damaged commit is passed over: {problem}", file=sys.stderr)  # noqa: T201
    run.begin(
        config,
        seed=config.adapters.seed,
        steps=data.total_steps,
        dtype=dtype,
        data_sha256=data.files,
        processes=ranks.size,
        **asdict(sizes),
    )


def _progress(config: RunConfig, run: Run) -> dict[int, Progress]:
    fresh = {adapter: Progress(0) for adapter in range(config.adapters.count)}
    return fresh if run.commit is None else fresh | run.commit.progress


class _Worker:
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
                self._commit(pack if ours else None)  # which ends in Interrupted
                continue
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
            self.run.write_adapter(number, pack.bank.adapter(slot, base_model=section.name, revision=section.revision))
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


def _sum_up(done: Trained, run: Run, ranks: Ranks, device: torch.device) -> None:
    """Put the figures of all ranks together and into run.json. Raises TrainingError where no adapter came through."""
    figures = ranks.gather([done.real_tokens, done.computed_tokens, done.seconds, peak_bytes(device)])
    real, computed, seconds, peaks = zip(*figures, strict=True)
    done.real_tokens, done.computed_tokens, done.seconds, done.peak_bytes = (
        sum(real),
        sum(computed),
        max(seconds),
        max(peaks),
    )
    if ranks.rank == 0:
        seconds_before = run.facts.get("train_seconds", 0)
        run.note(train_seconds=round(seconds_before + done.seconds, 3), peak_bytes=done.peak_bytes)
    if not any(state.status == "finished" for state in done.progress.values()):
        problem = TrainingError(
            "every adapter diverged: no loss stayed finite", where=run.folder, fix="lower optim.lr or optim.temperature"
        )
        raise ranks.jointly(problem)


def _facts_of(config: RunConfig, resume: bool) -> dict[str, Any]:
    """What all ranks must have been given alike."""
    return {**flatten(config), "--resume": resume, **environment()["versions"]}


def _restarted(config: RunConfig) -> bool:
    """Whether a launcher has started this process again after a failure, with a run there to go on with."""
    counts = (os.environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    return any(int(count) > 0 for count in counts) and (Path(config.output) / "config.yaml").exists()
