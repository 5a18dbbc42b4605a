"""Files that are whole or absent, and reads that cannot be made to eat the machine."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from poc_lora import files
from poc_lora.errors import DataError, RequestError
from poc_lora.files import commit_folder, read_json, read_text, sha256_file, write_atomic, write_json


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


def test_writing_below_a_file_is_a_request_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="cannot be written"):
        write_atomic(tmp_path / "file" / "a.txt", "x")
    with pytest.raises(RequestError, match="cannot be written"), commit_folder(tmp_path / "file" / "folder"):
        pass


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
