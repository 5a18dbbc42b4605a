"""The schema of a training run: a YAML file plus `key=value` overrides. It has no field for a token or a password."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field, field_validator, model_validator

from poc_lora import config_files
from poc_lora.config_files import (
    Flag,
    Fraction,
    ListOrOne,
    Name,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
    Seed,
    apply_overrides,
    read_config,
    validate_as,
    with_overrides,
)
from poc_lora.errors import RequestError
from poc_lora.files import write_atomic

MAX_ADAPTERS = 4096
MAX_RANK = 4096  # of any adapter, trained, merged or read

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["nf4", "int8", "fp8"]
PromptTemplate = Literal["clean", "llm-adapters", "bare"]


class ModelSection(Section):
    """The frozen base model: a local folder or a Hub id."""

    name: Name
    """The base model: a folder, or a Hub id such as `org/name`."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id; `null`: its default branch."""
    dtype: Dtype = "auto"
    """Data type of the base's weights. `auto`: bfloat16 on a GPU, float32 on a CPU, where bfloat16 may be far faster:
    `check` measures that."""
    quantization: Quantization | None = None
    """`nf4`, `int8`: the base in 4 or 8 bits by bitsandbytes. `fp8`: its matmuls in float8. `dtype` is for all else."""
    shard: Flag = False
    """Shard the base over the processes, which gather it layer by layer (FSDP2)."""

    def is_sharded(self, ranks: int) -> bool:
        """Whether the base is sharded if that many ranks train."""
        return self.shard and ranks > 1

    @model_validator(mode="after")
    def _can_be_sharded(self) -> "ModelSection":
        if self.shard and self.quantization in ("int8", "fp8"):
            raise ValueError(f"{self.quantization} weights cannot be sharded: set model.quantization to nf4 or null")
        return self


ALL_LINEAR: Final = "all-linear"
Targets = Literal["all-linear"] | Sequence[str]


class LoraSection(Section):
    """The update W x + (alpha / rank) B A x of every target module."""

    rank: Annotated[Positive, Field(le=MAX_RANK)] = 32
    """The rank of each adapter."""
    alpha: PositiveFloat = 64.0
    """The update is scaled by alpha / rank."""
    dropout: Fraction = 0.0
    """Dropout probability of the adapters' inputs."""
    targets: Literal["all-linear"] | Annotated[tuple[Name, ...], Field(min_length=1), ListOrOne] = ALL_LINEAR
    """Names of the linear layers to adapt, as in PEFT's `target_modules`. `all-linear`: every one but the output head.
    The default: it fits any base, and LoRA on all of them is what matched full fine-tuning in QLoRA (section 4)."""


Varied = Literal["optim.lr", "optim.temperature", "lora.alpha"]


class AdaptersSection(Section):
    """How many adapters, the seed that all their draws descend from, and settings in which they differ."""

    count: Annotated[Positive, Field(le=MAX_ADAPTERS)] = 8
    """M, the number of adapters. It may grow when a run is resumed."""
    per_device: Literal["auto"] | Positive = "auto"
    """Adapters trained at once on a device. `auto`: as many as fit in its memory."""
    seed: Seed = 0
    """The seed of all random draws of the run."""
    vary: dict[Varied, Annotated[tuple[NonNegativeFloat, ...], Field(min_length=1)]] = Field(default={})
    """A value of a key for each adapter, in place of that key's own: a sweep in one pack. The keys are `optim.lr`,
    `optim.temperature` and `lora.alpha`. A shorter list is repeated, so its length must divide `count`: with values a
    and b, adapters 0, 2, 4 have a, and 1, 3, 5 b."""

    @field_validator("vary", mode="before")
    @classmethod
    def _join_dotted_keys(cls, raw: Any) -> Any:
        """As an override, `adapters.vary.optim.lr=[...]`, makes sections of the key's parts."""
        return config_files.flatten(raw) if isinstance(raw, dict) else raw

    @model_validator(mode="after")
    def _each_adapter_has_a_value(self) -> "AdaptersSection":
        for key, values in self.vary.items():
            if self.count % len(values):
                fits = ", ".join(str(n) for n in range(1, self.count) if self.count % n == 0)
                raise ValueError(
                    f"vary.{key} has {len(values)} values for {self.count} adapters: give {self.count}, or as many as"
                    f" divide it ({fits}), which are repeated"
                )
            if key != "optim.temperature" and not min(values) > 0:
                raise ValueError(f"vary.{key} has the value {min(values):g}, which must be above 0")
        return self


