"""`train`: sets up a run over as many processes as were started, and hands it to the training loop."""

import contextlib
import sys
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from poc_lora.artifacts.run_folder import RunFolder
from poc_lora.artifacts.run_info import RunInfo
from poc_lora.config import RunConfig, flatten
from poc_lora.distributed import Ranks, open_ranks
from poc_lora.environment import changed_devices, describe_device, environment
from poc_lora.envvars import whole_number
from poc_lora.errors import Interrupted, TrainingError, visible
from poc_lora.lora.bank import count_parameters, matching_linears, resolve_targets
from poc_lora.models.bfloat16 import bfloat16_advice
from poc_lora.models.compilation import why_not_compiled
from poc_lora.models.forward import without_cudnn_attention
from poc_lora.models.load import default_device, load_base, tokenizer_files
from poc_lora.models.recomputation import gradient_checkpointing
from poc_lora.models.sharding import load_to_shard, shard_base
from poc_lora.training.check import disk_bytes, preflight, require_processes, require_room, run_data
from poc_lora.training.checkpoint import Commits
from poc_lora.training.data import TrainingData, chat_template
from poc_lora.training.loop import TrainingLoop, TrainingResult
from poc_lora.training.memory import Sizes, free_bytes, peak_bytes, resolve_sizes
from poc_lora.training.metrics import MetricsLogger, open_trackers
from poc_lora.training.placement import initial_progress, place
from poc_lora.training.run import Run, run_lock


def train(config: RunConfig, *, resume: bool = False, device: torch.device | None = None) -> TrainingResult:
    """Train `config.adapters.count` adapters and write them to `config.output`/adapters in PEFT format.

    Under `accelerate launch` and the like all processes call it with the same config, and each trains whole adapters.

    Args:
        config: The run's configuration.
        resume: Resume the run in that folder, or start it if it is not there. A launcher that restarts the process
            resumes by itself.
        device: This process's device; default, its GPU if there is one, else the CPU.

    Returns:
        Progress of every adapter, and totals over all processes.

    Raises:
        RequestError: Configuration, model, data or run folder cannot be used as asked; nothing was changed.
        TrainingError: Every adapter diverged.
        CheckpointError: A commit could not be written or read.
        PeerError: Another process failed.
        Interrupted: Ctrl-C or SIGTERM; everything is saved.
    """
    device = device or default_device()
    with open_ranks(device) as ranks, without_cudnn_attention(), contextlib.ExitStack() as held:
        ranks.require_equal({**flatten(config), "--resume": resume, **environment()["versions"]})
        with ranks.raise_on_all():
            require_processes(config, ranks.size)
            if ranks.process_index == 0:
                held.enter_context(run_lock(Path(config.output)))
        return _train(config, resume, device, ranks)


def _train(config: RunConfig, resume: bool, device: torch.device, ranks: Ranks) -> TrainingResult:
    free = min(ranks.gather(free_bytes(device)))
    now = ranks.gather(datetime.now().isoformat(timespec="seconds"))[0]  # ranks may start on both sides of midnight
    devices = ranks.gather(describe_device(device))
    ranks.heartbeat("loading the base model and the rows")
    with ranks.raise_on_all():
        run, resolved = preflight(config, device, resume=resume or _restarted(config))
        if problem := why_not_compiled(config.train.compile, device):
            print(f"training goes without torch.compile: {problem}", file=sys.stderr)  # noqa: T201
        dtype = resolved.model.dtype
        model, tokenizer = _load_model(config, dtype, device, ranks)
        if (
            ranks.process_index == 0
            and not run.info
            and (advice := bfloat16_advice(model, config.model, dtype, device))
        ):
            print(advice, file=sys.stderr)  # noqa: T201
        started = (run.info and run.info.start) or datetime.fromisoformat(now)
        data = run_data(config, run, model, tokenizer, now=started)
        if config.data.chat_template:
            run.beside_adapters = tokenizer_files(tokenizer)
        sizes = _resolve_sizes(run, resolved, data, model, device, free, ranks)
    ranks.require_equal(
        data.files
        | {"validation": data.validation_files}
        | asdict(sizes)
        | {"commit": run.commit.number if run.commit else None}
    )
    with ranks.raise_on_all():
        if ranks.process_index == 0:
            targets = list(resolve_targets(model, config.lora.targets))
            begun = dict(started_at=started.isoformat(), dtype=dtype, target_modules=targets)
            _begin(run, config, data, sizes, devices=devices, **begun)
    if config.model.is_sharded(ranks.size):
        ranks.heartbeat("sharding the base model")
        model = shard_base(model, device)

    progress = initial_progress(config.adapters.count) | (run.commit.progress if run.commit else {})
    before = run.commit.manifest.placement if run.commit else None
    placement = place(progress, data.total_steps, ranks=ranks.size, per_device=sizes.per_device, before=before)
    with (
        open_trackers(config, run) if ranks.process_index == 0 else contextlib.nullcontext(()) as trackers,
        Commits(run.paths.checkpoints, ranks, placement, keep=config.checkpoint.keep, last=run.commit) as commits,
    ):
        loop = TrainingLoop(
            config,
            ranks=ranks,
            run=run,
            metrics=MetricsLogger(run, trackers, adapters=config.adapters.count, rank=ranks.process_index),
            commits=commits,
            placement=placement,
            model=model,
            data=data,
            sizes=sizes,
            result=TrainingResult(
                run.folder,
                progress,
                data.total_steps,
                data.truncated,
                data.dropped,
                data.skipped,
                is_rank_0=ranks.process_index == 0,
            ),
        )
        try:
            result = loop.train()
        except Interrupted:
            if ranks.process_index == 0:
                _add_seconds(run, loop.result.seconds, loop.result.commit_seconds)
            raise
    return _total(config, result, run, ranks, device)


