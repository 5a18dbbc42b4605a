"""`train`: M adapters of one base model, packed together, on one device."""

import os
import shlex
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from poc_lora.config import RunConfig
from poc_lora.errors import Interrupted, RequestError, RunError, TrainingError
from poc_lora.lora.bank import matching_linears
from poc_lora.lora.base import context_length, default_device, load_base, resolve_dtype
from poc_lora.progress import Tracker, track
from poc_lora.training.checkpoint import Progress, restore, save_commit
from poc_lora.training.fused import gradient_checkpointing, require_compiler
from poc_lora.training.journal import Journal
from poc_lora.training.memory import Sizes, free_bytes, peak_bytes, resolve_sizes
from poc_lora.training.pack import Pack
from poc_lora.training.plan import TrainingData, disk_bytes, prepare_data, require_room
from poc_lora.training.run import Run, find_run, stop_requests
from poc_lora.training.trackers import open_trackers, require_trackers


@dataclass
class Trained:
    """What a call of `train` did."""

    folder: Path
    progress: dict[int, Progress]
    steps: int
    shortened: int  # rows cut to max_length
    lost: int  # rows left out because the cut took their whole answer
    real_tokens: int = 0  # over all adapters
    computed_tokens: int = 0  # the same with padding
    seconds: float = 0.0  # in optimizer steps
    peak_bytes: int = 0  # of the device's memory; on the CPU, of the whole process


