"""What a run will do, found out before it starts: rows, steps, parameters, and bytes that can be counted."""

import hashlib
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from poc_lora import rng
from poc_lora.config import RunConfig
from poc_lora.data.batches import BatchOrder, padded_length, supervised_tokens
from poc_lora.data.prompts import Example, encode_rows
from poc_lora.data.rows import read_sources, source_files
from poc_lora.errors import ConfigError, DataError, RequestError
from poc_lora.files import free_bytes_at, sha256_file
from poc_lora.lora.bank import matching_linears
from poc_lora.lora.base import (
    context_length,
    default_device,
    empty_base,
    load_tokenizer,
    require_gradients,
    require_quantization,
    resolve_dtype,
)
from poc_lora.training.checkpoint import Progress
from poc_lora.training.fused import require_compiler
from poc_lora.training.memory import Footprint, free_bytes, snapshot_bytes
from poc_lora.training.placement import place
from poc_lora.training.run import find_run, started_at
from poc_lora.training.trackers import require_trackers

TOKENISED = "tokenised rows"  # the key of their checksum beside those of the files


@dataclass(frozen=True)
class TrainingData:
    """Tokenised rows, split, with the order in which they are drawn."""

    train: list[Example]
    validation: list[Example]
    order: BatchOrder
    total_steps: int
    shortened: int
    lost: int
    files: dict[str, str]  # path, and TOKENISED -> sha256

    @property
    def longest(self) -> int:
        """Tokens of the longest row, padded as it would be in a batch."""
        return padded_length(max(len(e.ids) for e in (*self.train, *self.validation)))


def prepare_data(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int | None = None,
    now: datetime | None = None,
) -> TrainingData:
    """Read, tokenise and split the rows of a run.

    context: the most tokens that the base model takes. now: see `encode_rows`.
    Raises DataError, or ConfigError for a max_length beyond the context.
    """
    section = config.data
    if context is not None and section.max_length > context:
        raise ConfigError(
            f"rows of {section.max_length} tokens do not fit the base model's context of {context}",
            where="data.max_length",
            fix=f"lower it to {context} or less",
        )
    encoded = encode_rows(
        read_sources(section.train), tokenizer, template=section.prompt, max_length=section.max_length, now=now
    )
    order = rng.permutation(len(encoded.examples), rng.key(config.adapters.seed, 0, "validation split"))
    if len(order) <= section.validation:
        raise DataError(
            f"{len(order)} usable rows leave none to train on once {section.validation} are held out"
            f" ({encoded.lost} rows lost their whole answer to data.max_length={section.max_length})",
            where="data",
            fix="lower data.validation, raise data.max_length, or give more rows",
        )
    train = [encoded.examples[i] for i in sorted(order[section.validation :])]
    batches = BatchOrder(
        [len(e.ids) for e in train],
        config.train.batch_size,
        config.adapters.seed,
        group_by_length=section.group_by_length,
    )
    steps = config.train.max_steps or max(1, round(batches.steps_per_epoch * (config.train.epochs or 0)))
    return TrainingData(
        train=train,
        validation=[encoded.examples[i] for i in sorted(order[: section.validation])],
        order=batches,
        total_steps=steps,
        shortened=encoded.shortened,
        lost=encoded.lost,
        files={
            **{str(path): sha256_file(path) for path in source_files(section.train)},
            TOKENISED: hashlib.sha256(repr([e.ids for e in encoded.examples]).encode()).hexdigest(),
        },
    )


