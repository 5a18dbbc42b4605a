"""Runs over several ranks, interrupted where a test wants it. A rank starts in no time: it is a fork of a process that
has everything imported and trained nothing."""

import math
import multiprocessing
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from poc_lora import distributed as ranks
from poc_lora.adapters.adapter import write_adapter
from poc_lora.config import RunConfig
from poc_lora.errors import PocLoraError
from poc_lora.models.load import load_base
from poc_lora.training.data import prepare_data
from poc_lora.training.memory import Sizes
from poc_lora.training.step import Pack
from poc_lora.training.train import train
from poc_lora.training.validation import validate
from tests.training.crash import KILLED, Killer

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__])
SECONDS = 120  # in which any of these small runs ends, however busy the machine
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Interruption:
    """What happens to one rank when it comes to its optimizer step, or its write, number `at`, from 0.

    how: "kill", as by kill -9, or a signal that asks to stop. where: "step" or "write". everywhere: all ranks are
    killed with it, as when the machine loses its power.
    """

    how: str
    at: int
    rank: int = 0
    where: str = "step"
    everywhere: bool = False


@dataclass(frozen=True)
class Ended:
    status: int
    errors: str  # what it wrote to stderr


def train_in_ranks(
    size: int, config: RunConfig, folder: Path, *, resume: bool, interruption: Interruption | None = None
) -> list[Ended]:
    """How each of `size` ranks that train the run ended. `folder` gets their errors, and `packs`: a line for every
    optimizer step that was taken, with the adapters that took it together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    everyone = [
        FORKS.Process(target=_train_as_rank, args=(rank, size, port, config, folder, resume, interruption))
        for rank in range(size)
    ]
    for process in everyone:
        process.start()
    if interruption and interruption.everywhere:
        everyone[interruption.rank].join(SECONDS)
        if everyone[interruption.rank].exitcode == KILLED:
            for process in everyone:
                process.kill()
    for process in everyone:
        process.join(SECONDS)
        if process.exitcode is None:
            process.kill()
            process.join()
    return [Ended(p.exitcode, _errors_file(folder, rank).read_text()) for rank, p in enumerate(everyone)]


def _train_as_rank(
    rank: int, size: int, port: int, config: RunConfig, folder: Path, resume: bool, interruption: Interruption | None
) -> None:
    _settle(_errors_file(folder, rank))
    if size > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in place.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
    ranks.POLL_SECONDS, ranks.POLLS_UNTIL_GONE = 0.05, 20 * SECONDS
    at_step = _arm(interruption) if interruption and interruption.rank == rank else lambda number: None
    _watch_steps(folder / "packs", at_step)
    try:
        train(config, resume=resume, device=CPU)
    except PocLoraError as problem:
        print(problem, file=sys.stderr)
        sys.exit(problem.exit_status)


def _settle(errors: Path) -> None:
    """Make a fork a process of its own: one thread, whatever it was started from, and a file for what it says."""
    torch.set_num_threads(1)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)


def _arm(interruption: Interruption) -> Callable[[int], None]:
    """Prepare the interruption; returns what is to be called with the number of each optimizer step."""
    if interruption.where == "write":
        Killer(interruption.at, os.open(os.devnull, os.O_WRONLY)).arm()
        return lambda number: None

    def at_step(number: int) -> None:
        if number == interruption.at:
            if interruption.how == "kill":
                os._exit(KILLED)
            os.kill(os.getpid(), getattr(signal, interruption.how))

    return at_step


def _watch_steps(packs: Path, at_step: Callable[[int], None]) -> None:
    original, calls = Pack.step, iter(range(2**31))

    def step(self, number, *rest):
        at_step(next(calls))
        result = original(self, number, *rest)
        if result is not None:
            with packs.open("a") as out:
                out.write(f"{number} {self.bank.adapters}\n")
        return result

    Pack.step = step


def _errors_file(folder: Path, rank: int) -> Path:
    return folder / f"errors_{rank}"


def train_pack(config: RunConfig, adapters: list[int], folder: Path) -> None:
    """Train adapters together from the first step to the last, by the plainest loop; writes them as a run does."""
    process = FORKS.Process(target=_train_pack, args=(config, adapters, folder))
    process.start()
    process.join(SECONDS)
    assert process.exitcode == 0, _errors_file(folder, 0).read_text()


def _train_pack(config: RunConfig, adapters: list[int], folder: Path) -> None:
    _settle(_errors_file(folder, 0))
    model, tokenizer = load_base(config.model.name, dtype="float32", device=CPU)
    data = prepare_data(config, tokenizer)
    sizes = Sizes(config.train.tokens_per_microbatch, len(adapters), gradient_checkpointing=False)
    pack = Pack(config, model, data, adapters, sizes=sizes)
    lowest = [math.inf] * len(adapters)
    for step in range(data.total_steps):
        pack.step(step)
        if config.train.keep == "best" and (step + 1) % config.train.validate_every == 0:
            measures = validate(pack)
            for slot, adapter in enumerate(adapters):
                if measures[adapter]["validation_loss"] < lowest[slot]:
                    lowest[slot] = measures[adapter]["validation_loss"]
                    kept = folder / "adapters" / f"{adapter:02d}"
                    shutil.rmtree(kept, ignore_errors=True)
                    write_adapter(pack.bank.adapter(slot), kept)
    for slot, adapter in enumerate(adapters) if config.train.keep == "last" else ():
        write_adapter(pack.bank.adapter(slot), folder / "adapters" / f"{adapter:02d}")