def train(config: RunConfig, *, resume: bool = False, device: torch.device | None = None) -> Trained:
    """Train `config.adapters.count` adapters; they end up in `config.output`/adapters, in PEFT format.

    resume: go on with the run in that folder; a launcher that restarts the process resumes by itself.
    Raises RequestErrors for what is wrong with the request, TrainingError when every adapter diverged, and
    Interrupted, with everything saved, after Ctrl-C or SIGTERM.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RequestError("training runs in one process for now", fix="start it once, with poc-lora train")
    device = device or default_device()
    free = free_bytes(device)
    section = config.model
    run = find_run(config, resume=resume or _restarted(config))
    require_trackers(config)
    if config.train.compile:
        require_compiler(device)
    dtype = run.facts.get("dtype") or resolve_dtype(section.dtype, device)
    model, tokenizer = load_base(
        section.name, revision=section.revision, dtype=dtype, quantization=section.quantization, device=device
    )
    matching_linears(model, config.lora.targets)
    data = prepare_data(config, tokenizer, context=context_length(model))
    sizes = _begin(run, config, data, model, dtype, free)

    progress = {adapter: Progress(0) for adapter in range(config.adapters.count)}
    if run.commit is not None:
        progress |= run.commit.progress
    done = Trained(run.folder, progress, data.total_steps, data.shortened, data.lost)
    packs = _packs(run, progress, sizes.per_device)
    starts = [max(progress[a].step for a in pack if progress[a].status == "training") for pack in packs]
    with (
        stop_requests() as stop,
        open_trackers(config, run) as trackers,
        track(done.steps * len(packs), f"training {_count(packs)} adapters", done=sum(starts)) as bar,
    ):
        for adapters, start in zip(packs, starts, strict=True):
            pack = Pack(
                config,
                model,
                data,
                adapters,
                tokens=sizes.tokens_per_microbatch,
                pad_id=tokenizer.pad_token_id or 0,
                checkpointing=sizes.gradient_checkpointing,
            )
            if run.commit is not None and start > 0:
                restore(run.commit, pack.bank, pack.optimizer)
            _train_pack(pack, Journal(run, trackers), done, start, stop, bar)
            pack.close()
    done.peak_bytes = peak_bytes(device)
    run.note(train_seconds=round(run.facts.get("train_seconds", 0) + done.seconds, 3), peak_bytes=done.peak_bytes)
    if not any(state.status == "finished" for state in progress.values()):
        raise TrainingError(
            "every adapter diverged: no loss stayed finite", where=run.folder, fix="lower optim.lr or optim.temperature"
        )
    return done


def _begin(run: Run, config: RunConfig, data: TrainingData, model: PreTrainedModel, dtype: str, free: int) -> Sizes:
    """Open the run folder; returns the sizes of the work, as they were chosen when the run first began."""
    for problem in run.problems:
        print(f"a damaged commit is passed over: {problem}", file=sys.stderr)  # noqa: T201
    if run.facts.get("data_sha256", data.files) != data.files:
        raise RunError(
            "the training files have changed since the run began", where=run.folder, fix="put them back, or start anew"
        )
    sizes = resolve_sizes(config, model, free=free, longest=data.longest, before=run.facts)
    if sizes.gradient_checkpointing:
        with gradient_checkpointing(model):
            pass  # a model that has no such layers is refused here, before anything is written
    if not run.facts:
        linears = matching_linears(model, config.lora.targets).values()
        parameters = config.lora.rank * sum(m.in_features + m.out_features for m in linears)
        require_room(run.folder, disk_bytes(config, parameters, sizes.per_device))
    run.begin(
        config,
        seed=config.adapters.seed,
        steps=data.total_steps,
        dtype=dtype,
        data_sha256=data.files,
        **asdict(sizes),
    )
    return sizes


def _train_pack(pack: Pack, journal: Journal, done: Trained, start: int, stop: threading.Event, bar: Tracker) -> None:
    """Train one pack from step `start` to the end, committing on the way, and write its adapters."""
    config, bank, progress, run = pack.config, pack.bank, done.progress, journal.run
    for step in range(start, done.steps):
        began = time.perf_counter()
        result = pack.step(step)
        done.seconds += time.perf_counter() - began
        done.real_tokens += result.real_tokens
        done.computed_tokens += result.computed_tokens

        progress |= {bank.adapters[slot]: Progress(step + 1) for slot in pack.live}
        progress |= {bank.adapters[slot]: Progress(step + 1, "diverged") for slot in result.diverged}
        journal.step(pack, result, step + 1)
        if not pack.live:
            bar.advance(done.steps - step, "every adapter diverged")
            break
        losses = [result.losses[slot] for slot in pack.live]
        spread = f"loss {sum(losses) / len(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})"
        bar.advance(1, f"{spread}, {done.real_tokens / done.seconds:,.0f} tokens/s")
        if step + 1 == done.steps:
            break
        if config.train.validate_every and (step + 1) % config.train.validate_every == 0:
            journal.validation(pack, step + 1)
        if stop.is_set() or (step + 1) % config.checkpoint.every_steps == 0:
            save_commit(run.checkpoints, progress, bank, pack.optimizer, keep=config.checkpoint.keep)
        if stop.is_set():
            raise Interrupted(
                f"stopped after step {step + 1} of {done.steps}; everything up to it is saved",
                where=run.folder,
                fix=f"go on with: poc-lora train {shlex.quote(str(run.folder / 'config.yaml'))} --resume",
            )
    _finish(pack, journal, done)


def _finish(pack: Pack, journal: Journal, done: Trained) -> None:
    """Write the adapters that came through, then commit that they did."""
    bank, section, run = pack.bank, pack.config.model, journal.run
    if pack.live:
        journal.validation(pack, done.steps)
    for slot in pack.live:
        number = bank.adapters[slot]
        run.write_adapter(number, bank.adapter(slot, base_model=section.name, revision=section.revision))
        done.progress[number] = Progress(done.steps, "finished")
    save_commit(run.checkpoints, done.progress, None, None, keep=pack.config.checkpoint.keep)


def _packs(run: Run, progress: dict[int, Progress], per_device: int) -> list[list[int]]:
    """Adapters that train together: the pack that was under way, and then those that have not begun.

    An adapter that diverged keeps its place in its pack, and with it the shapes the others are computed in.
    """
    under_way = [] if run.commit is None else run.commit.pack
    fresh = [a for a, state in progress.items() if state.status == "training" and a not in under_way]
    packs = [under_way, *(fresh[i : i + per_device] for i in range(0, len(fresh), per_device))]
    return [pack for pack in packs if pack]


def _count(packs: list[list[int]]) -> int:
    return sum(map(len, packs))


def _restarted(config: RunConfig) -> bool:
    """Whether a launcher has started this process again after a failure, with a run there to go on with."""
    count = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    return count > 0 and (Path(config.output) / "config.yaml").exists()
