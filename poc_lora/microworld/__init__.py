"""The embedded demo: a tiny base model, the invented world it was pretrained on, and eight benchmarks about it."""

from pathlib import Path

from poc_lora.microworld.benchmarks import CHANCE, write_benchmarks

MODEL_DIR = Path(__file__).parent / "model"
DATA_DIR = Path(__file__).parent / "data"  # from write_benchmarks: BENCHMARK/{train,validation,test}.json

__all__ = ["CHANCE", "DATA_DIR", "MODEL_DIR", "write_benchmarks"]
