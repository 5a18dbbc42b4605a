"""The schema of a training run: a YAML file plus `key=value` overrides. It has no field for a token or a password."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from poc_lora import config_files
from poc_lora.config_files import (
    Flag,
    Fraction,
    Name,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
    apply_overrides,
    read_config,
    validate_as,
)


class ModelSection(Section):
    """The frozen base model: a local folder or a Hub id."""

    name: Name
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 on GPU, float32 on CPU
    quantization: Literal["nf4", "int8"] | None = None  # by bitsandbytes; dtype is then what it computes in
    shard: Flag = False  # each process keeps a part of the base and gathers the rest layer by layer (FSDP2)

    @model_validator(mode="after")
    def _can_be_sharded(self) -> "ModelSection":
        if self.shard and self.quantization == "int8":
            raise ValueError("int8 weights cannot be sharded: set model.quantization to nf4 or null")
        return self


class LoraSection(Section):
    """The update W x + (alpha / rank) B A x of every target module."""

    rank: Positive = 32
    alpha: PositiveFloat = 64.0
    dropout: Fraction = 0.0
    targets: Annotated[tuple[Name, ...], Field(min_length=1)] = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")


class AdaptersSection(Section):
    """How many adapters, and the seed that all their draws descend from."""

    count: Positive = 8
    per_device: Literal["auto"] | Positive = "auto"  # trained at once; auto: as many as fit
    seed: NonNegative = 0


class DataSection(Section):
    """Training rows and how they become tokens."""

    train: Annotated[tuple[Name, ...], Field(min_length=1)]  # files, folders or Hub ids
    prompt: Literal["clean", "llm-adapters", "bare"] = "clean"
    max_length: Positive = 256
    train_on_prompt: Flag = True
    group_by_length: Flag = True
    validation: NonNegative = 120  # rows held out of training to measure the validation loss


class OptimSection(Section):
    """Noisy AdamW: see poc_lora.optim.noisy_adamw for the update. `temperature` is λ."""

    lr: PositiveFloat = 1e-4
    temperature: NonNegativeFloat = 1e-6
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    schedule: Literal["linear", "constant"] = "linear"
    warmup_steps: NonNegative = 100
    max_grad_norm: PositiveFloat = 1.0


class TrainSection(Section):
    """Length of training; `batch_size` counts rows per adapter and optimizer step."""

    epochs: PositiveFloat | None = None
    max_steps: Positive | None = None
    batch_size: Positive = 16
    tokens_per_microbatch: Literal["auto"] | Positive = "auto"  # over all adapters, padding counted
    gradient_checkpointing: Literal["auto"] | Flag = "auto"  # auto: on when the activations would not fit
    compile: Flag = False  # fuse the base model's elementwise parts with torch.compile
    validate_every: Positive | None = None  # steps; null: at the end only

    @model_validator(mode="after")
    def _one_length(self) -> "TrainSection":
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError("give epochs or max_steps, not both; the word null unsets one")
        if self.epochs is None and self.max_steps is None:
            object.__setattr__(self, "epochs", 3.0)
        return self


class CheckpointSection(Section):
    """A commit every so many steps; the newest `keep` stay."""

    every_steps: Positive = 200
    keep: Positive = 2


Track = Literal[
    "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"
]  # accelerate's


class RunConfig(Section):
    """Everything that determines a training run."""

    model: ModelSection
    lora: LoraSection = LoraSection()
    adapters: AdaptersSection = AdaptersSection()
    data: DataSection
    optim: OptimSection = OptimSection()
    train: TrainSection = TrainSection()
    checkpoint: CheckpointSection = CheckpointSection()
    track: tuple[Track, ...] = ()  # metrics.jsonl is always written
    output: Name


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's YAML file, apply overrides and validate.

    Args:
        path: The file. Relative paths inside it are relative to the current folder.
        overrides: Settings that replace the file's, such as `optim.lr=1e-4`.

    Raises:
        ConfigError: If the file cannot be read, or a key or value does not fit the schema.
    """
    raw = read_config(path)
    apply_overrides(raw, overrides)
    return validate(raw, where=str(path))


def validate(raw: dict[str, Any], *, where: str) -> RunConfig:
    """Turn plain dictionaries into a RunConfig. Raises a ConfigError that names every problem by its dotted key."""
    return validate_as(RunConfig, raw, where=where)


def dump_yaml(config: RunConfig) -> str:
    """Returns the configuration as YAML that `load_config` reads back to an equal object."""
    return config_files.dump_section(config)


def changed_keys(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Returns the dotted keys whose values differ, each with its old and new value."""
    before, after = flatten(old), flatten(new)
    return {k: (before.get(k), after.get(k)) for k in before | after if before.get(k) != after.get(k)}


def flatten(config: RunConfig) -> dict[str, Any]:
    """Returns every setting by its dotted key."""
    return config_files.flatten(config.model_dump())
