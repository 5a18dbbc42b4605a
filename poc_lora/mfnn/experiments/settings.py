"""The schema of the experiments' configurations, configs/mfnn/NAME.yaml: full sizes, under `quick` what is smaller."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from poc_lora.config_files import (
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
    Seed,
    apply_overrides,
    read_config,
    validate_as,
)
from poc_lora.mfnn import problems
from poc_lora.mfnn.model import Neuron, Objective, Tanh, TanhBias

Widths = Annotated[tuple[Positive, ...], Field(min_length=1)]
Temperatures = Annotated[tuple[NonNegativeFloat, ...], Field(min_length=1)]

_HERE = Path(__file__).parent
# The wheel carries the checkout's configs/mfnn beside this module.
_FOLDERS = (_HERE / "configs", _HERE.parents[2] / "configs" / "mfnn")


class Training(Section):
    """How networks of one problem are trained: see poc_lora.mfnn.langevin."""

    neuron: Literal["tanh", "tanh_bias"] = "tanh"
    bound: PositiveFloat  # R
    lr: PositiveFloat
    regularization: NonNegativeFloat  # λ'
    steps: Positive
    samples: Positive
    noise: NonNegativeFloat

    def objective(self, problem: problems.Problem) -> Objective:
        """F for this problem's training samples."""
        neuron: Neuron = (Tanh if self.neuron == "tanh" else TanhBias)(problem.dim, self.bound)
        return Objective(neuron, problem.loss, problem.inputs, problem.targets, self.regularization)


class DoubleCircle(Training):
    """Classification of two circles."""

    def problem(self, seed: int) -> problems.Problem:
        """The samples; see poc_lora.mfnn.problems."""
        return problems.double_circle(self.samples, noise=self.noise, seed=seed)


class MultiIndex(Training):
    """Multi-index regression."""

    dim: Positive
    directions: Positive

    def problem(self, seed: int) -> problems.Problem:
        """The samples; see poc_lora.mfnn.problems."""
        return problems.multi_index(self.samples, self.dim, self.directions, noise=self.noise, seed=seed)


class Started(Section):
    """Neurons start from N(0, initial_std² I)."""

    initial_std: NonNegativeFloat = 1.0


class StartedMultiIndex(MultiIndex, Started):
    """Multi-index regression from a given start."""


class DoubleCircleAt(DoubleCircle, Started):
    """Two circles from a given start, at a given temperature."""

    temperature: NonNegativeFloat  # λ


class MultiIndexAt(StartedMultiIndex):
    """Multi-index regression from a given start, at a given temperature."""

    temperature: NonNegativeFloat  # λ


class Settings(Section):
    """What every experiment has: the seed that all its draws descend from."""

    seed: Seed = 0


def _check_members(members: tuple[int, ...], networks: int) -> None:
    if max(members) > networks:
        raise ValueError(f"members has {max(members)}, but only {networks} networks are trained (networks)")


class Figure1(Settings):
    """Sup norm against M and N."""

    double_circle: DoubleCircleAt
    multi_index: MultiIndexAt
    widths: Widths  # N
    members: Widths  # M
    networks: Positive  # trained for every N, and merged in groups of M
    reference_width: Positive

    @model_validator(mode="after")
    def _members(self) -> "Figure1":
        _check_members(self.members, self.networks)
        return self


class Figure2(Settings):
    """MSE per epoch."""

    multi_index: MultiIndex
    initial_stds: Annotated[tuple[NonNegativeFloat, ...], Field(min_length=1)]
    temperatures: Temperatures
    width: Positive
    networks: Positive


class Table2(Settings):
    """Merged error, λ by N."""

    multi_index: StartedMultiIndex
    temperatures: Temperatures
    widths: Widths
    members: Positive  # M
    ensembles: Positive  # merges, of M networks of their own, whose spread gives the standard error


class Chain(Section):
    """The chain of linear neurons."""

    dim: Positive
    samples: Positive
    regularization: PositiveFloat
    temperature: PositiveFloat
    lr: PositiveFloat
    early_steps: Positive  # where the mean is still on its way
    steps: Positive  # where it has arrived
    initial_std: PositiveFloat
    widths: Widths
    networks: Positive
    ensemble_width: Positive
    members: Widths

    @model_validator(mode="after")
    def _sizes(self) -> "Chain":
        _check_members(self.members, self.networks)
        if self.early_steps >= self.steps:
            raise ValueError(f"early_steps, {self.early_steps}, is not less than steps, {self.steps}")
        if min(self.widths) < 2:
            raise ValueError("widths has 1, where two neurons' correlation is asked for")
        return self


class ClosedForm(Section):
    """The grid on which the gap is compared with its bound."""

    temperatures: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]
    dims: Widths
    widths: Widths


class Bounded(Section):
    """Networks of bounded neurons against the limit."""

    multi_index: StartedMultiIndex
    temperatures: Temperatures
    widths: Widths
    networks: Positive
    reference_width: Positive


class Poc(Settings):
    """Propagation of chaos where it can be solved, and with bounded neurons."""

    closed_form: ClosedForm
    chain: Chain
    bounded: Bounded


SCHEMAS: dict[str, type[Settings]] = {"figure1": Figure1, "figure2": Figure2, "table2": Table2, "poc": Poc}


def load(name: str, *, quick: bool = False, overrides: Sequence[str] = (), path: Path | None = None) -> Settings:
    """Read the settings of an experiment: its file, then the smaller sizes of `quick`, then the overrides.

    Args:
        name: One of SCHEMAS.
        quick: Apply the file's section `quick`.
        overrides: Settings such as `seed=1`.
        path: Another file than configs/mfnn/NAME.yaml.

    Raises:
        ConfigError: If the file cannot be read, or a key or value does not fit the schema.
    """
    path = path or next(folder for folder in _FOLDERS if folder.is_dir()) / f"{name}.yaml"
    raw = read_config(path)
    smaller = raw.pop("quick", None) or {}
    if quick:
        raw = _merged(raw, smaller)
    apply_overrides(raw, overrides)
    return validate_as(SCHEMAS[name], raw, where=path)


def _merged(tree: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """The tree with the values of `over` set in it, section by section."""
    result = dict(tree)
    for key, value in over.items():
        both = isinstance(result.get(key), dict) and isinstance(value, dict)
        result[key] = _merged(result[key], value) if both else value
    return result
