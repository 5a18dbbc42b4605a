"""results.json: what cannot be told is null, and what does not agree is refused."""

import json
import math

import pytest
from pydantic import ValidationError

from poc_lora.artifacts.results import Estimate, Results
from poc_lora.errors import RunError
from tests.reporting.run_folder import results, scored, truncated


def test_what_cannot_be_told_is_null_in_the_file_and_nan_in_memory(tmp_path):
    one = scored(0.5).model_copy(update={"average": Estimate(0.5, math.nan)})
    results(base=one, agreement=math.nan, unread={"base": math.nan}).write(tmp_path / "results.json")
    assert "NaN" not in (tmp_path / "results.json").read_text()
    read = Results.read(tmp_path / "results.json")
    assert math.isnan(read.base.average.error)
    assert math.isnan(read.unread["base"])
    assert read.agreement is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("best", "none"),
        ("adapters", {f"{i}": scored(0.5) for i in range(100_000)}),
        ("questions", {"unheard-of": 1}),
        ("questions", {}),
        ("questions", {"<b>": 1}),
        ("too_long", {}),
        ("chance", {}),
        ("base", None),
        ("base", {"benchmarks": {}, "average": [0.5, 0.1]}),
        ("average", {"benchmarks": {}, "average": [1.5, 0.1]}),
        ("comparisons", {"best": {"value": math.inf, "low": 0, "high": 0, "p": 1}}),
        ("subsets", {"points": [], "variance_law": None}),
    ],
)
def test_results_that_do_not_agree_are_refused(field, value):
    raw = results().to_json()
    Results.model_validate(raw)
    with pytest.raises(ValidationError):
        Results.model_validate(raw | {field: value})


@pytest.mark.parametrize("pair", [[-0.1, 0.1], [1.1, 0.1], [None, 0.1], [0.5, -1], [0.5, math.inf], [0.5], ["x", 0]])
def test_an_accuracy_is_a_share_with_an_error(pair):
    raw = results().to_json()
    raw["base"]["average"] = pair
    with pytest.raises(ValidationError):
        Results.model_validate(raw)


def test_the_merge_at_one_rank_of_earlier_versions_is_refused_by_name(tmp_path):
    raw = results().to_json()
    assert Results.model_validate(raw | {"truncated": None, "truncated_rank": None}).truncated == []
    path = tmp_path / "results.json"
    path.write_text(json.dumps(raw | {"truncated": raw["merged"], "truncated_rank": 16}))
    with pytest.raises(RunError, match=r"truncated: .*an earlier version") as problem:
        Results.read(path)
    assert problem.value.fix == "evaluate again"


@pytest.mark.parametrize(
    "changes",
    [{"merged": None}, {"merged_rank": None}, {"truncated": [8, 4]}, {"truncated": [4, 4]}, {"merged_rank": 2}],
)
def test_ranks_that_do_not_agree_are_refused(changes):
    def made(ranks):
        return {
            "truncated": [truncated(rank).to_json() for rank in ranks],
            "merged_rank": 12,
            "merged_bytes": 1200,
        }

    raw = results().to_json()
    found = Results.model_validate(raw | made([4, 8]))
    assert [one.rank for one in found.truncated] == [4, 8]
    assert found.public({}) == found
    changes = {name: made(value)[name] if name == "truncated" else value for name, value in changes.items()}
    with pytest.raises(ValidationError):
        Results.model_validate(raw | made([4, 8]) | changes)