def _load_model(
    config: RunConfig, dtype: str, device: torch.device, ranks: Ranks
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    section = config.model
    how: dict[str, Any] = {
        "revision": section.revision,
        "dtype": dtype,
        "quantization": section.quantization,
        "chat_template": chat_template(config),
    }
    if section.is_sharded(ranks.size):
        return load_to_shard(section.name, **how, rank=ranks.process_index)
    return load_base(section.name, **how, device=device)


def _resolve_sizes(
    run: Run,
    config: RunConfig,
    data: TrainingData,
    model: PreTrainedModel,
    device: torch.device,
    free: int,
    ranks: Ranks,
) -> Sizes:
    """Choose the sizes that `auto` stands for, or keep those of a resumed run."""
    sizes = resolve_sizes(
        config,
        model,
        device=device,
        free=free,
        longest=data.longest,
        ranks=ranks.size,
        before=run.info.to_json() if run.info else {},
    )
    if sizes.gradient_checkpointing:
        with gradient_checkpointing(model):
            pass  # refuses a model without such layers before anything is written
    if run.info is None:
        parameters = count_parameters(matching_linears(model, config.lora.targets).values(), config.lora.rank)
        require_room(run.folder, disk_bytes(config, parameters, sizes.per_device * ranks.size))
    return sizes


def _begin(run: Run, config: RunConfig, data: TrainingData, sizes: Sizes, *, devices: list[str], **info: Any) -> None:
    """Open the run folder, on rank 0."""
    for problem in run.problems:
        print(visible(f"a damaged commit is skipped: {problem}"), file=sys.stderr)  # noqa: T201
    if run.info and run.commit and (change := changed_devices(run.info.devices, devices)):
        print(change, file=sys.stderr)  # noqa: T201
    run.begin(
        config,
        held_out=data.held_out,
        chat_template=chat_template(config),
        seed=config.adapters.seed,
        steps=data.total_steps,
        data_sha256=data.files,
        validation_sha256=data.validation_files,
        chats=data.chats,
        skipped_rows=data.skipped,
        processes=len(devices),
        devices=devices,
        **asdict(sizes),
        **info,
    )


def _total(config: RunConfig, result: TrainingResult, run: Run, ranks: Ranks, device: torch.device) -> TrainingResult:
    """Sum over all ranks and write the totals to run.json. Raises TrainingError if no adapter has finished."""
    figures = ranks.gather(
        [result.tokens, result.padded_tokens, result.seconds, result.commit_seconds, peak_bytes(device)]
    )
    tokens, padded, seconds, waited, peaks = zip(*figures, strict=True)
    result.tokens, result.padded_tokens = sum(tokens), sum(padded)
    result.seconds, result.commit_seconds, result.peak_bytes = max(seconds), max(waited), max(peaks)
    if ranks.process_index == 0:
        if config.train.keep == "best":
            finished = {a: state for a, state in result.progress.items() if state.status == "finished"}
            run.update_info(best_steps={a: state.best_step or state.step for a, state in finished.items()})
        _add_seconds(run, result.seconds, result.commit_seconds, peak_bytes=result.peak_bytes)
    if not any(state.status == "finished" for state in result.progress.values()):
        problem = TrainingError(
            "every adapter diverged: no loss stayed finite", where=run.folder, fix="lower optim.lr or optim.temperature"
        )
        raise ranks.mark_shared(problem)
    return result


def _add_seconds(run: Run, training: float, commits: float, **info: int) -> None:
    """Add the time of this call to that of the calls before it, in run.json; `info` are other fields of it."""
    before = run.info or RunInfo()
    run.update_info(
        train_seconds=round((before.train_seconds or 0) + training, 3),
        commit_seconds=round((before.commit_seconds or 0) + commits, 3),
        **info,
    )


def _restarted(config: RunConfig) -> bool:
    """Whether a launcher has restarted this process after a failure, and there is a run to resume."""
    counts = [whole_number(name, 0) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")]
    return any(counts) and RunFolder(Path(config.output)).is_run
