"""VARIANT.json: read back as written, by whoever compares evaluations."""

import json
import math

import pytest

from poc_lora.artifacts.variant_scores import VariantScores
from poc_lora.errors import RunError

GOOD = {
    "variant": "merged",
    "source": None,
    "adapter_digest": None,
    "base_model": "org/base",
    "protocol": "label",
    "prompt": "clean",
    "benchmarks": {"piqa": {"accuracy": 1.0, "error": None, "questions": 1}},
    "average": {"accuracy": 1.0, "error": None},
    "settings": {"adapters": ["mean", "abc"], "quantization": None},
}


def test_scores_are_written_as_they_are_read(tmp_path):
    path = tmp_path / "merged.json"
    path.write_text(json.dumps(GOOD, indent=2) + "\n")
    scores = VariantScores.read(path)
    assert math.isnan(scores.average.error)
    assert scores.dumps() == path.read_text()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"adapter_digest": 3}, "adapter_digest"),
        ({"settings": ["adapters"]}, "settings"),
        ({"average": {"accuracy": 1.5, "error": None}}, "average.accuracy"),
        ({"benchmarks": {"piqa": {"accuracy": 0.5, "error": 0.1}}}, "benchmarks.piqa.questions"),
    ],
)
def test_damaged_scores_are_refused_by_field(tmp_path, changes, named):
    (tmp_path / "merged.json").write_text(json.dumps(GOOD | changes))
    with pytest.raises(RunError, match=rf"not the scores of a variant \({named}: [\s\S]*evaluate again"):
        VariantScores.read(tmp_path / "merged.json")
