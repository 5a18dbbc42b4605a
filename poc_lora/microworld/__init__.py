"""The embedded default: a tiny base model, the world it was pretrained on, and eight benchmarks about that world."""

from pathlib import Path

from poc_lora.microworld.benchmarks import CHANCE, write_benchmarks

MODEL_DIR = Path(__file__).parent / "model"
DATA_DIR = Path(__file__).parent / "data"  # what write_benchmarks wrote: BENCHMARK/{train,validation,test}.json

__all__ = ["CHANCE", "DATA_DIR", "MODEL_DIR", "write_benchmarks"]
