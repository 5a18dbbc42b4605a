"""M adapters stacked on one base model."""
