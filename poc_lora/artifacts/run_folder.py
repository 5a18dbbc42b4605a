"""The files of a run, by name."""

from dataclasses import dataclass
from pathlib import Path

MERGE_REPORT = "merge.json"  # in the folder of any merged adapter
RESULTS = "results.json"  # in the folder of any evaluation
RESULTS_TABLE = "results.md"
PROTOCOLS = ("label", "generate", "harness")


@dataclass(frozen=True)
class RunFolder:
    """The paths in a run's folder, whether they exist or not."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration; a folder that has one is a run."""
        return self.path / "config.yaml"

    @property
    def is_run(self) -> bool:
        """Whether a run has begun here."""
        return self.config.is_file()

    @property
    def info(self) -> Path:
        """Versions, hardware, seeds, checksums of the data and wall time: see `RunInfo`."""
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        """A line for each logged step and adapter."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Numbered commits."""
        return self.path / "checkpoints"

    @property
    def adapters(self) -> Path:
        """The folder of the finished adapters."""
        return self.path / "adapters"

    def adapter(self, number: int | str) -> Path:
        """The folder of one adapter, such as adapters/00."""
        return self.adapters / (number if isinstance(number, str) else f"{number:02d}")

    @property
    def merged(self) -> Path:
        """The merged adapter."""
        return self.path / "merged"

    @property
    def merge_report(self) -> Path:
        """How the merged adapter was made: see `MergeReport`."""
        return self.merged / MERGE_REPORT

    def evaluation(self, protocol: str = "label") -> Path:
        """The folder of an evaluation: eval for the protocol `label`, else eval-PROTOCOL."""
        return self.path / ("eval" if protocol == "label" else f"eval-{protocol}")

    @property
    def evaluations(self) -> list[Path]:
        """The folders of the evaluations by every protocol."""
        return [self.evaluation(protocol) for protocol in PROTOCOLS]

    @property
    def report(self) -> Path:
        """The page that `poc-lora report` writes."""
        return self.path / "report.html"

    @property
    def comparison(self) -> Path:
        """The table that `poc-lora report --compare` writes."""
        return self.path / "comparison.md"

    @property
    def lock(self) -> Path:
        """Held by the process that trains."""
        return self.path / ".lock"
