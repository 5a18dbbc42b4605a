"""Training M adapters together: the loop, its loss, its checkpoints, and the plan of a run."""
