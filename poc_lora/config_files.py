"""Configuration files: YAML plus `key=value` overrides, validated by a pydantic schema, with errors that name the key.

Precedence: override, then file, then the schema's default. Schemas are built from `Section` and the types below.
"""

import difflib
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from poc_lora.errors import MAX_DETAILS, ConfigError
from poc_lora.files import read_text

MAX_YAML_BYTES = 2**18
MAX_INTEGER = 2**31 - 1  # a number of steps, rows, tokens and the like
MAX_SEED = 2**63 - 1

Positive = Annotated[int, Field(gt=0, le=MAX_INTEGER, strict=True)]
NonNegative = Annotated[int, Field(ge=0, le=MAX_INTEGER, strict=True)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED, strict=True)]
NonNegativeFloat = Annotated[float, Field(ge=0, strict=True, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, strict=True, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1, strict=True, allow_inf_nan=False)]
Flag = Annotated[bool, Field(strict=True)]
Name = Annotated[str, Field(min_length=1)]


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


ListOrOne = BeforeValidator(_listed)  # for lists of text: one text is a list of one


class Section(BaseModel):
    """A mapping of known keys, immutable once validated."""

    # The docstrings of the keys are their descriptions in docs/configuration.md.
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


S = TypeVar("S", bound=Section)


def read_config(path: Path) -> dict[str, Any]:
    """Read a YAML file as plain dictionaries, not validated yet. Raises ConfigError."""
    raw = parse_yaml(read_text(path, error=ConfigError, max_bytes=MAX_YAML_BYTES), where=str(path))
    if not isinstance(raw, dict):
        raise ConfigError("the file is not a mapping of sections", where=path, fix="start from a file in configs/")
    return raw


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> None:
    """Set dotted keys in `raw` from overrides such as `optim.lr=1e-4`, whose values are YAML. Raises ConfigError."""
    for override in overrides:
        dotted, separator, text = override.partition("=")
        if not separator or not dotted:
            raise ConfigError(
                f"'{override}' is not of the form key=value", where="overrides", fix="for example optim.lr=1e-4"
            )
        *sections, last = dotted.split(".")
        node = raw
        for section in sections:
            if node.get(section) is None:
                node[section] = {}
            node = node[section]
            if not isinstance(node, dict):
                raise ConfigError(f"'{section}' in '{dotted}' is not a section", where="overrides")
        node[last] = parse_yaml(text, where=f"override {override}")


def with_overrides(path: Path | str, overrides: Sequence[str]) -> str:
    """Returns where a configuration comes from, for messages."""
    return f"{path} with {' '.join(overrides)}" if overrides else str(path)


def validate_as(schema: type[S], raw: dict[str, Any], *, where: str | Path) -> S:
    """Turn plain dictionaries into a `schema`. Raises one ConfigError that names every problem by its dotted key."""
    try:
        return schema.model_validate(raw)
    except ValidationError as problem:
        errors = problem.errors(include_url=False)
        lines = [_describe(schema, error) for error in errors[:MAX_DETAILS]]
        lines += [""] * (len(errors) - len(lines))  # counted, but not described: each takes a search among all keys
        raise ConfigError("the configuration is not valid:", details=lines, where=where) from problem


def dump_section(section: Section) -> str:
    """Returns the section as YAML that reads back to an equal object."""
    return yaml.dump(section.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)


def template(schema: type[Section], given: Mapping[str, Any]) -> str:
    """Returns YAML with every key of a schema: its meaning as a comment, then its default or what is given.

    Args:
        schema: The schema.
        given: Values by dotted key; a required key that is missing here is left empty.
    """
    return "\n".join(_template(schema.model_json_schema(), schema, given, "")) + "\n"


