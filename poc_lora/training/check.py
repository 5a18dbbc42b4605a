"""`check`: what a run will do and need, before it starts: rows, steps, parameters, memory and disk."""

from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from poc_lora.artifacts.run_folder import RunFolder
from poc_lora.config import RunConfig, TrainSection, Varied
from poc_lora.data.batches import supervised_tokens
from poc_lora.errors import RequestError
from poc_lora.files import free_bytes_at, require_place, size
from poc_lora.lora.bank import resolve_targets
from poc_lora.models.bfloat16 import bfloat16_advice
from poc_lora.models.compilation import compiles, why_not_compiled
from poc_lora.models.load import (
    context_length,
    default_device,
    empty_base,
    load_tokenizer,
    require_gradients,
    require_quantization,
    require_stored,
    resolve_dtype,
)
from poc_lora.models.vocabulary import require_embeddings
from poc_lora.training.data import TrainingData, chat_template, prepare_data
from poc_lora.training.memory import Footprint, free_bytes, snapshot_bytes
from poc_lora.training.metrics import require_trackers
from poc_lora.training.placement import initial_progress, place
from poc_lora.training.preview import (
    LOSS,
    learning_rate_in_words,
    lengths_in_words,
    row_preview,
    unknown_tokens,
    warnings,
)
from poc_lora.training.run import Run, find_run, require_same_rows, run_lock
from poc_lora.training.targets import require_targets
from poc_lora.training.validation import LEAST_COMPARED


def check(config: RunConfig, *, device: torch.device | None = None, processes: int = 1) -> dict[str, Any]:
    """Validate a run without loading weights.

    Args:
        config: The run's configuration.
        device: Default, the device that training would use.
        processes: How many processes `accelerate launch` will start, on machines like this one.

    Returns:
        What the run will do, as names and values to read; memory is the predicted peak on `device`. The values are
        numbers and texts, those of `a row` and `warnings` lists of texts, and `bytes` holds the needs as numbers.

    Raises:
        PocLoraError: As `train` would: run folder, trackers, compiler, target modules, rows, disk space.
    """
    require_processes(config, processes)
    device, folder = device or default_device(), Path(config.output)
    require_place(folder)
    in_use = RunFolder(folder).is_run
    if in_use:
        with run_lock(folder):  # refuse if another process trains there
            pass
    asked = config.model
    run, config = preflight(config, device, resume=in_use)
    compiled = compiles(config.train.compile, device)
    model = empty_base(config.model.name, revision=config.model.revision)
    tokenizer = load_tokenizer(config.model.name, revision=config.model.revision, chat_template=chat_template(config))
    data = run_data(config, run, model, tokenizer, now=run.info.start if run.info else None)
    footprint = Footprint(config, device, longest=data.longest, ranks=processes)
    free = free_bytes(device)
    sizes = footprint.choose(free, run.info.to_json() if run.info else {})
    placement = place(
        initial_progress(config.adapters.count), data.total_steps, ranks=processes, per_device=sizes.per_device
    )
    memory = footprint.memory(sizes)
    M, P = config.adapters.count, footprint.parameters
    begun = sum(state.begun for state in run.commit.progress.values()) if run.commit else 0
    on_disk = disk_bytes(config, P, sizes.per_device * processes, begun=begun)
    room = require_room(folder, 0 if in_use else on_disk)
    tokens = sum(len(e.ids) for e in data.train)
    rows = M * config.train.batch_size
    everything = [*data.train, *data.validation]
    unknown = unknown_tokens(everything, tokenizer)
    quantized = footprint.quantization
    faster = None if in_use else bfloat16_advice(model, asked, footprint.dtype, device)
    return {
        "base parameters": sum(p.numel() for p in model.parameters()),
        "base weights": footprint.dtype if quantized is None else f"{quantized}, computing in {footprint.dtype}",
        "adapters": M,
        "adapted modules": ", ".join(resolve_targets(model, config.lora.targets)),
        "parameters per adapter": P,
        "training rows": len(data.train),
        "validation rows": len(data.validation),
        "tokens of a row": lengths_in_words(data.lengths, data.max_length),
        "rows shortened to max_length": data.truncated,
        "rows left out (whole answer cut off)": data.dropped,
        "rows left out (data.skip_bad_rows)": data.skipped,
        "unknown tokens": "none: the tokenizer knows every text" if unknown is None else f"{unknown:.2%}",
        "what has a loss": LOSS[config.data.learn],
        "tokens per epoch and adapter": tokens,
        "supervised tokens per epoch and adapter": sum(supervised_tokens(e) for e in data.train),
        "rows per step": f"{rows:,}: {config.train.batch_size} of each adapter",
        "steps": data.total_steps,
        **{f"{key} by adapter": _by_adapter(config, key) for key in config.adapters.vary},
        "learning rate": learning_rate_in_words(config, data.total_steps),
        "tokens of the whole run, about": round(tokens / len(data.train) * rows * data.total_steps),
        "validation, about": _validation_cost(data, sizes.per_device, config.train),
        "adapters trained at once": sizes.per_device,
        **{
            f"process {rank} trains adapters": ", then ".join(
                _span(packs[rank]) for packs in placement.rounds if packs[rank]
            )
            for rank in range(processes if processes > 1 else 0)
        },
        "tokens per micro-batch": f"{sizes.tokens_per_microbatch:,}, of all its adapters, padding counted",
        "gradient checkpointing": "on" if sizes.gradient_checkpointing else "off",
        "torch.compile": "on"
        if compiled
        else ": ".join(filter(None, ["off", why_not_compiled(config.train.compile, device)])),
        f"memory on {device.type}: base model": size(memory.weights),
        f"memory on {device.type}: adapters and gradients": size(memory.bank),
        f"memory on {device.type}: optimizer": size(memory.optimizer),
        f"memory on {device.type}: activations": size(memory.activations)
        + (f", an upper bound: {why}" if (why := footprint.not_simulated) else ""),
        f"memory on {device.type}: logits": size(memory.logits),
        "host memory while a commit is written": size(snapshot_bytes(sizes.per_device, P)),
        f"memory on {device.type}: peak": f"{size(memory.total)} of {size(free)} free"
        + ("" if memory.total < free else ": TOO MUCH"),
        "disk": f"{size(on_disk)} of {size(room)} free",
        "run folder": f"{folder} ({'existing run; --resume continues it' if in_use else 'new'})",
        "a row": row_preview(data.train, tokenizer),
        "warnings": [*warnings(config, data, unknown), *filter(None, [faster])],
        "bytes": {"peak": memory.total, "free": free, "disk": on_disk, "disk free": room},
    }


