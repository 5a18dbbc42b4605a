"""Atomic writes of files and folders, checksums, and reads of bounded size."""

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from poc_lora.errors import PocLoraError, RequestError, WriteError, system_problem, visible

MAX_JSON_BYTES = 64 * 2**20
MAX_JSON_DEPTH = 64
READ_BYTES = 2**20
_UMASK = os.umask(0o022)  # it can only be read by setting it
os.umask(_UMASK)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write `path` atomically: a reader sees the old content or the new, never a part.

    Raises RequestError if the folder cannot be made or written to, WriteError if it is full.
    """
    data = content.encode() if isinstance(content, str) else content
    require_place(path)
    aside, handle = _make_aside(path, folder=False)
    try:
        with system_errors_as(WriteError, "cannot be written", path), os.fdopen(handle, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
            allow_as_usual(aside)
            os.replace(aside, path)
            sync(path.parent)
    except BaseException:
        aside.unlink(missing_ok=True)
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

    What a killed process left beside `path` is removed, and standard error says so.

    Raises:
        RequestError: The folder cannot be made, or as `require_new` does, before the block and after it.
        WriteError: For an OSError or a SafetensorError within the block.
    """
    require_new(path)
    aside, handle = _make_aside(path, folder=True)
    try:
        with system_errors_as(WriteError, "cannot be written", path):
            yield aside
            allow_as_usual(aside)
            publish_folder(aside, path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    finally:
        os.close(handle)


def publish_folder(aside: Path, path: Path) -> None:
    """Rename a filled folder to its final name, once all its content is on the disk.

    Raises RequestError as `require_new` does.
    """
    for written in (*aside.rglob("*"), aside):
        sync(written)
    try:
        os.rename(aside, path)  # in place of an empty folder, if there is one
    except OSError:
        require_new(path)  # another process may have been faster
        raise
    sync(path.parent)


def require_new(path: Path) -> None:
    """Raise RequestError unless `path` can become a new folder: nothing is there, or an empty folder."""
    require_place(path)
    if path.is_dir():
        require_place(path.absolute().parent)  # where it will be replaced
    if path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir()))):
        raise RequestError("the output exists already", where=path, fix="choose another folder, or remove this one")
    if path.is_dir() and path.samefile(Path.cwd()):
        raise RequestError("the output is the current folder", where=path, fix="name a folder inside it")


def require_place(path: Path) -> None:
    """Raise RequestError where it can be told beforehand that no file or folder `path` can be created.

    If `path` is a folder, that none can be created in it.
    """
    with system_errors_as(RequestError, "cannot be written", path):
        whole = path.absolute()
        above = (whole, *whole.parents) if whole.is_dir() else whole.parents
        there = next(place for place in above if place.exists() or place.is_symlink())
        missing = whole.relative_to(there).parts
        if any(len(os.fsencode(part)) > os.pathconf(there, "PC_NAME_MAX") for part in missing):
            raise OSError(errno.ENAMETOOLONG, "")
        if not there.is_dir():
            raise OSError(errno.ENOTDIR, "")
        if not os.access(there, os.W_OK | os.X_OK):
            raise OSError(errno.EROFS if os.statvfs(there).f_flag & os.ST_RDONLY else errno.EACCES, "")


def as_paths(given: str | Path | Sequence[str | Path]) -> list[Path]:
    """Returns one path, or several, as a list of paths."""
    return [Path(one) for one in ([given] if isinstance(given, str | Path) else given)]


@contextlib.contextmanager
def system_errors_as(error: type[PocLoraError], what: str, path: str | Path) -> Iterator[None]:
    """Raise `error`, with the reason, `path` and what to do, for an OSError or a SafetensorError within the block."""
    try:
        yield
    except (PocLoraError, BrokenPipeError):  # a WriteError is an OSError too; typer ends where nobody reads any more
        raise
    except (OSError, SafetensorError) as problem:
        reason, fix = system_problem(problem)
        raise error(f"{what}: {reason}", where=path, fix=fix) from problem


def _make_aside(path: Path, *, folder: bool) -> tuple[Path, int]:
    """Create a file or folder beside `path`, locked for as long as the returned handle is open.

    Those of processes that were killed, whose locks ended with them, are removed.
    """
    prefix = f".{path.name[:50]}.poc-lora-"  # nobody else's, and short enough for a name
    with system_errors_as(RequestError, "cannot be written", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f"{glob.escape(prefix)}*"):
            _remove_left(left)
        while True:
            if folder:
                aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=prefix))
                handle = os.open(aside, os.O_RDONLY)
            else:
                handle, name = tempfile.mkstemp(dir=path.parent, prefix=prefix)
                aside = Path(name)
            with contextlib.suppress(OSError):  # a file system without locks, where nothing left is removed either
                fcntl.flock(handle, fcntl.LOCK_EX)
            if aside.exists():
                return aside, handle
            os.close(handle)  # another process took it for one that was left, before it was locked


def _remove_left(path: Path) -> None:
    """Remove what a killed process left, unless a process that lives has locked it."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        print(visible(f"removed {path}, which a killed process had left"), file=sys.stderr)  # noqa: T201
    except (OSError, ValueError):  # in use, not to be removed, or a standard error that is closed
        pass
    finally:
        os.close(handle)


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
    except OSError as problem:
        reason, fix = system_problem(problem)
        raise error(f"cannot be read: {reason}", where=path, fix=fix) from problem
    except (SafetensorError, ValueError, RuntimeError) as problem:
        raise error(f"not a readable safetensors file: {problem}", where=path, fix="fetch it again") from problem


def read_json(path: Path, *, error: type[RequestError] = RequestError, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Parse a JSON file of bounded size and depth. Raises `error`, which names the file and line."""
    text = read_text(path, error=error, max_bytes=max_bytes)
    try:
        value = json.loads(text, object_pairs_hook=unique_keys)
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


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object's keys and values. Raises ValueError for a repeated key, of which json keeps the last."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {name!r:.80} is repeated")
        found[name] = value
    return found


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
        return content.decode("utf-8-sig")  # some programs write a byte order mark
    except FileNotFoundError as problem:
        raise error("no such file", where=path, fix="check the path") from problem
    except UnicodeDecodeError as problem:
        raise error(f"not UTF-8 text (byte {problem.start})", where=path, fix="save it as UTF-8") from problem
    except OSError as problem:
        reason, fix = system_problem(problem)
        raise error(f"cannot be read: {reason}", where=path, fix=fix) from problem


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
