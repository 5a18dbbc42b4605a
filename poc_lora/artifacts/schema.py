"""What the schemas of a run's files share: bounded numbers, reading, writing, and what may be published."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from poc_lora.errors import RunError
from poc_lora.files import read_json, write_atomic

MAX_SHOWN = 2  # entries of a collection in a repr
LARGEST = 1e30  # matplotlib cannot draw larger values

Finite = Annotated[float, Field(allow_inf_nan=False)]
Number = Annotated[float, Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1.001, allow_inf_nan=False)]
MAX_COUNT = 2**53
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]


def _is_drawable(value: float) -> float:
    if abs(value) > LARGEST:
        raise ValueError(f"a number larger than {LARGEST:g}")
    return value


OrNan = Annotated[  # NaN is null in JSON
    float, BeforeValidator(lambda value: math.nan if value is None else value), AfterValidator(_is_drawable)
]

T = TypeVar("T")


class _Marker:
    pass


class _Entries(int):
    def __repr__(self) -> str:
        return f"<{int(self)} entries>"


PUBLIC = _Marker()
Public = Annotated[T, PUBLIC]  # a field that may leave this machine, as in `rank: Public[int]`


class Schema(BaseModel):
    """A part of a file. Unknown keys are ignored, and fields that were never set are not written."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    def to_json(self) -> dict[str, Any]:
        """Returns plain JSON values, in the order of the fields; NaN becomes None."""
        values: dict[str, Any] = plain(self)
        return values

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """Shortens collections: a whole file would fill the screen."""
        for name, value in super().__repr_args__():
            long = isinstance(value, dict | list | tuple) and len(value) > MAX_SHOWN
            yield name, _Entries(len(value)) if long else value

    def public(self, names: Mapping[str, str]) -> Self:
        """Returns a copy with the fields marked `Public`, which all required fields must be.

        Args:
            names: Texts to replace, such as a local path by its Hub id. Other absolute paths are cut to their last
                part, since they tell about this machine.
        """
        return self.model_validate(plain(self, names))


class Artifact(Schema):
    """A whole JSON file."""

    content: ClassVar[str]  # completes the error message "not ..."
    fix: ClassVar[str]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file as untrusted. Raises RunError, which names the file and the field."""
        raw = read_json(path, error=RunError)
        try:
            return cls.model_validate(raw)
        except ValidationError as problem:
            first = problem.errors(include_url=False)[0]
            field = ".".join(map(str, first["loc"])) or "the whole"
            raise RunError(f"not {cls.content} ({field}: {first['msg']})", where=path, fix=cls.fix) from problem

    @classmethod
    def read_if_there(cls, path: Path) -> Self | None:
        """Read a file; returns None where there is none."""
        return cls.read(path) if path.is_file() else None

    def dumps(self) -> str:
        """Returns the text of the file."""
        return json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n"

    def write(self, path: Path) -> None:
        """Write the file atomically."""
        write_atomic(path, self.dumps())


def plain(value: Any, names: Mapping[str, str] | None = None) -> Any:
    """Returns JSON values of schemas, dataclasses and collections; with `names`, those of public fields only."""
    if isinstance(value, Schema):
        fields = type(value).model_fields
        shown = (n for n in fields if n in value.model_fields_set and (names is None or PUBLIC in fields[n].metadata))
        return {name: plain(getattr(value, name), names) for name in shown}
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value), names)
    if isinstance(value, dict):
        return {str(key): plain(inner, names) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner, names) for inner in value]
    if isinstance(value, str) and names is not None:
        return names.get(value, Path(value).name if Path(value).is_absolute() else value)
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and math.isnan(value) else value
