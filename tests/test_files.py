"""Files that are whole or absent, and reads that cannot be made to eat the machine."""

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from poc_lora import files
from poc_lora.errors import SYSTEM_FIXES, DataError, RequestError, WriteError
from poc_lora.files import (
    commit_folder,
    read_json,
    read_text,
    require_new,
    require_place,
    sha256_file,
    write_atomic,
    write_json,
)


def nested(depth):
    return "[" * depth + "]" * depth


def test_write_atomic_makes_folders_and_replaces_content(tmp_path):
    path = tmp_path / "new" / "inner" / "a.txt"
    write_atomic(path, "one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_content_and_no_litter(tmp_path, monkeypatch, call):
    path = tmp_path / "a.txt"
    write_atomic(path, "old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, call, fail)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def write_into_folder(path):
    with commit_folder(path) as aside:
        (aside / "a").write_text("a")


@pytest.mark.parametrize("write", [lambda path: write_atomic(path, "a"), write_into_folder], ids=["file", "folder"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG])
def test_a_write_that_fails_says_where_why_and_what_to_do(tmp_path, monkeypatch, write, number):
    def fail(*_):
        raise OSError(number, os.strerror(number))  # as a write does: without a name

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(WriteError) as caught:
        write(tmp_path / "out")
    assert caught.value.what == f"cannot be written: {os.strerror(number)}"
    assert caught.value.where == str(tmp_path / "out")
    assert caught.value.fix == SYSTEM_FIXES[number]
    assert isinstance(caught.value, OSError)
    assert list(tmp_path.iterdir()) == []


def test_what_safetensors_makes_of_a_full_disk_is_told_in_the_same_words(tmp_path):
    with pytest.raises(WriteError, match="cannot be written: No such file or directory"), commit_folder(tmp_path / "a"):
        save_file({"a": torch.ones(2)}, tmp_path / "nowhere" / "a.safetensors")


@pytest.mark.parametrize("name", ["file/out", "n" * 300, "new/" + "n" * 300, "loop/out"])
@pytest.mark.parametrize(
    "use",
    [require_place, require_new, write_into_folder, lambda path: write_atomic(path, "a")],
    ids=["place", "new", "folder", "file"],
)
def test_a_place_that_nothing_can_be_written_to_is_a_request_error(tmp_path, use, name):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(RequestError, match="cannot be written: ") as caught:
        use(tmp_path / name)
    assert caught.value.where == str(tmp_path / name)
    assert caught.value.fix
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "new") == ["file", "loop"]


def test_a_folder_without_permission_is_refused_before_the_work(tmp_path, monkeypatch):
    # Root may write anywhere, so the answer of the system is made up.
    monkeypatch.setattr(files.os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(RequestError, match="cannot be written: Permission denied") as caught:
        require_new(tmp_path / "one" / "two")
    assert "permissions" in caught.value.fix
    with pytest.raises(RequestError, match="Permission denied"), commit_folder(tmp_path / "one"):
        raise AssertionError("refused before the work")


def test_a_long_name_leaves_room_for_the_folder_aside(tmp_path):
    name = "é" * 120
    write_into_folder(tmp_path / name)
    write_atomic(tmp_path / f"{name}.txt", "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == [name, f"{name}.txt"]


HOLD = """
import sys
from pathlib import Path
from poc_lora.files import commit_folder
with commit_folder(Path(sys.argv[1])) as aside:
    (aside / "part").write_text("half")
    print(aside.name, flush=True)
    sys.stdin.read()
"""


def holding(out):
    """A process that is filling the folder `out`, and the folder it fills."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    return process, out.parent / process.stdout.readline().strip()


def test_what_a_killed_process_left_is_named_and_removed_by_the_next_and_nothing_else(tmp_path, capfd):
    out = tmp_path / "out"
    (tmp_path / ".out.original").mkdir()  # a user's own
    killed, left = holding(out)
    alive, in_use = holding(out)
    killed.kill()
    killed.wait()
    assert left.is_dir()
    write_into_folder(out)
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / ".out.original", in_use, out])
    assert capfd.readouterr().err == f"removed {left}, which a killed process had left\n"
    # The other is done second, and is refused.
    alive.communicate("")
    assert alive.returncode != 0
    assert [path.name for path in out.iterdir()] == ["a"]
    assert sorted(tmp_path.iterdir()) == [tmp_path / ".out.original", out]


def test_a_file_that_a_killed_process_left_is_removed_too(tmp_path):
    code = """
import os, signal, sys
from pathlib import Path
from poc_lora import files
files.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
files.write_atomic(Path(sys.argv[1]), "a")
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.txt")], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    write_atomic(tmp_path / "a.txt", "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_write_json_refuses_nan_before_it_touches_the_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"loss": 1.5})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": float("nan")})
    assert read_json(path) == {"loss": 1.5}


def test_commit_folder_appears_whole_when_the_block_ends(tmp_path):
    target = tmp_path / "commits" / "one"
    with commit_folder(target) as aside:
        (aside / "inner").mkdir()
        (aside / "inner" / "a").write_text("a")
        assert not target.exists()
    assert (target / "inner" / "a").read_text() == "a"
    assert list(target.parent.iterdir()) == [target]
    assert os.stat(target).st_mode & 0o777 == 0o755


@pytest.mark.parametrize("problem", [ValueError, KeyboardInterrupt])
def test_commit_folder_vanishes_when_the_block_fails(tmp_path, problem):
    def fill_and_fail():
        with commit_folder(tmp_path / "one") as aside:
            (aside / "a").write_text("a")
            raise problem

    with pytest.raises(problem):
        fill_and_fail()
    assert list(tmp_path.iterdir()) == []


def test_commit_folder_never_replaces_a_folder(tmp_path):
    def appear_while_filled(path):
        with commit_folder(path) as aside:
            (aside / "a").write_text("a")
            (path / "mine").mkdir(parents=True)

    with pytest.raises(RequestError, match="exists already"):
        appear_while_filled(tmp_path / "one")
    assert [p.name for p in tmp_path.rglob("*")] == ["one", "mine"]
    with pytest.raises(RequestError, match="exists already"), commit_folder(tmp_path / "one"):
        raise AssertionError("refused before the work")


def test_commit_folder_takes_the_place_of_an_empty_folder(tmp_path):
    (tmp_path / "one").mkdir()
    with commit_folder(tmp_path / "one") as aside:
        (aside / "a").write_text("a")
    assert [p.name for p in tmp_path.rglob("*")] == ["one", "a"]
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(RequestError, match="exists already"), commit_folder(tmp_path / "link"):
        pass


def test_sha256_is_of_the_bytes(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"\x00\xff" * 100_000)
    assert sha256_file(path) == hashlib.sha256(b"\x00\xff" * 100_000).hexdigest()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RequestError, match="no such file") as caught:
        read_text(tmp_path / "none.json")
    assert caught.value.where == str(tmp_path / "none.json")


