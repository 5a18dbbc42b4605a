"""Reading, writing and publishing of any artefact."""

import json
import math
from typing import ClassVar

import pytest

from poc_lora.artifacts.merge_report import MergeReport
from poc_lora.artifacts.results import Results
from poc_lora.artifacts.run_info import RunInfo
from poc_lora.artifacts.schema import PUBLIC, Artifact, OrNan, Public, Schema
from poc_lora.errors import RunError
from tests.reporting.run_folder import merge_report, results


class Part(Schema):
    path: Public[str]
    note: str = "mine"


class Example(Artifact):
    content: ClassVar[str] = "an example"
    fix: ClassVar[str] = "write it again"

    parts: Public[dict[str, Part]]
    value: Public[OrNan] = 1.0
    secret: Part | None = None
    host: str = ""


def schemas(model):
    """A schema and all that its fields hold."""
    found, left = set(), [model]
    while left:
        kind = left.pop()
        if isinstance(kind, type) and issubclass(kind, Schema) and kind not in found:
            found.add(kind)
            left += [field.annotation for field in kind.model_fields.values()]
        left += getattr(kind, "__args__", ())
    return found


def test_what_is_written_is_read(tmp_path):
    example = Example(parts={"a": Part(path="x")}, value=math.nan)
    example.write(tmp_path / "example.json")
    assert json.loads((tmp_path / "example.json").read_text()) == {"parts": {"a": {"path": "x"}}, "value": None}
    assert Example.read(tmp_path / "example.json").dumps() == example.dumps()
    assert Example.read_if_there(tmp_path / "none.json") is None


def test_public_is_what_its_field_says_and_no_path_of_this_machine():
    private = Part(path="/home/alice/secret", note="secret")
    parts = {"a": private, "b": Part(path="/models/base"), "c": Part(path="org/base")}
    example = Example(parts=parts, secret=private, host="secret")
    public = example.public({"/models/base": "org/base"})
    assert public.to_json() == {
        "parts": {"a": {"path": "secret"}, "b": {"path": "org/base"}, "c": {"path": "org/base"}}
    }


@pytest.mark.parametrize("text", ["[]", "{}", '{"parts": {"a": {"path": 3}}}', '{"parts": {}, "value": "x"}', "{"])
def test_a_damaged_file_is_an_error_with_its_name(tmp_path, text):
    (tmp_path / "example.json").write_text(text)
    with pytest.raises(RunError, match=r"where: .*example\.json"):
        Example.read(tmp_path / "example.json")


def test_all_of_merge_json_and_results_json_is_public_and_nothing_of_run_json():
    for model in (MergeReport, Results):
        for schema in schemas(model):
            assert all(PUBLIC in field.metadata for field in schema.model_fields.values()), schema
    assert not any(PUBLIC in field.metadata for field in RunInfo.model_fields.values())
    for artifact in (MergeReport.model_validate(merge_report()), results()):
        assert artifact.public({}) == artifact


@pytest.mark.parametrize("artifact", [MergeReport, Results, RunInfo])
def test_no_integer_of_a_file_is_unbounded(artifact):
    """Python's have no limit, and what shows them as numbers of bytes or draws them fails on those of 400 digits."""

    def integers(node):
        if isinstance(node, dict):
            if node.get("type") == "integer":
                yield node
            node = node.values()
        for inner in node if not isinstance(node, str | int | float | bool | None) else ():
            yield from integers(inner)

    found = list(integers(artifact.model_json_schema()))
    assert len(found) > 3
    for node in found:
        assert {"maximum", "exclusiveMaximum"} & node.keys(), node
        assert {"minimum", "exclusiveMinimum"} & node.keys(), node


@pytest.mark.parametrize("value", [10**400, -(10**400), 1e31, float("inf")])
def test_a_number_that_cannot_be_drawn_is_refused(tmp_path, value):
    (tmp_path / "example.json").write_text(json.dumps({"parts": {}, "value": value}))
    with pytest.raises(RunError, match="value"):
        Example.read(tmp_path / "example.json")
