"""Atomic writes of files and folders, checksums, and reads of bounded size."""

import contextlib
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from poc_lora.errors import RequestError

MAX_JSON_BYTES = 64 * 2**20
MAX_JSON_DEPTH = 64
READ_BYTES = 2**20
_UMASK = os.umask(0o022)  # it can only be read by setting it
os.umask(_UMASK)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write `path` atomically: a reader sees the old content or the new, never a part.

    Raises RequestError if the folder cannot be made or written to.
    """
    data = content.encode() if isinstance(content, str) else content
    with _refusing_bad_places(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        allow_as_usual(Path(aside))
        os.replace(aside, path)
        sync(path.parent)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


def allow_as_usual(path: Path) -> None:
    """Give a new file or folder the permissions that the umask leaves; temporary ones are made private."""
    path.chmod((0o777 if path.is_dir() else 0o666) & ~_UMASK)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. Raises ValueError for NaN and infinity."""
    write_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


@contextlib.contextmanager
def commit_folder(path: Path) -> Iterator[Path]:
    """Yield a folder beside `path` to fill; on success it is renamed to `path`, on an error removed.

    Raises RequestError if the folder cannot be made, or as `require_new` does, before the block and after it.
    """
    require_new(path)
    with _refusing_bad_places(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield aside
        allow_as_usual(aside)
        publish_folder(aside, path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def publish_folder(aside: Path, path: Path) -> None:
    """Rename a filled folder to its final name, once all its content is on the disk.

    Raises RequestError as `require_new` does.
    """
    for written in (*aside.rglob("*"), aside):
        sync(written)
    require_new(path)
    os.rename(aside, path)  # in place of an empty folder, if there is one
    sync(path.parent)


def require_new(path: Path) -> None:
    """Raise RequestError unless `path` can become a new folder: nothing is there, or an empty folder."""
    if path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir()))):
        raise RequestError("the output exists already", where=path, fix="choose another folder, or remove this one")
    if path.is_dir() and path.samefile(Path.cwd()):
        raise RequestError("the output is the current folder", where=path, fix="name a folder inside it")


@contextlib.contextmanager
def _refusing_bad_places(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        raise RequestError(
            f"cannot be written: {problem.strerror}", where=path, fix="choose a folder that can be written to"
        ) from problem


def links_root(folder: Path) -> Path:
    """The folder that links in `folder` may not lead out of: itself, or its repository in the Hub's cache.

    The folder that `snapshot_download` returns, models--ORG--NAME/snapshots/COMMIT, holds links into blobs/.
    """
    real = folder.resolve()
    return next(
        (
            repo.parent
            for repo in real.parents
            if repo.name == "snapshots" and repo.parent.name.startswith(("models--", "datasets--"))
        ),
        real,
    )


def free_bytes_at(path: Path) -> int:
    """Returns the free bytes on the disk of `path`, which need not exist yet."""
    there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    return shutil.disk_usage(there).free


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's list of names, to the disk, so that it survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_file(path: Path) -> str:
    """Returns the SHA-256 of a file, in hex. Raises RequestError if it is no plain file."""
    require_plain(path)
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextlib.contextmanager
def open_safetensors(path: Path, *, error: type[RequestError]) -> Iterator[Any]:
    """Open a safetensors file within the block. Raises `error` for what goes wrong in opening or reading it."""
    with refusing_damage(path, error=error):
        require_plain(path, error=error)
        with safe_open(path, framework="pt") as stored:
            yield stored


@contextlib.contextmanager
def refusing_damage(path: Path, *, error: type[RequestError]) -> Iterator[None]:
    """Raise `error` for what goes wrong in reading a safetensors file within the block."""
    try:
        yield
    except RequestError:  # a ValueError too
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError) as problem:
        raise error(f"not a readable safetensors file: {problem}", where=path, fix="fetch it again") from problem


def read_json(path: Path, *, error: type[RequestError] = RequestError, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Parse a JSON file of bounded size and depth. Raises `error`, which names the file and line."""
    text = read_text(path, error=error, max_bytes=max_bytes)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as problem:
        raise error(
            f"not valid JSON: {problem.msg} at line {problem.lineno}, column {problem.colno}",
            where=path,
            fix="repair the file at that line",
        ) from problem
    except (RecursionError, ValueError) as problem:
        raise error(f"JSON that cannot be read: {problem}", where=path) from problem
    if _deeper_than(value, MAX_JSON_DEPTH):
        raise error(f"JSON nested deeper than {MAX_JSON_DEPTH} levels", where=path)
    return value


def read_text(path: Path, *, error: type[RequestError] = RequestError, max_bytes: int = MAX_JSON_BYTES) -> str:
    """Read a UTF-8 file of at most `max_bytes`. Raises `error`."""
    try:
        require_plain(path, error=error)
        content, size = bytearray(), path.stat().st_size
        with path.open("rb") as handle:  # in parts: some files, such as those of /proc, are longer than they say
            while size <= max_bytes and (part := handle.read(READ_BYTES)):
                content += part
                size = max(size, len(content))
        if size > max_bytes:
            raise error(f"file of {size:,} bytes is larger than the {max_bytes:,} this reads", where=path)
        return content.decode()
    except FileNotFoundError as problem:
        raise error("no such file", where=path, fix="check the path") from problem
    except UnicodeDecodeError as problem:
        raise error(f"not UTF-8 text (byte {problem.start})", where=path) from problem
    except OSError as problem:
        raise error(f"cannot be read: {problem.strerror}", where=path) from problem


def require_plain(path: Path, *, error: type[RequestError] = RequestError) -> None:
    """Raise `error` for a pipe, a device and the like, which may never end; OSError if there is nothing.

    A folder passes: opening it fails by itself.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise error("not a plain file", where=path, fix="give a file on disk")


def size(nbytes: int) -> str:
    """Format a number of bytes; 1.5 GB is 1.5e9 bytes."""
    for unit, width in (("GB", 1e9), ("MB", 1e6)):
        if nbytes >= width:
            return f"{nbytes / width:.1f} {unit}"
    return f"{nbytes / 1e3:.0f} kB"


def _deeper_than(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return False
    return True
