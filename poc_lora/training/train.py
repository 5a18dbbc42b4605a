"""`train`: M adapters of one base model, packed together on each device, over as many processes as were started."""

import contextlib
import sys
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from poc_lora.config import RunConfig, flatten
from poc_lora.distributed import Ranks, open_ranks
from poc_lora.envvars import whole_number
from poc_lora.errors import TrainingError
from poc_lora.lora.bank import matching_linears
from poc_lora.models.compilation import require_compiler
from poc_lora.models.forward import without_cudnn_attention
from poc_lora.models.load import (
    context_length,
    default_device,
    empty_base,
    load_base,
    load_tokenizer,
    require_gradients,
    require_quantization,
    resolve_dtype,
)
from poc_lora.models.recomputation import gradient_checkpointing
from poc_lora.models.sharding import all_reduce_max, shard_base
from poc_lora.training.check import disk_bytes, require_processes, require_room
from poc_lora.training.checkpoint import Commits, Progress
from poc_lora.training.data import TOKENISED, TrainingData, prepare_data
from poc_lora.training.journal import Journal
from poc_lora.training.loop import Trained, Worker
from poc_lora.training.memory import Sizes, free_bytes, peak_bytes, resolve_sizes
from poc_lora.training.placement import place
from poc_lora.training.run import (
    Run,
    changed_devices,
    describe_device,
    environment,
    find_run,
    require_same_rows,
    run_lock,
    started_at,
)
from poc_lora.training.step import Pack
from poc_lora.training.trackers import Trackers, open_trackers, require_trackers


def train(config: RunConfig, *, resume: bool = False, device: torch.device | None = None) -> Trained:
    """Train `config.adapters.count` adapters; they end up in `config.output`/adapters, in PEFT format.

    Started by `accelerate launch` or the like in several processes, it trains whole adapters on each: all processes
    call it, with the same config. resume: go on with the run in that folder; a launcher that restarts the process
    resumes by itself.
    Raises RequestErrors for what is wrong with the request, TrainingError when every adapter diverged, PeerError when
    another process failed, and Interrupted, with everything saved, after Ctrl-C or SIGTERM.
    """
    device = device or default_device()
    with open_ranks(device) as ranks, without_cudnn_attention(), contextlib.ExitStack() as held:
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
    now = ranks.gather(datetime.now().isoformat(timespec="seconds"))[0]  # ranks may start on both sides of midnight
    devices = ranks.gather(describe_device(device))
    ranks.beat("loading the base model and the rows")
    with ranks.together():
        run = find_run(config, resume=resume or _restarted(config))
        require_trackers(config)
        require_quantization(section.quantization)
        if config.train.compile:
            require_compiler(device)
        dtype = run.facts.get("dtype") or resolve_dtype(section.dtype, device)
        require_gradients(dtype)
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
        started = started_at(run.facts) or datetime.fromisoformat(now)
        data = prepare_data(config, tokenizer, context=context_length(model), now=started)
        require_same_rows(run, data.files, TOKENISED)
        sizes = _sizes(run, config, data, model, device, free, ranks)
    ranks.agree(data.files | asdict(sizes) | {"commit": run.commit.number if run.commit else None})
    with ranks.together():
        if ranks.rank == 0:
            facts = {"started_at": started.isoformat(), "dtype": dtype, "processes": ranks.size, "devices": devices}
            _begin(run, config, data, sizes, facts)
    if sharded:
        ranks.beat("sharing out the base model")
        model = shard_base(model if ranks.rank == 0 else None, device)

    done = Trained(
        run.folder, _progress(config, run), data.total_steps, data.shortened, data.lost, tells=ranks.rank == 0
    )
    before = run.commit.placement if run.commit else None
    placement = place(done.progress, done.steps, ranks=ranks.size, per_device=sizes.per_device, before=before)
    commits = Commits(run.checkpoints, ranks, placement, keep=config.checkpoint.keep, last=run.commit)
    with open_trackers(config, run) if ranks.rank == 0 else contextlib.nullcontext(Trackers()) as trackers, commits:
        worker = Worker(config, ranks, run, Journal(run, trackers, ranks.rank), commits, placement, done)
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
                    largest=all_reduce_max if sharded else None,
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
    sizes = resolve_sizes(
        config, model, device=device, free=free, longest=data.longest, ranks=ranks.size, before=run.facts
    )
    if sizes.gradient_checkpointing:
        with gradient_checkpointing(model):
            pass  # a model that has no such layers is refused here, before anything is written
    if not run.facts:
        linears = matching_linears(model, config.lora.targets).values()
        parameters = config.lora.rank * sum(m.in_features + m.out_features for m in linears)
        at_once = min(sizes.per_device * ranks.size, config.adapters.count)
        require_room(run.folder, disk_bytes(config, parameters, at_once))
    return sizes


def _begin(run: Run, config: RunConfig, data: TrainingData, sizes: Sizes, facts: dict[str, Any]) -> None:
    """Open the run folder, on rank 0."""
    for problem in run.problems:
        print(f"a damaged commit is passed over: {problem}", file=sys.stderr)  # noqa: T201
    if run.commit and (change := changed_devices(run.facts.get("devices", []), facts["devices"])):
        print(change, file=sys.stderr)  # noqa: T201
    run.begin(
        config,
        seed=config.adapters.seed,
        steps=data.total_steps,
        data_sha256=data.files,
        **asdict(sizes),
        **facts,
    )


def _progress(config: RunConfig, run: Run) -> dict[int, Progress]:
    fresh = {adapter: Progress(0) for adapter in range(config.adapters.count)}
    return fresh if run.commit is None else fresh | run.commit.progress


def _sum_up(done: Trained, run: Run, ranks: Ranks, device: torch.device) -> None:
    """Put the figures of all ranks together and into run.json. Raises TrainingError where no adapter came through."""
    figures = ranks.gather(
        [done.real_tokens, done.computed_tokens, done.seconds, done.commit_seconds, peak_bytes(device)]
    )
    real, computed, seconds, waited, peaks = zip(*figures, strict=True)
    done.real_tokens, done.computed_tokens = sum(real), sum(computed)
    done.seconds, done.commit_seconds, done.peak_bytes = max(seconds), max(waited), max(peaks)
    if ranks.rank == 0:
        run.note(
            train_seconds=round(run.facts.get("train_seconds", 0) + done.seconds, 3),
            commit_seconds=round(run.facts.get("commit_seconds", 0) + done.commit_seconds, 3),
            peak_bytes=done.peak_bytes,
        )
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
    counts = [whole_number(name, 0) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")]
    return any(counts) and (Path(config.output) / "config.yaml").exists()
