"""The frozen base model: loading, running, compiling, recomputing and sharding it."""