def test_a_folder_in_place_of_a_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_json(tmp_path, error=DataError)


def test_bytes_that_are_not_utf8_are_located(tmp_path):
    (tmp_path / "a").write_bytes(b"abc\xff")
    with pytest.raises(RequestError, match="byte 3"):
        read_text(tmp_path / "a")


def test_a_file_over_the_size_limit_is_not_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps("x" * 98))
    assert read_json(path, max_bytes=100) == "x" * 98
    with pytest.raises(RequestError, match="larger than the 99"):
        read_json(path, max_bytes=99)


def test_broken_json_is_located_by_line_and_column(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{\n  "a": 1,\n  "b" 2\n}')
    with pytest.raises(DataError, match="line 3, column 7") as caught:
        read_json(path, error=DataError)
    assert caught.value.where == str(path)


@pytest.mark.parametrize("depth", [files.MAX_JSON_DEPTH + 2, 200_000])
def test_deep_json_is_refused(tmp_path, depth):
    path = tmp_path / "a.json"
    path.write_text(nested(depth))
    with pytest.raises(RequestError, match=r"nested deeper|cannot be read"):
        read_json(path)


def test_json_of_ordinary_depth_is_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": ' * 10 + nested(files.MAX_JSON_DEPTH - 10) + "}" * 10)
    assert isinstance(read_json(path)["a"], dict)


def test_a_number_of_too_many_digits_is_refused(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("9" * 10_000)
    with pytest.raises(RequestError, match="cannot be read"):
        read_json(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize("read", [read_text, read_json, sha256_file])
def test_pipes_and_devices_are_refused_not_waited_for(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(RequestError, match="not a plain file"):
            read(path)


def test_a_file_that_is_longer_than_it_says_is_not_read_to_its_end():
    """Files of /proc say that they are empty."""
    with pytest.raises(RequestError, match="larger than the 10"):
        read_text(Path("/proc/self/status"), max_bytes=10)


def test_what_is_written_has_the_permissions_that_the_umask_leaves(tmp_path):
    code = """
import sys
from pathlib import Path
from poc_lora.files import commit_folder, write_atomic
out = Path(sys.argv[1])
with commit_folder(out / "folder") as folder:
    write_atomic(folder / "inside", "a")
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, umask=0o027)
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "folder" / "inside").stat().st_mode & 0o777 == 0o640
