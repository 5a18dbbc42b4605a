"""Real processes that make up one run, as a launcher would start them."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def processes(size: int, *arguments: str, **environment: str) -> Iterator[list[subprocess.Popen]]:
    """`size` ranks of `python ARGUMENTS`, on the CPU with one thread each; killed when the block ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        yield ranks
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def finish(ranks: list[subprocess.Popen], *, within: float = 120) -> list[tuple[int, str, str]]:
    """Exit status, stdout and stderr of every rank, once they have ended by themselves."""
    ended = []
    for process in ranks:
        out, errors = process.communicate(timeout=within)
        ended.append((process.returncode, out, errors))
    return ended
