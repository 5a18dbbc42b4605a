"""Scores the base model, every adapter, their merge and their prediction ensemble on benchmarks."""
