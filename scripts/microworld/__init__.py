"""The invented world of the embedded demo: what its base model was pretrained on, and the benchmarks about it."""
