"""What a run will do, found out before it starts: rows, steps, parameters, and bytes that can be counted."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from poc_lora import rng
from poc_lora.config import RunConfig
from poc_lora.data.batches import BatchOrder, supervised_tokens
from poc_lora.data.prompts import Example, encode_rows
from poc_lora.data.rows import read_sources, source_files
from poc_lora.errors import ConfigError, DataError
from poc_lora.files import sha256_file
from poc_lora.lora.bank import AdapterBank
from poc_lora.lora.base import context_length, default_device, empty_base, load_tokenizer, resolve_dtype

# Bytes kept per adapter parameter: the weight, its gradient and two moments, float32.
BYTES_PER_PARAMETER = 4 * 4


@dataclass(frozen=True)
class TrainingData:
    """Tokenised rows, split, with the order in which they are drawn."""

    train: list[Example]
    validation: list[Example]
    order: BatchOrder
    total_steps: int
    shortened: int
    lost: int
    files: dict[str, str]  # path, and "tokenised rows" -> sha256


def prepare_data(config: RunConfig, tokenizer: PreTrainedTokenizerBase, *, context: int | None = None) -> TrainingData:
    """Read, tokenise and split the rows of a run; `context` is the most tokens that the base model takes.

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
        read_sources(section.train), tokenizer, template=section.prompt, max_length=section.max_length
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
            "tokenised rows": hashlib.sha256(repr([e.ids for e in encoded.examples]).encode()).hexdigest(),
        },
    )


def check(config: RunConfig) -> dict[str, Any]:
    """Validate a run without weights; returns what it will do, as names and values for a person to read.

    Raises the error that `train` would: schema, rows, target modules. Bytes are those that can be counted
    beforehand: activations are not among them, and time is not estimated.
    """
    model = empty_base(config.model.name, revision=config.model.revision)
    bank = AdapterBank(model, targets=config.lora.targets, rank=config.lora.rank, alpha=config.lora.alpha, adapters=[])
    tokenizer = load_tokenizer(config.model.name, revision=config.model.revision)
    data = prepare_data(config, tokenizer, context=context_length(model))
    M, parameters = config.adapters.count, bank.parameters_per_adapter
    tokens = sum(len(e.ids) for e in data.train)
    learnt = sum(supervised_tokens(e, train_on_prompt=config.data.train_on_prompt) for e in data.train)
    folder = Path(config.output)
    width = getattr(torch, resolve_dtype(config.model.dtype, default_device())).itemsize
    return {
        "base parameters": sum(p.numel() for p in model.parameters()),
        "adapters": M,
        "parameters per adapter": parameters,
        "adapted modules": len(bank.modules),
        "training rows": len(data.train),
        "validation rows": len(data.validation),
        "rows shortened to max_length": data.shortened,
        "rows left out (whole answer cut off)": data.lost,
        "tokens per epoch": tokens,
        "supervised tokens per epoch": learnt,
        "rows per step and adapter": config.train.batch_size,
        "steps": data.total_steps,
        "bytes of the base model": sum(p.numel() for p in model.parameters()) * width,
        "bytes of the bank and its optimizer": M * parameters * BYTES_PER_PARAMETER,
        "bytes of one checkpoint": M * parameters * 3 * 4,
        "run folder": f"{folder} ({'exists' if folder.exists() else 'new'})",
    }
