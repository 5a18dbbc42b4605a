"""Train several LoRA adapters of one base model and merge them: often more accurate, and as cheap once folded."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# The public API, imported on first use: `import poc_lora` itself loads nothing heavy. Beside it are two packages of
# their own: poc_lora.mfnn, the theory's setting, and poc_lora.microworld, an embedded base model with data.
_HOME = {
    "Adapter": "poc_lora.adapters.adapter",
    "AdapterBank": "poc_lora.lora.bank",
    "NoisyAdamW": "poc_lora.optim.noisy_adamw",
    "PocLoraError": "poc_lora.errors",
    "RequestError": "poc_lora.errors",
    "RunConfig": "poc_lora.config",
    "check": "poc_lora.training.check",
    "demo": "poc_lora.microworld.demo",
    "evaluate": "poc_lora.evaluation.evaluate",
    "evaluate_rows": "poc_lora.evaluation.rows",
    "evaluate_study": "poc_lora.reporting.study",
    "evaluate_tasks": "poc_lora.evaluation.tasks",
    "fold": "poc_lora.merging.fold",
    "load_config": "poc_lora.config",
    "merge": "poc_lora.merging.merge",
    "merge_folders": "poc_lora.merging.folders",
    "push": "poc_lora.hub.push",
    "read_adapter": "poc_lora.adapters.adapter",
    "report": "poc_lora.reporting.page",
    "sample_texts": "poc_lora.evaluation.sample",
    "sweep_by_type": "poc_lora.merging.merge",
    "train": "poc_lora.training.train",
    "write_adapter": "poc_lora.adapters.adapter",
}
__all__ = [
    "Adapter",
    "AdapterBank",
    "NoisyAdamW",
    "PocLoraError",
    "RequestError",
    "RunConfig",
    "__version__",
    "check",
    "demo",
    "evaluate",
    "evaluate_rows",
    "evaluate_study",
    "evaluate_tasks",
    "fold",
    "load_config",
    "merge",
    "merge_folders",
    "push",
    "read_adapter",
    "report",
    "sample_texts",
    "sweep_by_type",
    "train",
    "write_adapter",
]

if TYPE_CHECKING:
    from poc_lora.adapters.adapter import Adapter, read_adapter, write_adapter
    from poc_lora.config import RunConfig, load_config
    from poc_lora.errors import PocLoraError, RequestError
    from poc_lora.evaluation.evaluate import evaluate
    from poc_lora.evaluation.rows import evaluate_rows
    from poc_lora.evaluation.sample import sample_texts
    from poc_lora.evaluation.tasks import evaluate_tasks
    from poc_lora.hub.push import push
    from poc_lora.lora.bank import AdapterBank
    from poc_lora.merging.fold import fold
    from poc_lora.merging.folders import merge_folders
    from poc_lora.merging.merge import merge, sweep_by_type
    from poc_lora.microworld.demo import demo
    from poc_lora.optim.noisy_adamw import NoisyAdamW
    from poc_lora.reporting.page import report
    from poc_lora.reporting.study import evaluate_study
    from poc_lora.training.check import check
    from poc_lora.training.train import train


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'poc_lora' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)  # for completion and help(), which would otherwise miss what is not imported yet
