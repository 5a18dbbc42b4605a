"""What counts as the id of a Hugging Face Hub repository.

An id is `org/name`. A base model's may also be a plain `name`, such as gpt2; an adapter's may end in `@revision`.
What exists on this machine is a path and never an id, but where a repository is named to be written to.
"""

import re
from pathlib import Path

_NAME = r"[\w-][\w.-]*"
_ORG_NAME = re.compile(f"{_NAME}/{_NAME}", re.ASCII)
_PLAIN = re.compile(_NAME, re.ASCII)
_REVISION = re.compile(r"[\w./-]+", re.ASCII)


def is_repo_id(name: str) -> bool:
    """Whether `name` has the form org/name, whatever is on this machine."""
    return bool(_ORG_NAME.fullmatch(name))


def is_base_model_id(name: str) -> bool:
    """Whether `name` is org/name, or a plain name such as gpt2, and no path of this machine."""
    return bool(_ORG_NAME.fullmatch(name) or _PLAIN.fullmatch(name)) and not Path(name).exists()


def split_revision(source: str | Path) -> tuple[str, str | None]:
    """Split org/name@revision into its id and its revision, None where there is none."""
    name, at, revision = str(source).partition("@")
    return name, revision if at else None


def is_adapter_id(source: str | Path) -> bool:
    """Whether `source` is org/name or org/name@revision, and no path of this machine."""
    name, revision = split_revision(source)
    well_formed = is_repo_id(name) and (revision is None or bool(_REVISION.fullmatch(revision)))
    return well_formed and not Path(source).exists()
