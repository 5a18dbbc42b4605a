"""The names of a run's files."""

from pathlib import Path
from typing import Literal, get_args

MERGE_REPORT = "merge.json"  # in the folder of any merged adapter
RESULTS = "results.json"  # in the folder of any evaluation
RESULTS_TABLE = "results.md"
ROW_LOSSES = "rows.json"  # beside them, of an evaluation on rows
TASK_RESULTS = "tasks.json"  # likewise, on tasks of lm-eval
STUDY = "study.json"  # of several runs, in the first of them
STUDY_TABLE = "study.md"
CONTROLS = "controls.json"  # in the folder of `poc-lora controls`
CONTROLS_TABLE = "controls.md"
ProtocolName = Literal["label", "generate", "harness"]
PROTOCOLS: tuple[str, ...] = get_args(ProtocolName)


def variant_file(variant: str) -> str:
    """Returns the name of a variant's scores in the folder of an evaluation."""
    return f"{variant}.json"


class RunFolder:
    """The paths in a run's folder, whether they exist or not."""

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.yaml"  # the resolved configuration
        self.info = path / "run.json"  # see RunInfo
        self.metrics = path / "metrics.jsonl"  # a line for each logged step and adapter
        self.held_out = path / "held_out.jsonl"  # the validation rows; they stay on this machine
        self.chat_template = path / "chat_template.jinja"  # that of data.chat_template
        self.checkpoints = path / "checkpoints"  # numbered commits
        self.adapters = path / "adapters"  # the finished adapters: 00, 01, ...
        self.merged = path / "merged"  # the merged adapter
        self.merge_report = self.merged / MERGE_REPORT  # see MergeReport
        self.evaluations = [self.evaluation(protocol) for protocol in PROTOCOLS]
        self.report = path / "report.html"
        self.comparison = path / "comparison.md"
        self.trackers = path / "trackers"  # files of experiment trackers such as TensorBoard
        self.lock = path / ".lock"  # held by the process that trains

    @property
    def is_run(self) -> bool:
        """Whether a run has begun here."""
        return self.config.is_file()

    def adapter(self, number: int | str) -> Path:
        """Returns the folder of one adapter, such as adapters/00."""
        return self.adapters / (number if isinstance(number, str) else f"{number:02d}")

    def evaluation(self, protocol: str = "label") -> Path:
        """Returns the folder of an evaluation: eval for the protocol `label`, else eval-PROTOCOL."""
        return self.path / ("eval" if protocol == "label" else f"eval-{protocol}")
