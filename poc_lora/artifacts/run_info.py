"""run.json: how and on what a run was trained."""

from datetime import datetime
from typing import ClassVar

from pydantic import Field

from poc_lora.artifacts.schema import Artifact, Count, Finite, Int64, Number

TOKENIZED_ROWS = "tokenised rows"
SUPERVISED_TOKENS = "tokens with a loss"
CHAT_TEMPLATE = "chat template"  # that of data.chat_template
NO_FILES = (TOKENIZED_ROWS, SUPERVISED_TOKENS, CHAT_TEMPLATE)  # the keys in data_sha256 that are none


class RunInfo(Artifact):
    """What training records beside its configuration. None of it is uploaded as a file.

    Attributes:
        versions: Versions of Python and the libraries.
        machine: Platform, processor, threads and GPUs of rank 0.
        seed: The seed of the run.
        steps: Optimizer steps in all.
        data_sha256: SHA-256 of every file of training rows by its path, and under `NO_FILES` of the tokenized rows and
            of which tokens have a loss.
        validation_sha256: The same of `data.validation_files`.
        chats: Whether most training rows are chats.
        skipped_rows: Rows that were left out because they could not be used.
        started_at: When the run was first started, in ISO format.
        dtype: The dtype of the base model.
        target_modules: The modules that `lora.targets` stands for, as PEFT names them.
        processes: The number of ranks.
        devices: What rounding depends on, for each rank.
        per_device: Adapters trained at once on a device.
        tokens_per_microbatch: Tokens in a micro-batch over all adapters, padding counted.
        gradient_checkpointing: Whether activations are recomputed.
        train_seconds: Time in optimizer steps.
        commit_seconds: Time in checkpoints.
        peak_bytes: The largest peak memory of a device.
        best_steps: Under `train.keep: best`, the step whose weights each adapter ended with.
    """

    content: ClassVar[str] = "the record of a run"
    fix: ClassVar[str] = "restore the file, or remove it"

    versions: dict[str, str] = Field(default_factory=dict)
    machine: dict[str, str | Count | list[str]] = Field(default_factory=dict)
    seed: Int64 | None = None
    steps: Count | None = None
    data_sha256: dict[str, str] = Field(default_factory=dict)
    validation_sha256: dict[str, str] = Field(default_factory=dict)
    chats: bool | None = None
    skipped_rows: Count | None = None
    per_device: Count | None = None
    tokens_per_microbatch: Count | None = None
    gradient_checkpointing: bool | None = None
    started_at: str | None = None
    dtype: str | None = None
    target_modules: list[str] = Field(default_factory=list)
    processes: Count | None = None
    devices: list[str] = Field(default_factory=list)
    train_seconds: Number | None = None
    commit_seconds: Finite | None = None
    peak_bytes: Count | None = None
    best_steps: dict[Count, Count] | None = None

    @property
    def start(self) -> datetime | None:
        """When the run was first started, in local time; None if that is not recorded."""
        try:
            return datetime.fromisoformat(self.started_at or "")
        except ValueError:
            return None
