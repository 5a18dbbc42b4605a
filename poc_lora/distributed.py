"""The processes of one run under `accelerate launch`: small messages between them, and failure detection.

Ranks exchange small messages through a key-value store on rank 0: at the start, at commits and at the end. In between
every rank works alone, for longer than a collective's timeout could allow. So a thread in each rank sends heartbeats
and watches those of the others: if a rank fails, dies or hangs, all ranks stop, and the error names it and the cause.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from types import FrameType
from typing import Any

import psutil
import torch
import torch.distributed as dist

from poc_lora.envvars import flag, seconds, whole_number
from poc_lora.errors import PeerError, PocLoraError, RequestError

POLL_SECONDS = 0.5  # between two looks at the other ranks' heartbeats
POLLS_UNTIL_GONE = 60  # counted in polls, not in seconds: a suspended machine must not look like a dead rank
GRACE_SECONDS = 10  # for the main thread to stop by itself once another rank has failed
RANK_0_GONE = {"rank": 0, "cause": "its process has ended"}  # and the store with it
# A rank hangs when it has been busy with one thing, such as a step or loading the model, for so long, unless
# POC_LORA_HANG_SECONDS says otherwise.
HANG_SECONDS = 1800.0


class Ranks:
    """The ranks of a run as seen by one of them. With `size` 1 nothing is exchanged.

    Attributes:
        process_index: This process's rank, by accelerate's name: a rank alone may be that of an adapter.
        size: The number of ranks.
        stop: Set when any rank was asked to stop, by Ctrl-C, SIGTERM or the death of its launcher.
    """

    def __init__(self, process_index: int = 0, size: int = 1, hang_seconds: float = HANG_SECONDS):
        self.process_index, self.size, self.hang_seconds = process_index, size, hang_seconds
        self.stop = threading.Event()
        self._store: dist.Store | None = None
        self._main = self.channel("main")
        self._beats, self._doing = 0, "starting"
        self._problem: dict[str, Any] | None = None  # the first known failure: rank and cause
        self._shared = False  # every rank ends with the same error, or with none
        self._closing = threading.Event()
        self._watcher: threading.Thread | None = None

    def heartbeat(self, doing: str) -> None:
        """Report that this rank makes progress, and on what. Raises PeerError if another rank has failed."""
        self._beats += 1
        self._doing = doing
        if self._problem:
            raise self._peer_error()

    def gather(self, value: Any) -> list[Any]:
        """Gather a JSON value from every rank.

        Args:
            value: This rank's value.

        Returns:
            The values of all ranks in the order of their ranks, as JSON returns them.

        Raises:
            PeerError: A rank has failed, died or hangs.
        """
        doing, self._doing = self._doing, ""  # waiting for others does not count as hanging
        values = self._main.gather(value)
        self.heartbeat(doing)
        return values

    def barrier(self) -> None:
        """Wait until every rank has come here. Raises as `gather`."""
        self.gather(None)

    def channel(self, name: str) -> "Channel":
        """A separate channel for another thread; `name` must be the same on all ranks."""
        return Channel(self, name)

    @contextlib.contextmanager
    def raise_on_all(self) -> Iterator[None]:
        """Raise an error of the block on all ranks, whichever rank raised it; it is printed once."""
        mine: PocLoraError | None = None
        try:
            yield
        except PocLoraError as problem:
            mine = problem
        reports = self.gather(None if mine is None else [str(mine), mine.exit_status])
        first = next((rank for rank, report in enumerate(reports) if report), None)
        if first is None:
            return
        text, status = reports[first]
        if mine is None or str(mine) != text:
            mine = PeerError(f"process {first}: {text}", exit_status=status)
        raise self.mark_shared(mine)

    def mark_shared(self, problem: PocLoraError) -> PocLoraError:
        """Mark `problem`, which every rank is about to raise, to be printed by rank 0 only."""
        self._shared = True
        problem.reported_elsewhere = self.process_index != 0
        return problem

    def require_equal(self, facts: dict[str, Any]) -> None:
        """Raise RequestError, naming rank and key, if `facts` differ between ranks."""
        everyone = self.gather(facts)
        for rank, theirs in enumerate(everyone):
            for key in sorted(everyone[0].keys() | theirs.keys()):
                here, there = everyone[0].get(key), theirs.get(key)
                if here != there:
                    problem = RequestError(
                        f"the processes differ: {key} is {here!r} in process 0, but {there!r} in process {rank}",
                        where=key,
                        fix="start every process with the same configuration, data and versions",
                    )
                    raise self.mark_shared(problem)

    def _connect(self, host: str) -> None:
        """Open the store on a port that rank 0 chooses, and start the watching thread."""
        mine = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False) if self.process_index == 0 else None
        port = [mine.port if mine else 0]
        dist.broadcast_object_list(port, src=0)
        self._store = mine or dist.TCPStore(host, port[0], timeout=timedelta(minutes=1))
        watch = dist.TCPStore(host, port[0], timeout=timedelta(minutes=1))  # a blocking call blocks its client
        homes = self.gather([socket.gethostname(), os.getpid()])
        self._watcher = threading.Thread(target=self._watch, args=[watch, homes], name="ranks", daemon=True)
        self._watcher.start()

    def _watch(self, store: dist.Store, homes: list[tuple[str, int]]) -> None:
        launcher, polls = os.getppid(), 0
        others = {
            rank: _Heartbeats(*home, self.hang_seconds) for rank, home in enumerate(homes) if rank != self.process_index
        }
        while not self._closing.wait(POLL_SECONDS):
            polls += 1
            try:
                if os.getppid() != launcher:
                    self.stop.set()  # nobody is left to stop this process
                self._pass_on_stop(store)
                store.set(f"sign/{self.process_index}", json.dumps([polls, self._beats, self._doing]))
                for rank, signs in others.items():
                    cause = signs.problem(store.get(f"sign/{rank}") if store.check([f"sign/{rank}"]) else None)
                    if cause and not self._problem:
                        self._publish(store, rank, cause)
                if store.check(["failed"]):
                    self._problem = json.loads(store.get("failed"))
            except RuntimeError:  # the store's
                self._problem = self._problem or RANK_0_GONE
            if self._problem:
                self._give_up()

    def _pass_on_stop(self, store: dist.Store) -> None:
        if self.stop.is_set():
            store.set("stop", "")
        elif store.check(["stop"]):
            self.stop.set()

    def _publish(self, store: dist.Store, rank: int, cause: str) -> None:
        """Publish a rank's failure; the first one published stands."""
        store.compare_set("failed", "", json.dumps({"rank": rank, "cause": cause}))

    def _peer_error(self) -> PeerError:
        problem = self._problem or {}
        error = PeerError(
            f"process {problem['rank']} failed: {problem['cause']}",
            fix="what was saved stands: run the same command again, and train with --resume",
        )
        error.reported_elsewhere = self.process_index != (1 if problem["rank"] == 0 else 0)
        return error

    def _give_up(self) -> None:
        """Give the main thread time to stop; if it is stuck, end the process."""
        if self._closing.wait(GRACE_SECONDS):
            return
        error = self._peer_error()
        if not error.reported_elsewhere:
            print(f"poc-lora: {error}", file=sys.stderr, flush=True)  # noqa: T201
        os._exit(error.exit_status)

    def _close(self, problem: BaseException | None) -> None:
        """Leave the run. Rank 0, which holds the store, leaves last."""
        if self._store is None:
            return
        with contextlib.suppress(RuntimeError):  # of a store whose process has gone
            if problem is not None and not self._shared and not isinstance(problem, PeerError):
                self._publish(self._store, self.process_index, str(problem) or type(problem).__name__)
            self._stop_watching()
            if self.process_index:
                self._store.set(f"left/{self.process_index}", "")
            failed = self._problem["rank"] if self._problem else 0
            left = [f"left/{rank}" for rank in range(1, self.size) if rank != failed]
            deadline = time.monotonic() + GRACE_SECONDS / 2
            while self.process_index == 0 and left and not self._store.check(left) and time.monotonic() < deadline:
                time.sleep(0.05)
        if problem is None or self._shared:
            dist.destroy_process_group()
        self._stop_watching()

    def _stop_watching(self) -> None:
        """Stop the thread: inside a call of the store at interpreter exit it would abort the process."""
        self._closing.set()
        if self._watcher is not None:
            self._watcher.join(GRACE_SECONDS)


