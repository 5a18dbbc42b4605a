"""The trainings of real_model.py."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from real_model_rows import QUESTIONS


@dataclass(frozen=True)
class Job:
    """One training of `packs` times `members` adapters side by side, with what differs from the common settings."""

    name: str
    task: str  # choices, labels or docstrings
    members: int = 8
    packs: int = 3
    seed: int = 0
    steps: int = 300
    batch: int = 16
    rank: int = 32
    lr: float = 1e-3
    temperature: float = 1e-5
    learn: str = "all"
    questions: int = QUESTIONS  # asked of each benchmark

    @property
    def group(self) -> str:
        """What the job's packs have in common: its name without the seed, which no name shows where it is 0."""
        return self.name.removesuffix(f"_{self.seed}") if self.seed else self.name

    @property
    def common(self) -> bool:
        """Whether it has its task's common settings; then the base and every size of merge are asked too."""
        return self.group.removeprefix("small_") == self.task

    @property
    def count(self) -> int:
        return self.packs * self.members

    def merges(self) -> Iterator[tuple[str, list[int]]]:
        """The name `merge_SIZE_FIRST` and the adapters of each merge: of 2, of 4, ... of all in each pack."""
        size = 2
        while size <= self.members:
            for first in range(0, self.count, size):
                yield f"merge_{size}_{first}", list(range(first, first + size))
            size *= 2


def _jobs() -> Iterator[Job]:
    """The most telling first. Rivals of equal cost: M times the steps, M times the batch; of equal size: rank M·r."""
    yield Job("choices", "choices")
    yield Job("choices_larger_batch", "choices", members=1, batch=128)
    yield Job("choices_rank_256", "choices", members=1, rank=256)
    yield Job("labels", "labels")
    yield Job("choices_longer", "choices", members=1, steps=2400)
    yield Job("docstrings", "docstrings", learn="last")
    yield Job("docstrings_larger_batch", "docstrings", members=1, batch=128, learn="last")
    yield Job("docstrings_rank_256", "docstrings", members=1, rank=256, learn="last")
    yield Job("docstrings_longer", "docstrings", members=1, steps=2400, learn="last")
    yield Job("choices_lr_3e-3", "choices", lr=3e-3)
    yield Job("choices_lambda_0", "choices", temperature=0.0)
    yield Job("choices_lambda_1e-4", "choices", temperature=1e-4)
    yield Job("choices_answers_only", "choices", learn="last")
    yield Job("choices_lr_3e-4", "choices", lr=3e-4)
    yield Job("labels_larger_batch", "labels", members=1, batch=128)
    yield Job("labels_longer", "labels", members=1, steps=2400)
    yield Job("labels_rank_256", "labels", members=1, rank=256)
    yield Job("labels_lr_3e-3", "labels", lr=3e-3)
    small: dict[str, Any] = {"task": "docstrings", "packs": 1, "steps": 100, "batch": 8, "rank": 16, "learn": "last"}
    half = small | {"members": 4}  # the first four of small's adapters, but for what the name says
    for seed in range(100, 105):
        yield Job(f"small_{seed}", seed=seed, **small)
        yield Job(f"small_lambda_0_{seed}", seed=seed, **half | {"temperature": 0.0})
        yield Job(f"small_lambda_1e-4_{seed}", seed=seed, **half | {"temperature": 1e-4})
        yield Job(f"small_lr_3e-3_{seed}", seed=seed, **half | {"lr": 3e-3})
        yield Job(f"small_lr_3e-4_{seed}", seed=seed, **half | {"lr": 3e-4})
        yield Job(f"small_lr_1e-2_{seed}", seed=seed, **half | {"lr": 1e-2})
        yield Job(f"small_longer_{seed}", seed=seed, **small | {"members": 1, "steps": 800})
        yield Job(f"small_larger_batch_{seed}", seed=seed, **small | {"members": 1, "batch": 64})
        yield Job(f"small_rank_128_{seed}", seed=seed, **small | {"members": 1, "rank": 128})
        yield Job(f"small_eight_lr_3e-3_{seed}", seed=seed, **small | {"lr": 3e-3})
        yield Job(f"small_longer_lr_3e-3_{seed}", seed=seed, **small | {"members": 1, "steps": 800, "lr": 3e-3})
        yield Job(f"small_longer_lr_3e-4_{seed}", seed=seed, **small | {"members": 1, "steps": 800, "lr": 3e-4})
        yield Job(f"small_larger_batch_lr_3e-3_{seed}", seed=seed, **small | {"members": 1, "batch": 64, "lr": 3e-3})
        yield Job(f"small_labels_{seed}", seed=seed, **half | {"task": "labels", "learn": "all", "questions": 100})


JOBS = {job.name: job for job in _jobs()}
