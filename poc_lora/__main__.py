"""The program: the entry point `poc-lora`, and `python -m poc_lora`, which `accelerate launch -m poc_lora` runs."""

import os

from poc_lora.cli import app as cli

# What torch reads, the newest name first.
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def main() -> None:
    """Run the command line."""
    use_expandable_segments()
    cli.main()


def use_expandable_segments() -> None:
    """Let torch's CUDA allocator grow its segments, unless the user has set up the allocator otherwise.

    Micro-batches of many shapes leave segments of a fixed size in pieces that fit no later tensor. torch reads the
    variable when it first allocates on a GPU, so it is set here, before torch is imported; and not in `train`, since
    in a caller's process the allocator is the caller's.
    """
    if not any(name in os.environ for name in ALLOCATOR):
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"


if __name__ == "__main__":
    main()