class Channel:
    """Gathers values between ranks, for one thread of each; all must call it in the same order."""

    def __init__(self, ranks: Ranks, name: str):
        self._ranks, self._name = ranks, name
        self._gathered = 0

    def gather(self, value: Any) -> list[Any]:
        """As `Ranks.gather`."""
        ranks, text = self._ranks, json.dumps(value)
        if ranks._store is None:
            return [json.loads(text)]
        self._gathered += 1
        keys = [f"{self._name}/{self._gathered}/{rank}" for rank in range(ranks.size)]
        pause = 0.001
        try:
            ranks._store.set(keys[ranks.process_index], text)
            while not ranks._store.check(keys):
                if ranks._problem:
                    raise ranks._peer_error()
                time.sleep(pause)
                pause = min(2 * pause, 0.1)
            values = [json.loads(ranks._store.get(key)) for key in keys]
            # All ranks have read the previous values, so their keys can go.
            ranks._store.delete_key(f"{self._name}/{self._gathered - 1}/{ranks.process_index}")
        except RuntimeError as problem:  # the store's
            ranks._problem = ranks._problem or RANK_0_GONE
            raise ranks._peer_error() from problem
        return values

    def barrier(self) -> None:
        """Wait until all ranks have come here."""
        self.gather(None)


class _Heartbeats:
    """The heartbeats of one rank as another sees them."""

    def __init__(self, host: str, pid: int, hang_seconds: float = HANG_SECONDS) -> None:
        self._hang_seconds = hang_seconds
        self._pid = pid if host == socket.gethostname() else None
        self._polls = self._beats = 0
        self._silent = self._stuck = 0

    def problem(self, sign: bytes | None) -> str | None:
        """What is wrong with the rank according to its newest heartbeat, if anything; called once a poll."""
        polls, beats, doing = json.loads(sign) if sign else (0, 0, "starting")
        self._silent = self._silent + 1 if polls == self._polls else 0
        self._stuck = self._stuck + 1 if beats == self._beats and doing else 0
        self._polls, self._beats = polls, beats
        if self._silent >= POLLS_UNTIL_GONE or (self._silent and self._pid and not _exists(self._pid)):
            return f"its process has ended or no longer answers; it was last {doing or 'waiting for other processes'}"
        if self._stuck * POLL_SECONDS >= self._hang_seconds:
            return (
                f"no progress: {doing} for more than {self._hang_seconds:g} s (longer work: set POC_LORA_HANG_SECONDS)"
            )
        return None


