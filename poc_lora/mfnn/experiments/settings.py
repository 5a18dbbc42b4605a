"""The schema of the experiments' configurations, configs/mfnn/NAME.yaml: full sizes, under `quick` what is smaller."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

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
    with_overrides,
)
from poc_lora.mfnn import problems
from poc_lora.mfnn.model import Neuron, Objective, Tanh, TanhProduct

Widths = Annotated[tuple[Positive, ...], Field(min_length=1)]
Temperatures = Annotated[tuple[NonNegativeFloat, ...], Field(min_length=1)]

_HERE = Path(__file__).parent
# The wheel carries the checkout's configs/mfnn beside this module.
_FOLDERS = (_HERE / "configs", _HERE.parents[2] / "configs" / "mfnn")


class Training(Section):
    """How networks of one problem are trained: see poc_lora.mfnn.langevin."""

    bound: PositiveFloat  # R
    lr: PositiveFloat
    regularization: NonNegativeFloat  # λ'
    epochs: Positive
    batch_size: Positive | None = None  # None: all samples at every step
    samples: Positive

    def neuron(self, dim: int) -> Neuron:
        """The kind of neuron, for inputs in R^dim: the paper's."""
        return TanhProduct(dim, self.bound)

    def problem(self, seed: int) -> problems.Problem:
        """The samples; see poc_lora.mfnn.problems."""
        raise NotImplementedError

    def objective(self, problem: problems.Problem) -> Objective:
        """F for this problem's training samples."""
        return Objective(self.neuron(problem.dim), problem.loss, problem.inputs, problem.targets, self.regularization)


class DoubleCircle(Training):
    """Classification of two circles, the paper's."""

    noise: NonNegativeFloat

    def problem(self, seed: int) -> problems.Problem:
        return problems.double_circle(self.samples, noise=self.noise, seed=seed)


class MultiIndex(Training):
    """Multi-index regression, the paper's."""

    dim: Positive  # d
    directions: Positive  # k
    scale: PositiveFloat  # R̄
    radius: PositiveFloat  # r

    def problem(self, seed: int) -> problems.Problem:
        shape = {"scale": self.scale, "radius": self.radius}
        return problems.multi_index(self.samples, self.dim, self.directions, **shape, seed=seed)


class Sines(Training):
    """Regression of a few sines, ours, with neurons of one tanh."""

    noise: NonNegativeFloat
    dim: Positive
    directions: Positive

    def neuron(self, dim: int) -> Neuron:
        return Tanh(dim, self.bound)

    def problem(self, seed: int) -> problems.Problem:
        return problems.sines(self.samples, self.dim, self.directions, noise=self.noise, seed=seed)


class Started(Training):
    """Neurons start from N(0, initial_std² I)."""

    initial_std: NonNegativeFloat


class StartedMultiIndex(MultiIndex, Started):
    """Multi-index regression from a given start."""


class StartedSines(Sines, Started):
    """Sines from a given start."""


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
    networks: Positive  # trained for every N; of these M are merged
    subsets: Positive  # random subsets of M networks, whose mean is shown
    reference_width: Positive

    @model_validator(mode="after")
    def _members(self) -> "Figure1":
        _check_members(self.members, self.networks)
        return self


class Curves(Settings):
    """MSE per epoch."""

    initial_stds: Annotated[tuple[NonNegativeFloat, ...], Field(min_length=1)]
    temperatures: Temperatures
    widths: Widths
    networks: Positive

    @property
    def section(self) -> MultiIndex | Sines:
        """How networks are trained."""
        raise NotImplementedError


class Figure2(Curves):
    """The paper's problem and epochs."""

    multi_index: MultiIndex

    @property
    def section(self) -> MultiIndex:
        return self.multi_index


class Figure2Long(Curves):
    """Ours, trained to its end."""

    sines: Sines

    @property
    def section(self) -> Sines:
        return self.sines


class Table2(Settings):
    """Merged error, λ by N."""

    multi_index: StartedMultiIndex
    temperatures: Temperatures
    widths: Widths
    members: Positive  # M
    seeds: Positive  # data sets, seed and those after it, each with M networks of its own: their spread is shown


class Sweep(Settings):
    """Figure 2 over what the paper does not state, around the values that multi_index has."""

    multi_index: StartedMultiIndex
    lrs: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]
    batch_sizes: Widths
    initial_stds: Annotated[tuple[NonNegativeFloat, ...], Field(min_length=1)]
    temperatures: Annotated[tuple[PositiveFloat, ...], Field(min_length=2)]
    width: Positive
    networks: Positive


class Pruning(Settings):
    """Pruned networks beside networks trained at their size."""

    double_circle: DoubleCircleAt
    multi_index: MultiIndexAt
    kept: Widths  # s
    width: Positive  # N, pruned to s neurons, and of the reference
    networks: Positive  # trained with s neurons, and prunings of the one network of N

    @model_validator(mode="after")
    def _kept(self) -> "Pruning":
        if max(self.kept) > self.width:
            raise ValueError(f"kept has {max(self.kept)}, but the network to prune has {self.width} neurons (width)")
        return self


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

    sines: StartedSines
    temperatures: Temperatures
    widths: Widths
    networks: Positive
    reference_width: Positive


class Poc(Settings):
    """Propagation of chaos where it can be solved, and with bounded neurons."""

    closed_form: ClosedForm
    chain: Chain
    bounded: Bounded


SCHEMAS: dict[str, type[Settings]] = {
    "figure1": Figure1,
    "figure2": Figure2,
    "figure2_long": Figure2Long,
    "table2": Table2,
    "sweep": Sweep,
    "pruning": Pruning,
    "poc": Poc,
}


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
    return validate_as(SCHEMAS[name], raw, where=with_overrides(path, overrides))


def _merged(tree: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """The tree with the values of `over` set in it, section by section."""
    result = dict(tree)
    for key, value in over.items():
        both = isinstance(result.get(key), dict) and isinstance(value, dict)
        result[key] = _merged(result[key], value) if both else value
    return result
