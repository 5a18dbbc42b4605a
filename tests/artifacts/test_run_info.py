"""run.json: what training writes is read, and what it does not know is passed over."""

import dataclasses

from poc_lora.artifacts.run_info import TOKENIZED_ROWS, RunInfo
from poc_lora.environment import environment
from poc_lora.training.memory import Sizes


def test_every_fact_of_training_is_read():
    facts = {
        **environment(),
        "seed": 3,
        "steps": 40,
        "data_sha256": {"train.json": "ab" * 32, TOKENIZED_ROWS: "cd" * 32},
        **dataclasses.asdict(Sizes(tokens_per_microbatch=512, per_device=2, gradient_checkpointing=False)),
        "started_at": "2026-01-02T03:04:05",
        "dtype": "float32",
        "processes": 2,
        "devices": ["cpu", "cpu"],
        "train_seconds": 1.5,
        "commit_seconds": 0.25,
        "peak_bytes": 10**9,
    }
    assert RunInfo.model_validate(facts | {"later": 1}).to_json().keys() == facts.keys()
    assert RunInfo.model_validate(facts).model_dump(exclude_unset=True) == facts
