"""A run's metrics in the trackers that accelerate knows: TensorBoard, Weights & Biases, Trackio and others."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from poc_lora.config import RunConfig, flatten
from poc_lora.errors import ConfigError
from poc_lora.training.run import Run

PROJECT = "poc_lora"


class Trackers:
    """The trackers of one run, accelerate's objects; with none it does nothing.

    They are given the run's settings and metrics only.
    """

    def __init__(self, trackers: Sequence[Any] = (), adapters: int = 0):
        self._trackers, self._adapters = trackers, adapters

    def log(self, lines: list[dict[str, Any]], pack: Sequence[int]) -> None:
        """Pass on metric lines of a pack as curves named MEASURE/ADAPTER, where ADAPTER is a number, `base` or `merge`.

        The merge of a pack that is not the whole run is `merge_FIRST-LAST`: each pack has its own.
        """
        part = "" if len(pack) == self._adapters else f"_{pack[0]}-{pack[-1]}"
        for line in lines if self._trackers else []:
            name = f"merge{part}" if line["adapter"] == "merge" else line["adapter"]
            values = {
                f"{measure}/{name}": float(value)
                for measure, value in line.items()
                if measure not in ("step", "adapter") and isinstance(value, int | float)
            }
            for tracker in self._trackers:
                if tracker.name == "wandb":  # ignores a step before the last one, such as those of a second pack
                    tracker.log({**values, "step": line["step"]})
                else:
                    tracker.log(values, step=line["step"])


@contextlib.contextmanager
def open_trackers(config: RunConfig, run: Run) -> Iterator[Trackers]:
    """The trackers of `config.track`, which write to trackers/ in the run folder or to their own service."""
    if not config.track:
        yield Trackers()
        return
    from accelerate import Accelerator

    folder = run.folder / "trackers"
    folder.mkdir(exist_ok=True)
    accelerator = Accelerator(log_with=list(config.track), project_dir=folder)
    settings = {key: value if isinstance(value, int | float) else str(value) for key, value in flatten(config).items()}
    accelerator.init_trackers(
        PROJECT, config=settings, init_kwargs={"wandb": {"dir": str(folder), "name": run.folder.name}}
    )
    if "wandb" in config.track:
        accelerator.get_tracker("wandb", unwrap=True).define_metric("*", step_metric="step")
    try:
        yield Trackers(accelerator.trackers, config.adapters.count)
    finally:
        for tracker in accelerator.trackers:  # accelerator.end_training would part this process from its ranks as well
            tracker.finish()


def require_trackers(config: RunConfig) -> None:
    """Raises ConfigError for a tracker that is not installed."""
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