def preflight(config: RunConfig, device: torch.device, *, resume: bool) -> tuple[Run, RunConfig]:
    """Find the run, and refuse what can be refused before the base model is loaded.

    Returns the run, and the configuration with the dtype that `auto` stands for: that of the resumed run, if any.
    """
    run = find_run(config, resume=resume)
    require_trackers(config)
    require_quantization(config.model.quantization, device)
    require_stored(config.model.name, config.model.quantization, revision=config.model.revision)
    compiles(config.train.compile, device)
    dtype = (run.info and run.info.dtype) or resolve_dtype(config.model.dtype, device)
    require_gradients(dtype)
    return run, config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})


def run_data(
    config: RunConfig,
    run: Run,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    now: datetime | None,
) -> TrainingData:
    """Prepare the rows of a run. Raises if they differ from a resumed run's, or do not fit the base model."""
    require_targets(config)
    data = prepare_data(config, tokenizer, context=context_length(model), now=now)
    require_embeddings(model, tokenizer, (e.ids for e in (*data.train, *data.validation)), where="data.train")
    require_same_rows(run, data.files, data.validation_files)
    return data


def require_processes(config: RunConfig, processes: int) -> None:
    """Raise RequestError if there are more processes than adapters."""
    if processes > config.adapters.count:
        raise RequestError(
            f"{processes} processes for {config.adapters.count} adapters: each process needs an adapter of its own",
            where="adapters.count",
            fix=f"start at most {config.adapters.count} processes, or raise adapters.count",
        )


def _validation_cost(data: TrainingData, per_device: int, section: TrainSection) -> str:
    """The tokens of a pack's validations: base, adapters, merge and, of three or more, their merge of the best."""
    if not data.validation:
        return "none: there are no validation rows"
    every = section.validate_every
    times = 1 + ((data.total_steps - 1) // every if every else 0) + (section.keep == "best")  # of what is kept
    models = per_device + 2 + (per_device >= LEAST_COMPARED)
    tokens = models * sum(len(e.ids) for e in data.validation)
    return f"{times * tokens:,} tokens: {len(data.validation)} rows × {models} models × {times} validations per pack"


def _by_adapter(config: RunConfig, key: Varied) -> str:
    """A varied key's values, each with its adapters."""
    by_value: dict[float, list[str]] = {}
    for adapter in range(config.adapters.count):
        by_value.setdefault(config.value(key, adapter), []).append(str(adapter))
    return "; ".join(f"{value:g}: {', '.join(own)}" for value, own in by_value.items())


def _span(pack: list[int]) -> str:
    """A range of adapters; those of a new run's pack are consecutive."""
    return f"{pack[0]}" if len(pack) == 1 else f"{pack[0]} to {pack[-1]} together"


def disk_bytes(config: RunConfig, parameters: int, at_once: int, *, begun: int = 0) -> int:
    """Return the bytes of a run's commits and adapters.

    Args:
        config: The run's configuration.
        parameters: Of one adapter; a commit holds as many weights and twice as many moments, in float32.
        at_once: How many adapters all ranks can train at the same time.
        begun: How many adapters have begun; all commits share the state of those that wait for their turn.
    """
    at_once = min(at_once, config.adapters.count)
    states = (config.checkpoint.keep + 1) * at_once + max(0, begun - at_once)
    if config.train.keep == "best":
        states *= 2  # each may have a best state that no other commit has
    return 4 * parameters * (3 * states + config.adapters.count)


def require_room(folder: Path, needed: int) -> int:
    """Return the free bytes where `folder` is or will be. Raises RequestError if fewer than `needed`."""
    free = free_bytes_at(folder)
    if free < needed:
        raise RequestError(
            f"checkpoints and adapters need {size(needed)}, {size(free)} are free",
            where=folder,
            fix="free some space, set output to another disk, or lower adapters.count, lora.rank or checkpoint.keep",
        )
    return free