def check(config: RunConfig, *, device: torch.device | None = None, processes: int = 1) -> dict[str, Any]:
    """Validate a run without weights; returns what it will do, as names and values for a person to read.

    processes: how many `accelerate launch` will start, all on machines like this one.
    Raises the error that `train` would: run folder, trackers, dtype, compiler, target modules, rows, room on the disk.
    Memory is the predicted peak on `device`, default the one that training would use; time is not estimated.
    """
    require_processes(config, processes)
    device, folder = device or default_device(), Path(config.output)
    in_use = (folder / "config.yaml").exists()
    run = find_run(config, resume=in_use)
    require_trackers(config)
    require_quantization(config.model.quantization)
    require_gradients(resolve_dtype(config.model.dtype, device))
    if config.train.compile:
        require_compiler(device)
    model = empty_base(config.model.name, revision=config.model.revision)
    matching_linears(model, config.lora.targets)
    tokenizer = load_tokenizer(config.model.name, revision=config.model.revision)
    data = prepare_data(config, tokenizer, context=context_length(model), now=started_at(run.facts))
    footprint = Footprint(config, device, longest=data.longest, ranks=processes)
    free = free_bytes(device)
    sizes = footprint.choose(free, run.facts)
    fresh = {adapter: Progress(0) for adapter in range(config.adapters.count)}
    placement = place(fresh, data.total_steps, ranks=processes, per_device=sizes.per_device)
    memory = footprint.memory(sizes)
    M, P = config.adapters.count, footprint.parameters
    at_once = min(sizes.per_device * processes, M)
    begun = sum(state.begun for state in run.commit.progress.values()) if run.commit else 0
    on_disk = disk_bytes(config, P, at_once, waiting=max(0, begun - at_once))
    room = require_room(folder, 0 if in_use else on_disk)
    tokens = sum(len(e.ids) for e in data.train)
    rows = M * config.train.batch_size
    quantized = config.model.quantization
    return {
        "base parameters": sum(p.numel() for p in model.parameters()),
        "base weights": footprint.dtype if quantized is None else f"{quantized}, computing in {footprint.dtype}",
        "adapters": M,
        "parameters per adapter": P,
        "training rows": len(data.train),
        "validation rows": len(data.validation),
        "rows shortened to max_length": data.shortened,
        "rows left out (whole answer cut off)": data.lost,
        "tokens per epoch and adapter": tokens,
        "supervised tokens per epoch and adapter": sum(
            supervised_tokens(e, train_on_prompt=config.data.train_on_prompt) for e in data.train
        ),
        "rows per step": f"{rows:,}: {config.train.batch_size} of each adapter",
        "steps": data.total_steps,
        "tokens of the whole run, about": round(tokens / len(data.train) * rows * data.total_steps),
        "validation, about": _validation_cost(data, sizes.per_device, config.train.validate_every),
        "adapters trained at once": sizes.per_device,
        **{
            f"rank {rank} trains adapters": ", then ".join(
                _span(packs[rank]) for packs in placement.rounds if packs[rank]
            )
            for rank in range(processes if processes > 1 else 0)
        },
        "tokens per micro-batch": f"{sizes.tokens_per_microbatch:,}, of all its adapters, padding counted",
        "gradient checkpointing": "on" if sizes.gradient_checkpointing else "off",
        f"memory on {device.type}: base model": size(memory.weights),
        f"memory on {device.type}: adapters and gradients": size(memory.bank),
        f"memory on {device.type}: optimizer": size(memory.optimizer),
        f"memory on {device.type}: activations": size(memory.activations),
        f"memory on {device.type}: logits held at once": size(memory.logits),
        "memory on the host: a commit under way": size(snapshot_bytes(sizes.per_device, P)),
        f"memory on {device.type}: peak": f"{size(memory.total)} of {size(free)} free"
        + ("" if memory.total < free else ": TOO MUCH"),
        "disk": f"{size(on_disk)} of {size(room)} free",
        "run folder": f"{folder} ({'holds a run: train goes on with --resume' if in_use else 'new'})",
    }


def require_processes(config: RunConfig, processes: int) -> None:
    """Raises RequestError for more processes than adapters, which train whole."""
    if processes > config.adapters.count:
        raise RequestError(
            f"{processes} processes for {config.adapters.count} adapters: some would have nothing to do",
            where="adapters.count",
            fix=f"start at most {config.adapters.count} processes, or raise adapters.count",
        )


def _validation_cost(data: TrainingData, per_device: int, every: int | None) -> str:
    """The forward passes of a pack's validations, in tokens: base, adapters and merge see every row."""
    if not data.validation:
        return "none: there are no validation rows"
    times = 1 + ((data.total_steps - 1) // every if every else 0)
    tokens = (per_device + 2) * sum(len(e.ids) for e in data.validation)
    return f"{times * tokens:,} tokens: {len(data.validation)} rows by {per_device + 2} models, {times} times a pack"


def _span(pack: list[int]) -> str:
    """Adapters that follow each other, as all packs of a new run do."""
    return f"{pack[0]}" if len(pack) == 1 else f"{pack[0]} to {pack[-1]} together"


def disk_bytes(config: RunConfig, parameters: int, at_once: int, waiting: int = 0) -> int:
    """Bytes of a run's commits, each with weights and moments of one pack a rank, and of its adapters.

    at_once: how many adapters train at the same time. waiting: how many more have begun; all commits share the state
    of these.
    """
    states = (config.checkpoint.keep + 1) * at_once + waiting
    return 4 * parameters * (3 * states + config.adapters.count)


def require_room(folder: Path, needed: int) -> int:
    """Free bytes where `folder` is or will be. Raises RequestError where they are too few."""
    free = free_bytes_at(folder)
    if free < needed:
        raise RequestError(
            f"checkpoints and adapters need {size(needed)}, {size(free)} are free",
            where=folder,
            fix="free some space, set output to another disk, or lower adapters.count, lora.rank or checkpoint.keep",
        )
    return free


def size(nbytes: int) -> str:
    """Bytes as a person reads them: 1.5 GB is 1.5e9 bytes."""
    for unit, width in (("GB", 1e9), ("MB", 1e6)):
        if nbytes >= width:
            return f"{nbytes / width:.1f} {unit}"
    return f"{nbytes / 1e3:.0f} kB"
