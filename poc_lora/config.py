"""The schema of a run: a YAML file plus `key=value` overrides, checked by one validator.

Precedence: override, then file, then default. There is no field for a token or a password.
"""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from poc_lora.errors import ConfigError
from poc_lora.files import read_text

MAX_CONFIG_BYTES = 2**20

Positive = Annotated[int, Field(gt=0, strict=True)]
NonNegative = Annotated[int, Field(ge=0, strict=True)]
NonNegativeFloat = Annotated[float, Field(ge=0, strict=True, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, strict=True, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1, strict=True, allow_inf_nan=False)]
Flag = Annotated[bool, Field(strict=True)]
Name = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    # The docstrings of the keys are their descriptions in docs/configuration.md.
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ModelSection(Section):
    """The frozen base model: a local folder or a Hub id."""

    name: Name
    """The base model: a folder, or a Hub id such as `org/name`."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id; `null`: its default branch."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the base's weights. `auto`: bfloat16 on a GPU, float32 on a CPU."""
    quantization: Literal["nf4", "int8"] | None = None
    """Load the base in 4 or 8 bits with bitsandbytes; `dtype` is then the type to compute in."""
    shard: Flag = False
    """Shard the base over the processes, which gather it layer by layer (FSDP2)."""

    @model_validator(mode="after")
    def _can_be_sharded(self) -> "ModelSection":
        if self.shard and self.quantization == "int8":
            raise ValueError("int8 weights cannot be sharded: set model.quantization to nf4 or null")
        return self


class LoraSection(Section):
    """The update W x + (alpha / rank) B A x of every target module."""

    rank: Positive = 32
    """The rank of each adapter."""
    alpha: PositiveFloat = 64.0
    """The update is scaled by alpha / rank."""
    dropout: Fraction = 0.0
    """Dropout probability of the adapters' inputs."""
    targets: Annotated[tuple[Name, ...], Field(min_length=1)] = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
    """Names of the linear layers to adapt, as in PEFT's `target_modules`."""


class AdaptersSection(Section):
    """How many adapters, and the seed that all their draws descend from."""

    count: Positive = 8
    """M, the number of adapters. It may grow when a run is resumed."""
    per_device: Literal["auto"] | Positive = "auto"
    """Adapters trained at once on a device. `auto`: as many as fit in its memory."""
    seed: NonNegative = 0
    """The seed of all random draws of the run."""


class DataSection(Section):
    """Training rows and how they become tokens."""

    train: Annotated[tuple[Name, ...], Field(min_length=1)]
    """Sources of training rows: `.json` or `.jsonl` files, folders of `train.json` files, or Hub data sets."""
    prompt: Literal["clean", "llm-adapters", "bare"] = "clean"
    """The prompt template of instruction rows. `bare`: the instruction alone."""
    max_length: Positive = 256
    """Longest row in tokens; longer rows are truncated."""
    train_on_prompt: Flag = True
    """Whether the loss includes the prompt's tokens, or only the answer's."""
    group_by_length: Flag = True
    """Batch rows of similar length together, which saves padding."""
    validation: NonNegative = 120
    """Rows held out of training to measure the validation loss."""


class OptimSection(Section):
    """Noisy AdamW: see poc_lora.optim.noisy_adamw for the update. `temperature` is λ."""

    lr: PositiveFloat = 1e-4
    """Peak learning rate."""
    temperature: NonNegativeFloat = 1e-6
    """λ: the variance of the noise is 2 · lr · λ per step. 0 is plain AdamW."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """AdamW's decay rates of the two moments."""
    eps: PositiveFloat = 1e-8
    """AdamW's term added to the denominator for numerical stability."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's decoupled weight decay."""
    schedule: Literal["linear", "constant"] = "linear"
    """Learning rate after warm-up: linear to zero, or constant."""
    warmup_steps: NonNegative = 100
    """Optimizer steps in which the learning rate rises linearly from zero."""
    max_grad_norm: PositiveFloat = 1.0
    """Each adapter's gradient is clipped to this norm."""


class TrainSection(Section):
    """Length of training; `batch_size` counts rows per adapter and optimizer step."""

    epochs: PositiveFloat | None = None
    """Passes over the training rows. If neither this nor `max_steps` is given: 3."""
    max_steps: Positive | None = None
    """Optimizer steps per adapter, instead of `epochs`."""
    batch_size: Positive = 16
    """Rows per adapter and optimizer step."""
    tokens_per_microbatch: Literal["auto"] | Positive = "auto"
    """Tokens per micro-batch over all adapters, padding counted. `auto`: by the device and its memory."""
    gradient_checkpointing: Literal["auto"] | Flag = "auto"
    """Recompute activations to save memory. `auto`: where they would not fit."""
    compile: Flag = False
    """Compile the base's elementwise parts with torch.compile."""
    validate_every: Positive | None = None
    """Validate every so many optimizer steps; `null`: at the end only."""

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
    track: tuple[Track, ...] = ()
    """Experiment trackers, by accelerate's names; metrics.jsonl is always written."""
    output: Name
    """The run folder. It must be new or empty unless the run is resumed."""