def _exists(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def is_rank_0() -> bool:
    """Whether this process is rank 0, which reports the results."""
    return whole_number("RANK", 0) == 0


@contextlib.contextmanager
def open_ranks(device: torch.device) -> Iterator[Ranks]:
    """Join the ranks that `accelerate launch` or another launcher started, for the length of the block.

    An error that leaves the block ends the other ranks too. Within the block Ctrl-C and SIGTERM set `stop`. A second
    Ctrl-C kills, unless there is a launcher, which passes signals on and kills by itself.

    Args:
        device: This process's device.

    Raises:
        RequestError: accelerate's settings do not fit, or an environment variable cannot be parsed.
    """
    _refuse_plugins()
    hang_seconds = seconds("POC_LORA_HANG_SECONDS", HANG_SECONDS)
    size = whole_number("WORLD_SIZE", 1, least=1)
    if size == 1:
        ranks = Ranks()
        with _stop_requests(ranks.stop):
            yield ranks
        return
    if "MASTER_ADDR" not in os.environ:
        raise RequestError(
            f"WORLD_SIZE is {size}, but MASTER_ADDR, the address of process 0, is not set",
            where="MASTER_ADDR",
            fix="start them all with accelerate launch",
        )
    ranks = Ranks(whole_number("RANK"), size, hang_seconds)
    if ranks.process_index >= size:
        raise RequestError(
            f"RANK is {ranks.process_index}, but of {size} processes the last is number {size - 1}",
            where="RANK",
            fix="start them all with accelerate launch",
        )
    whole_number("MASTER_PORT")  # torch reads it, and waits long where it is not there
    with _stop_requests(ranks.stop):
        _join_process_group(device, hang_seconds)
        ranks._connect(os.environ["MASTER_ADDR"])
        try:
            yield ranks
        except BaseException as problem:
            ranks._close(problem)
            raise
        ranks._close(None)


def _join_process_group(device: torch.device, hang_seconds: float) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, rank, size = next(dist.rendezvous("env://"))
    # A launcher that restarts its processes may keep the store, in which the dead have left their addresses.
    attempt = dist.PrefixStore(f"attempt {whole_number('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=hang_seconds)
    dist.init_process_group(backend, store=attempt, rank=rank, world_size=size, timeout=timeout)


def _refuse_plugins() -> None:
    """Raises RequestError for what accelerate would do to the model, which here belongs to no single optimizer."""
    for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        if flag(f"ACCELERATE_USE_{name}"):
            raise RequestError(
                f"accelerate is configured to use {name.replace('_', '-')}, but each process trains its own adapters",
                where=f"ACCELERATE_USE_{name}",
                fix="use a configuration of configs/accelerate; a base too large for one device: model.shard=true",
            )


@contextlib.contextmanager
def _stop_requests(stop: threading.Event) -> Iterator[None]:
    launched = "TORCHELASTIC_RUN_ID" in os.environ or whole_number("WORLD_SIZE", 1, least=1) > 1

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.is_set() and number == signal.SIGINT and not launched:
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
