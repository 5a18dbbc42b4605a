"""The embedded demo: a tiny base model and eight benchmarks about the invented world that it was pretrained on.

`scripts/microworld` in the repository made both.
"""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
DATA_DIR = Path(__file__).parent / "data"  # BENCHMARK/{train,validation,test}.json
