"""Trains M adapters together: the loop, its loss, its checkpoints, and the checks before a run."""