def _template(words: dict[str, Any], schema: type[Section], given: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """words: the JSON schema, whose `$defs` describe the sections."""
    indent = "  " * prefix.count(".")
    for name, field in schema.model_fields.items():
        inner = _section(field.annotation)
        own = (words["$defs"][inner.__name__] if inner else words["properties"][name]) | {"$defs": words["$defs"]}
        meaning = " ".join(own["description"].split())
        if not inner:
            meaning += f" Values: {values_in_words(own)}."
        if not prefix:
            yield ""
        comment = f"{indent}# "
        yield from textwrap.wrap(meaning.replace("`", ""), 118, initial_indent=comment, subsequent_indent=comment)
        if inner:
            yield f"{indent}{name}:"
            yield from _template(own, inner, given, f"{prefix}{name}.")
        else:
            value = given.get(f"{prefix}{name}", None if field.is_required() else field.default)
            yield f"{indent}{name}: {one_line(value)}"


def values_in_words(field: Mapping[str, Any]) -> str:
    """Returns what a field of a JSON schema may be, in Markdown."""
    if "anyOf" in field:
        return " or ".join(values_in_words(option) for option in field["anyOf"])
    if "enum" in field or "const" in field:
        return ", ".join(f"`{one_line(value)}`" for value in field.get("enum") or [field["const"]])
    if field["type"] == "array":
        if "prefixItems" in field:
            return f"list of {len(field['prefixItems'])}: {values_in_words(field['prefixItems'][0])}"
        return f"list of {values_in_words(field['items'])}" + (", at least one" if field.get("minItems") else "")
    if field["type"] == "object":
        return f"mapping of text to {values_in_words(field['additionalProperties'])}"
    words = {
        "string": "text",
        "boolean": "`true` or `false`",
        "null": "`null`",
        "integer": "integer",
        "number": "number",
    }
    limits = {"minimum": "≥", "exclusiveMinimum": ">", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {field[name]:g}" for name, sign in limits.items() if name in field]
    return " ".join([words[field["type"]], " and ".join(bounds)]).strip()


def one_line(value: Any) -> str:
    """Returns a plain value as YAML in one line."""
    if isinstance(value, float):
        return re.sub(r"e([+-])0*", r"e\1", f"{value:g}")
    plain = list(value) if isinstance(value, tuple) else value
    written = yaml.dump(plain, Dumper=_Dumper, default_flow_style=True, width=10**9)
    return str(written).removesuffix("...\n").strip()


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns every value of nested dictionaries by its dotted key."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def all_keys(schema: type[Section]) -> list[str]:
    """Returns every dotted key of a schema, sections included."""
    keys = []
    for name, field in schema.model_fields.items():
        inner = _section(field.annotation)
        keys += [name, *(f"{name}.{key}" for key in (all_keys(inner) if inner else ()))]
    return keys


class _Loader(yaml.SafeLoader):
    """A safe loader that reads 1e-4 as a number and refuses aliases and repeated keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="aliases are not allowed", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep=deep)
        if len(mapping) != len(node.value):
            what = "a key is repeated in the mapping that starts"
            raise yaml.MarkedYAMLError(problem=what, problem_mark=node.start_mark)
        return mapping


class _Dumper(yaml.SafeDumper):
    """A safe dumper that quotes text which `_Loader` would read as a number."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),
        list("-+.0123456789"),
    )


def parse_yaml(text: str, *, where: str) -> Any:
    """Parse YAML into plain values; no tag runs code. Raises ConfigError."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506  (a SafeLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as problem:
        raise ConfigError(f"not valid YAML: {_what(problem)}", where=where) from problem


def _what(problem: Exception) -> str:
    """What is wrong with YAML, and in which line, in one line of text."""
    if isinstance(problem, yaml.MarkedYAMLError) and problem.problem and problem.problem_mark:
        mark = problem.problem_mark
        return f"{problem.problem} in line {mark.line + 1}, column {mark.column + 1}"
    return " ".join(str(problem).split())


def _section(annotation: Any) -> type[Section] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def _describe(schema: type[Section], error: Any) -> str:
    dotted = _dotted(schema, error["loc"])
    lead = f"{dotted}: " if dotted else ""
    if error["type"] == "extra_forbidden":
        near = _nearest_key(schema, dotted)
        return f"{lead}no such key" + (f"; did you mean '{near}'?" if near else "")
    if error["type"] == "missing":
        return f"{lead}required but not given"
    if error["type"] == "value_error":
        return f"{lead}{error['ctx']['error']}"
    plain = {
        "tuple_type": "must be a list, such as [a, b]",
        "model_type": "must be a section of keys and values",
        "too_short": "must not be empty",
    }
    return f"{lead}{plain.get(error['type'], error['msg'])} (got {error['input']!r:.80})"


def _dotted(schema: type[Section], location: Sequence[str | int]) -> str:
    """The keys and list positions of a location, which for unions also holds names of types."""
    parts, inside, is_mapping = [], _section(schema), False
    for part in location:
        if inside or is_mapping or isinstance(part, int):
            parts.append(str(part))
        field = inside.model_fields.get(str(part)) if inside else None
        inside = _section(field.annotation) if field else None
        is_mapping = field is not None and get_origin(field.annotation) is dict
    return ".".join(parts)


def _nearest_key(schema: type[Section], dotted: str) -> str | None:
    """The known key that a mistyped one stands for: in the wrong section, or misspelt."""
    keys = {key: key for key in all_keys(schema)}
    ends = {key.split(".")[-1]: key for key in keys}
    end = dotted.split(".")[-1]
    if end in ends:
        return ends[end]
    for word, known in ((dotted, keys), (end, ends)):
        if near := difflib.get_close_matches(word, known, n=1, cutoff=0.5):
            return known[near[0]]
    return None
