"""Which rank trains which adapters, and which of them together: whole adapters in packs, balanced over the ranks.

An adapter depends on its place only through the rounding of matrix kernels. A run resumed on as many ranks keeps its
packs, and so every bit; on fewer or more ranks it is placed anew.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest


@dataclass(frozen=True)
class Progress:
    """How far one adapter has come. `status`: training, finished, or diverged (frozen at `step`)."""

    step: int
    status: str = "training"
    validated: int = 0  # the last step whose validation is written down
    best_step: int = 0  # that of the lowest validation loss so far, under `train.keep: best`; 0: none yet
    best_loss: float | None = None

    @property
    def begun(self) -> bool:
        """Whether it must be saved: in training and past step 0."""
        return self.status == "training" and self.step > 0


def initial_progress(count: int) -> dict[int, Progress]:
    """Returns the progress of a new run's adapters."""
    return {adapter: Progress(0) for adapter in range(count)}


@dataclass(frozen=True)
class Placement:
    """The work of all ranks: in each round every rank trains one pack, of adapters that have come equally far."""

    rounds: list[list[list[int]]]  # [round][rank] -> ids of the adapters trained together, maybe none
    per_device: int  # the most adapters of a pack

    def of(self, rank: int) -> list[int]:
        """The adapters of one rank, in the order of its rounds."""
        return [adapter for packs in self.rounds for adapter in packs[rank]]


def place(
    progress: Mapping[int, Progress], steps: int, *, ranks: int, per_device: int, before: Placement | None = None
) -> Placement:
    """Place all adapters in training on ranks, in packs of adapters at the same step.

    Args:
        progress: Of all adapters.
        steps: Optimizer steps of the run.
        ranks: The number of ranks.
        per_device: The most adapters of a pack.
        before: The placement of the interrupted run. Its packs are kept, with diverged adapters in their slots, if
            the number of ranks is the same and they fit; packs that have not begun, only if `per_device` is the same.
    """
    rounds: list[list[list[int]]] = []
    training = {adapter: state.step for adapter, state in progress.items() if state.status == "training"}
    if before is not None:
        for packs in before.rounds:
            members = [a for pack in packs for a in pack if a in training]
            begun = any(training[a] for a in members)
            if (
                members
                and len(packs) == ranks
                and max(map(len, packs)) <= per_device
                and (begun or per_device == before.per_device)
            ):
                rounds.append([pack if any(a in training for a in pack) else [] for pack in packs])
    load = [0] * ranks
    for packs in rounds:
        for rank, pack in enumerate(packs):
            load[rank] += sum(steps - training.pop(a) for a in pack if a in training)
    for step in sorted(set(training.values()), reverse=True):  # packs need adapters at one step
        group = sorted(a for a, at in training.items() if at == step)
        shares = _share(len(group), steps - step, load)
        ends = [sum(shares[: rank + 1]) for rank in range(ranks)]
        packs_of = [_cut(group[end - n : end], per_device) for end, n in zip(ends, shares, strict=True)]
        rounds += [list(packs) for packs in zip_longest(*packs_of, fillvalue=[])]
    return Placement(rounds, per_device)


def _share(count: int, work: int, load: list[int]) -> list[int]:
    """How many of `count` adapters, each `work` to do, every rank gets; the least loaded first. Adds to `load`."""
    shares = [0] * len(load)
    for _ in range(count):
        rank = load.index(min(load))
        shares[rank] += 1
        load[rank] += work
    return shares


def _cut(adapters: list[int], most: int) -> list[list[int]]:
    """Packs of at most `most` adapters, as few as that takes and of even sizes."""
    packs: list[list[int]] = []
    while adapters:
        size = -(-len(adapters) // -(-len(adapters) // most))
        packs.append(adapters[:size])
        adapters = adapters[size:]
    return packs