def load_config(path: Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read `path`, apply overrides such as `optim.lr=1e-4`, validate.

    Relative paths inside the file stay relative to the current folder. Raises ConfigError.
    """
    raw = parse_yaml(read_text(path, error=ConfigError, max_bytes=MAX_CONFIG_BYTES), where=str(path))
    if not isinstance(raw, dict):
        raise ConfigError("the file is not a mapping of sections", where=path, fix="start from configs/demo.yaml")
    for override in overrides:
        _apply_override(raw, override)
    return validate(raw, where=str(path))


def validate(raw: dict[str, Any], *, where: str) -> RunConfig:
    """Turn plain dictionaries into a RunConfig; every problem is named by its dotted key."""
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as problem:
        lines = [_describe(error) for error in problem.errors()]
        raise ConfigError("\n  ".join(["the configuration is not valid:", *lines]), where=where) from problem


def dump_yaml(config: RunConfig) -> str:
    """The configuration as YAML that `load_config` reads back to an equal object."""
    plain = config.model_dump(mode="json", exclude_none=True)
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False)


def changed_keys(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, each with its old and new value."""
    before, after = flatten(old), flatten(new)
    return {k: (before.get(k), after.get(k)) for k in before | after if before.get(k) != after.get(k)}


def flatten(config: RunConfig) -> dict[str, Any]:
    """Every setting by its dotted key."""
    return _flatten(config.model_dump())


class _Loader(yaml.SafeLoader):
    """A safe loader that reads 1e-4 as a number, and refuses aliases and repeated keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError(f"aliases are not allowed{self.peek_event().start_mark}")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep=deep)
        if len(mapping) != len(node.value):
            raise yaml.YAMLError(f"a key is repeated in the mapping that starts{node.start_mark}")
        return mapping


class _Dumper(yaml.SafeDumper):
    """A safe dumper that quotes text which `_Loader` would read as a number."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),
        list("-+.0123456789"),
    )


def parse_yaml(text: str, *, where: str) -> Any:
    """Parse YAML without running anything from it. Raises ConfigError."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506  (a SafeLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as problem:
        raise ConfigError(f"not valid YAML: {problem}", where=where) from problem


def _apply_override(raw: dict[str, Any], override: str) -> None:
    dotted, separator, text = override.partition("=")
    if not separator or not dotted:
        raise ConfigError(
            f"'{override}' is not of the form key=value", where="overrides", fix="for example optim.lr=1e-4"
        )
    *sections, last = dotted.split(".")
    node = raw
    for section in sections:
        if node.get(section) is None:
            node[section] = {}
        node = node[section]
        if not isinstance(node, dict):
            raise ConfigError(f"'{section}' in '{dotted}' is not a section", where="overrides")
    node[last] = parse_yaml(text, where=f"override {override}")


def _describe(error: Any) -> str:
    # Past section and key, a location holds list positions and, for unions, names of types.
    dotted = ".".join(str(part) for i, part in enumerate(error["loc"]) if i < 2 or isinstance(part, int))
    if error["type"] == "extra_forbidden":
        near = _nearest_key(dotted)
        return f"{dotted}: no such key" + (f"; did you mean '{near}'?" if near else "")
    if error["type"] == "missing":
        return f"{dotted}: required but not given"
    if error["type"] == "value_error":
        return f"{dotted}: {error['ctx']['error']}"
    plain = {"tuple_type": "must be a list, such as [a, b]", "model_type": "must be a section of keys and values"}
    return f"{dotted}: {plain.get(error['type'], error['msg'])} (got {error['input']!r:.80})"


def _nearest_key(dotted: str) -> str | None:
    """The known key that a mistyped one stands for: in the wrong section, or misspelt."""
    ends = {key.split(".")[-1]: key for key in all_keys()}
    end = dotted.split(".")[-1]
    if end in ends:
        return ends[end]
    for word, known in ((dotted, {key: key for key in all_keys()}), (end, ends)):
        if near := difflib.get_close_matches(word, known, n=1, cutoff=0.5):
            return known[near[0]]
    return None


def all_keys() -> list[str]:
    """Every dotted key of the schema, sections included."""
    keys: list[str] = []
    for name, field in RunConfig.model_fields.items():
        keys.append(name)
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            keys += [f"{name}.{inner}" for inner in section.model_fields]
    return keys


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
