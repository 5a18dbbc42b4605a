"""merge.json: its keys in their order, and figures that agree with each other."""

import json

import pytest
from pydantic import ValidationError

from poc_lora.adapters.adapter import write_adapter
from poc_lora.artifacts.merge_report import MergeOrigin, MergeReport, MergeStatistics
from poc_lora.merging.folders import merge_folders
from tests.hub.conftest import small_adapter
from tests.reporting.run_folder import merge_report


def test_keys_are_those_of_the_origin_then_the_statistics(tmp_path):
    for i in range(2):
        write_adapter(small_adapter(i), tmp_path / f"{i}")
    sources = [tmp_path / "0", tmp_path / "1"]
    keys = [*MergeOrigin.model_fields, *MergeStatistics.model_fields]
    merge_folders(sources, tmp_path / "plain")
    assert list(json.loads((tmp_path / "plain/merge.json").read_text())) == keys
    report = merge_folders(sources, tmp_path / "swept", rank_sweep=[1, 4])
    assert list(json.loads((tmp_path / "swept/merge.json").read_text())) == [*keys, "rank_sweep"]
    assert MergeReport.read(tmp_path / "swept/merge.json") == report
    assert list(report.rank_sweep["all"]) == [1, 4]


@pytest.mark.parametrize(
    "changes",
    [
        {"sources": []},
        {"weights": [1.0]},
        {"norms": [1.0] * 4},
        {"cosines": [[1.0] * 3] * 2},
        {"cosines": [[1.0] * 2] * 3},
        {"rank_sweep": {"all": {}}},
        {"rank_sweep": {"all": {"0": 0.5}}},
        {"rank_sweep": {"all": {"1": 1.5}}},
        {"norm": float("nan")},
        {"error": 1e31},
        {"modules": {"a": {"rank": 1}}},
    ],
)
def test_figures_that_cannot_be_are_refused(changes):
    MergeReport.model_validate(merge_report())
    with pytest.raises(ValidationError):
        MergeReport.model_validate(merge_report() | changes)
