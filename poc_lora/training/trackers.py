"""A run's metrics in the trackers that accelerate knows: TensorBoard, Weights & Biases, Trackio and others."""

import contextlib
from collections.abc import Iterator
from typing import Any

from poc_lora.config import RunConfig, flatten
from poc_lora.errors import ConfigError
from poc_lora.training.run import Run


class Trackers:
    """The trackers of one run; with none chosen it does nothing. They are given the run's settings and metrics only."""

    def __init__(self, accelerator: Any):
        self._accelerator = accelerator

    def log(self, lines: list[dict[str, Any]]) -> None:
        """Pass on metric lines as curves named MEASURE/ADAPTER, where ADAPTER is a number, `base` or `merge`."""
        if self._accelerator is None:
            return
        for line in lines:
            values = {
                f"{measure}/{line['adapter']}": float(value)
                for measure, value in line.items()
                if measure not in ("step", "adapter") and isinstance(value, int | float)
            }
            self._accelerator.log(values, step=line["step"])


@contextlib.contextmanager
def open_trackers(config: RunConfig, run: Run) -> Iterator[Trackers]:
    """The trackers of `config.track`, which write under the run folder or to their own service."""
    if not config.track:
        yield Trackers(None)
        return
    from accelerate import Accelerator

    accelerator = Accelerator(log_with=list(config.track), project_dir=run.folder)
    settings = {key: value if isinstance(value, int | float) else str(value) for key, value in flatten(config).items()}
    accelerator.init_trackers("trackers", config=settings)
    try:
        yield Trackers(accelerator)
    finally:
        accelerator.end_training()


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
