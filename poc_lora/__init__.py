"""Train several LoRA adapters of one base model, merge them into one: more accurate, same inference cost."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# The public API, imported on first use: `import poc_lora` itself loads nothing heavy.
_HOME = {
    "Adapter": "poc_lora.adapters.adapter",
    "AdapterBank": "poc_lora.lora.bank",
    "NoisyAdamW": "poc_lora.optim.noisy_adamw",
    "RunConfig": "poc_lora.config",
    "evaluate": "poc_lora.evaluation.evaluate",
    "fold": "poc_lora.merging.fold",
    "load_config": "poc_lora.config",
    "merge": "poc_lora.merging.merge",
    "merge_folders": "poc_lora.merging.folders",
    "read_adapter": "poc_lora.adapters.adapter",
    "train": "poc_lora.training.train",
    "write_adapter": "poc_lora.adapters.adapter",
}
__all__ = [
    "Adapter",
    "AdapterBank",
    "NoisyAdamW",
    "RunConfig",
    "__version__",
    "evaluate",
    "fold",
    "load_config",
    "merge",
    "merge_folders",
    "read_adapter",
    "train",
    "write_adapter",
]

if TYPE_CHECKING:
    from poc_lora.adapters.adapter import Adapter, read_adapter, write_adapter
    from poc_lora.config import RunConfig, load_config
    from poc_lora.evaluation.evaluate import evaluate
    from poc_lora.lora.bank import AdapterBank
    from poc_lora.merging.fold import fold
    from poc_lora.merging.folders import merge_folders
    from poc_lora.merging.merge import merge
    from poc_lora.optim.noisy_adamw import NoisyAdamW
    from poc_lora.training.train import train


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'poc_lora' has no attribute {name!r}")
