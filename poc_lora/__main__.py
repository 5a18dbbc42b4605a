"""The entry point `poc-lora`, and `python -m poc_lora`, which `accelerate launch -m poc_lora` runs."""

import io
import os
import sys

from poc_lora.cli import app as cli

# The names that torch reads, newest first.
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def main() -> None:
    """Run the command line."""
    use_expandable_segments()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # it may not be able to encode what names and tables hold
            stream.reconfigure(errors="backslashreplace")
    cli.main()


def use_expandable_segments() -> None:
    """Let torch's CUDA allocator grow its segments, unless the user has configured the allocator.

    Micro-batches of many shapes fragment segments of a fixed size. torch reads the variable at its first allocation on
    a GPU, so it is set here, before torch is imported, and not in `train`: in a caller's process it is the caller's.
    """
    if not any(name in os.environ for name in ALLOCATOR):
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"


if __name__ == "__main__":
    main()
