"""tasks.json: what cannot be told is null, and what does not agree is refused."""

import copy
import math

import pytest
from pydantic import ValidationError

from poc_lora.artifacts.task_scores import TaskResults
from tests.reporting.run_folder import task_results


def test_what_cannot_be_told_is_null_in_the_file_and_nan_in_memory(tmp_path):
    found = task_results()
    found.write(tmp_path / "tasks.json")
    assert "NaN" not in (tmp_path / "tasks.json").read_text()
    read = TaskResults.read(tmp_path / "tasks.json")
    assert math.isnan(read.tasks["read"].metrics["word_perplexity,none"].base.error)
    assert read.to_json() == found.to_json()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("best", "none"),
        ("best", ""),
        ("average", None),
        ("merged", None),
        ("adapters", {}),
        ("adapters", {"00": [0.5, 0.1]}),
        ("adapters", {f"{i}": [0.5, 0.1] for i in range(100_000)}),
        ("base", [math.inf, 0.1]),
        ("base", [0.5, -0.1]),
        ("comparisons", {"best": {"value": math.inf, "low": 0, "high": 0, "p": 1}}),
    ],
)
def test_metrics_that_do_not_agree_are_refused(field, value):
    raw = task_results().to_json()
    TaskResults.model_validate(raw)
    changed = copy.deepcopy(raw)
    changed["tasks"]["quiz"]["metrics"]["acc,strict"][field] = value
    with pytest.raises(ValidationError):
        TaskResults.model_validate(changed)
    with pytest.raises(ValidationError):
        TaskResults.model_validate(raw | {"tasks": {}})
