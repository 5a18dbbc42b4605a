"""A run's metrics: lines of metrics.jsonl, and the same to experiment trackers such as TensorBoard."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from poc_lora.config import RunConfig, flatten
from poc_lora.errors import ConfigError
from poc_lora.training.run import Run
from poc_lora.training.step import Pack, StepResult

LOGGED_STEPS = 1000  # metrics.jsonl holds about so many steps of a run at most
PROJECT = "poc_lora"

Lines = list[dict[str, Any]]  # of fields of MetricsLine


class MetricsLogger:
    """Turns what happened into metric lines, one per step and adapter.

    Rank 0 writes its lines at once. The other ranks keep theirs until `take`, and rank 0 writes them by `write`.

    Args:
        run: The run whose metrics.jsonl is written.
        trackers: accelerate's experiment trackers.
        adapters: The number of adapters of the whole run.
        rank: This process's rank.
    """

    def __init__(self, run: Run, trackers: Sequence[Any] = (), *, adapters: int, rank: int = 0):
        self._run, self._trackers, self._adapters, self._rank = run, trackers, adapters, rank
        self._kept: list[tuple[list[int], Lines]] = []

    def step(self, pack: Pack, result: StepResult, step: int) -> None:
        """Log an optimizer step. Of long runs only about `LOGGED_STEPS` steps are logged, and every divergence."""
        adapters = pack.bank.adapters
        lines: Lines = [{"step": step, "adapter": adapters[slot], "diverged": True} for slot in result.diverged]
        if step % max(1, pack.data.total_steps // LOGGED_STEPS) == 0 or step == pack.data.total_steps:
            lines += [
                {
                    "step": step,
                    "adapter": adapters[slot],
                    "loss": result.losses[slot],
                    "grad_norm": result.grad_norms[slot],
                    "noise_norm": result.noise_norms[slot],
                    "lr": result.lrs[slot],
                }
                for slot in pack.live
            ]
        self._log(adapters, lines)

    def validation(
        self, pack: Pack, step: int, measures: Mapping[int | str, dict[str, Any]], *, kept: bool = False
    ) -> None:
        """Log what `validate` measured. `members` are the adapters of the merge: others may train in other packs."""
        members = [pack.bank.adapters[slot] for slot in pack.live]
        lines = [
            {"step": step, "adapter": name, **measured, "members": members} | ({"kept": True} if kept else {})
            for name, measured in measures.items()
        ]
        self._log(pack.bank.adapters, lines)

    def take(self) -> list[tuple[list[int], Lines]]:
        """Return the lines that this rank has kept for rank 0, each once."""
        kept, self._kept = self._kept, []
        return kept

    def write(self, adapters: Sequence[int], lines: Lines) -> None:
        """Write lines of a pack to metrics.jsonl and the trackers; on rank 0 only."""
        self._run.log(lines)
        for tracker in self._trackers:
            _track(tracker, lines, "" if len(adapters) == self._adapters else f"_{adapters[0]}-{adapters[-1]}")

    def _log(self, adapters: list[int], lines: Lines) -> None:
        if self._rank == 0:
            self.write(adapters, lines)
        else:
            self._kept.append((adapters, lines))


def _track(tracker: Any, lines: Lines, part: str) -> None:
    """Pass lines on as curves named MEASURE/ADAPTER, where ADAPTER is a number, `base`, `merge` or `merge_of_best`.

    The merge of a pack that is not the whole run is `merge_FIRST-LAST`: each pack has its own. Measures of the weights
    that `train.keep: best` chose begin with `kept_`.
    """
    for line in lines:
        name = f"{line['adapter']}{part}" if str(line["adapter"]).startswith("merge") else line["adapter"]
        kept = "kept_" if "kept" in line else ""
        values = {
            f"{kept}{measure}/{name}": float(value)
            for measure, value in line.items()
            if measure not in ("step", "adapter", "kept") and isinstance(value, int | float)
        }
        if tracker.name == "wandb":  # ignores a step before the last one, such as those of a second pack
            tracker.log({**values, "step": line["step"]})
        else:
            tracker.log(values, step=line["step"])


@contextlib.contextmanager
def open_trackers(config: RunConfig, run: Run) -> Iterator[Sequence[Any]]:
    """Open the experiment trackers of `config.track`, which write to RUN/trackers or to their own service.

    They receive the run's settings and metrics only.
    """
    if not config.track:
        yield ()
        return
    from accelerate import Accelerator

    folder = run.paths.trackers
    folder.mkdir(exist_ok=True)
    accelerator = Accelerator(log_with=list(config.track), project_dir=folder)
    settings = {key: value if isinstance(value, int | float) else str(value) for key, value in flatten(config).items()}
    accelerator.init_trackers(
        PROJECT, config=settings, init_kwargs={"wandb": {"dir": str(folder), "name": run.folder.name}}
    )
    if "wandb" in config.track:
        accelerator.get_tracker("wandb", unwrap=True).define_metric("*", step_metric="step")
    try:
        yield accelerator.trackers
    finally:
        for tracker in accelerator.trackers:  # accelerator.end_training would destroy the process group as well
            tracker.finish()


def require_trackers(config: RunConfig) -> None:
    """Raise ConfigError if a tracker of `config.track` is not installed."""
    if not config.track:
        return
    from accelerate.tracking import get_available_trackers

    available = [str(tracker) for tracker in get_available_trackers()]
    for name in config.track:
        if name not in available:
            raise ConfigError(
                f"the tracker '{name}' is not installed",
                where="track",
                fix=f"pip install {name}, or choose among: {', '.join(available) or 'none is installed'}",
            )
