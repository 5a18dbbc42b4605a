"""Scoring the base, every adapter, the merge and the prediction ensemble on the eight benchmarks."""