Learn = Literal["last", "assistant", "all"]
COLUMNS = (  # of the formats
    "instruction", "input", "output", "prompt", "completion", "question", "choices", "answer", "messages",
    "tools", "system", "text",
)  # fmt: skip


class DataSection(Section):
    """Training rows and how they become tokens."""

    train: Annotated[tuple[Name, ...], Field(min_length=1), ListOrOne]
    """Sources of rows: files (`.json`, `.jsonl`, `.jsonl.gz`, `.csv`, `.parquet`), folders of `train.json` files, or
    Hub data sets (`org/name`, or `org/name:split`)."""
    columns: dict[Name, Name | None] = Field(default={})
    """Columns of the rows, renamed to the format's, or left out by `null`. `messages.KEY`: a key of a chat's turns."""
    skip_bad_rows: Flag = False
    """Leave out rows that cannot be used, and count them, instead of refusing them."""
    prompt: PromptTemplate = "clean"
    """The prompt template of instruction rows. `bare`: the instruction alone."""
    max_length: Literal["auto"] | Positive = "auto"
    """Longest row in tokens; longer rows are truncated. `auto`: 2048, or the base's context if that is shorter."""
    learn: Learn = "assistant"
    """Tokens with a loss: the answer (a chat's `last` turn), every turn of the `assistant`, or `all`. The default is
    every answer, since prompts come from others when the model is used; `all` is for texts to be learnt whole."""
    chat_template: Name | None = None
    """A Jinja file that renders chats in place of the base's chat template; it is written beside the adapters."""
    group_by_length: Flag = True
    """Batch rows of similar length together, which saves padding."""
    validation: Literal["auto"] | NonNegative = "auto"
    """Rows held out of training to measure the validation loss. `auto`: a tenth of the rows, at most 120."""
    validation_files: Annotated[tuple[Name, ...], ListOrOne] = ()
    """Files or Hub data sets of rows to measure the validation loss on; none are then held out of `train`."""

    @model_validator(mode="before")
    @classmethod
    def _knows_what_to_learn(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and "train_on_prompt" in raw:
            raise ValueError("train_on_prompt is now `learn`: write learn: all for true, learn: last for false")
        return raw

    @model_validator(mode="after")
    def _one_source_of_validation_rows(self) -> "DataSection":
        if self.validation_files and self.validation not in ("auto", 0):
            raise ValueError(f"give validation_files, or validation: {self.validation} rows of train, not both")
        return self

    @model_validator(mode="after")
    def _columns_are_ours(self) -> "DataSection":
        for theirs, ours in self.columns.items():
            if ours is not None and "." not in theirs and ours not in COLUMNS:
                raise ValueError(f"columns maps '{theirs}' to '{ours}', which is none of {', '.join(COLUMNS)}")
        return self


class OptimSection(Section):
    """Noisy AdamW: see poc_lora.optim.noisy_adamw for the update. `temperature` is λ."""

    lr: PositiveFloat = 1e-4
    """Peak learning rate."""
    temperature: NonNegativeFloat = 1e-5
    """λ: the variance of the noise is 2 · lr · λ per step. 0 is plain AdamW. The default is that of the paper's
    Table 1; on the micro-world it could not be told from 0."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """AdamW's decay rates of the two moments."""
    eps: PositiveFloat = 1e-8
    """AdamW's term added to the denominator for numerical stability."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's decoupled weight decay."""
    schedule: Literal["linear", "constant"] = "linear"
    """Learning rate after warm-up: linear to zero, or constant."""
    warmup_steps: Literal["auto"] | NonNegative = "auto"
    """Optimizer steps in which the learning rate rises linearly from zero. `auto`: a tenth of all, at most 100."""
    max_grad_norm: PositiveFloat = 1.0
    """Each adapter's gradient is clipped to this norm."""


class TrainSection(Section):
    """Length of training; `batch_size` counts rows per adapter and optimizer step."""

    epochs: Annotated[PositiveFloat, Field(le=1e6)] | None = None
    """Passes over the training rows. If neither this nor `max_steps` is given: 3."""
    max_steps: Positive | None = None
    """Optimizer steps per adapter, instead of `epochs`."""
    batch_size: Annotated[Positive, Field(le=65_536)] = 16
    """Rows per adapter and optimizer step."""
    tokens_per_microbatch: Literal["auto"] | Positive = "auto"
    """Tokens per micro-batch over all adapters, padding counted. `auto`: by the device and its memory."""
    gradient_checkpointing: Literal["auto"] | Flag = "auto"
    """Recompute activations to save memory. `auto`: where they would not fit."""
    compile: Literal["auto"] | Flag = "auto"
    """Compile elementwise work with torch.compile. `auto`: on a GPU where that works."""
    validate_every: Positive | None = None
    """Validate every so many optimizer steps; `null`: at the end only."""
    keep: Literal["last", "best"] = "last"
    """The weights that each adapter ends with: those of the last step, or those of its lowest validation loss."""

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
    """Optimizer steps from one commit to the next."""
    keep: Positive = 2
    """Number of newest commits to keep."""


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
    track: Annotated[tuple[Track, ...], ListOrOne] = ()
    """Experiment trackers, by accelerate's names; metrics.jsonl is always written."""
    output: Name
    """The run folder. It must be new or empty unless the run is resumed."""

    def of_adapter(self, adapter: int) -> "RunConfig":
        """Returns the configuration of one adapter: its values of `adapters.vary` are in place of the keys' own."""
        changes: dict[str, Any] = {"adapters": self.adapters.model_copy(update={"vary": {}})}
        for key in self.adapters.vary:
            section, _, name = key.partition(".")
            before = changes.get(section, getattr(self, section))
            changes[section] = before.model_copy(update={name: self.value(key, adapter)})
        return self.model_copy(update=changes)

    def value(self, key: Varied, adapter: int) -> float:
        """Returns an adapter's value of a key: its own of `adapters.vary`, whose lists are repeated, or the key's."""
        if values := self.adapters.vary.get(key):
            return values[adapter % len(values)]
        section, _, name = key.partition(".")
        return float(getattr(getattr(self, section), name))

    def values(self, key: Varied) -> list[float]:
        """Returns the values of a key over the adapters, each once: one, unless the key is varied."""
        return list(dict.fromkeys(self.value(key, adapter) for adapter in range(self.adapters.count)))

    def in_words(self, key: Varied) -> str:
        """Returns the value of a key as text; if it is varied, all of them."""
        values = self.values(key)
        return ", ".join(f"{value:g}" for value in values) + (" by adapter" if len(values) > 1 else "")

    @model_validator(mode="after")
    def _has_losses_to_choose_by(self) -> "RunConfig":
        if self.train.keep == "best":
            if self.train.validate_every is None:
                raise ValueError("train.keep: best chooses by validation losses: set train.validate_every, such as 80")
            if self.data.validation == 0 and not self.data.validation_files:
                raise ValueError("train.keep: best chooses by validation losses: set data.validation, such as 120")
        return self


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's YAML file, apply overrides and validate.

    Args:
        path: The file. Relative paths inside it are relative to the current folder.
        overrides: Settings that replace the file's, such as `optim.lr=1e-4`.

    Raises:
        ConfigError: If the file cannot be read, or a key or value does not fit the schema.
    """
    raw = read_config(Path(path))
    apply_overrides(raw, overrides)
    return validate(raw, where=with_overrides(path, overrides))


INTRODUCTION = """\
# A run of poc-lora: every key with its meaning and its default. What you delete keeps its default.
# KEY=VALUE on the command line replaces a key: poc-lora train FILE optim.lr=2e-4
"""


def write_template(path: Path, *, model: str, data: Sequence[str], output: str) -> None:
    """Write a new YAML file with every key of a run, its meaning and its default.

    Args:
        path: The file, which must not exist.
        model: The base model: `model.name`.
        data: Sources of training rows: `data.train`.
        output: The run folder.

    Raises:
        RequestError: The file exists, or cannot be written.
    """
    if path.exists() or path.is_symlink():
        raise RequestError("the file exists already", where=path, fix="name a new file, or remove this one")
    given = {"model.name": model, "data.train": list(data), "output": output}
    write_atomic(path, INTRODUCTION + config_files.template(RunConfig, given))


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
