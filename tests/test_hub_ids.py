"""What is a Hub id, and what is a path or neither."""

import pytest

from poc_lora.hub_ids import is_adapter_id, is_base_model_id, is_repo_id, split_revision


@pytest.mark.parametrize("name", ["org/name", "o-r_g/na.me-7B", "-org/_name"])
def test_org_and_name_is_an_id(name):
    assert is_repo_id(name)
    assert is_base_model_id(name)
    assert is_adapter_id(name)


@pytest.mark.parametrize(
    "name",
    ["", "/name", "org/", "./name", "../name", "/abs/name", "~/name", "a/b/c", "org/na me", "örg/name", "org/n\n"],
)
def test_paths_and_other_text_are_none(name):
    assert not is_repo_id(name)
    assert not is_base_model_id(name)
    assert not is_adapter_id(name)


def test_a_plain_name_is_a_base_model_alone():
    assert is_base_model_id("gpt2")
    assert not is_repo_id("gpt2")
    assert not is_adapter_id("gpt2")


@pytest.mark.parametrize("revision", ["main", "refs/pr/1", "v1.0", "0" * 40])
def test_an_adapter_may_name_a_revision(revision):
    assert is_adapter_id(f"org/name@{revision}")
    assert split_revision(f"org/name@{revision}") == ("org/name", revision)
    assert not is_base_model_id(f"org/name@{revision}")


@pytest.mark.parametrize("source", ["org/name@", "org/name@a b", "name@main", "org/name@a@b"])
def test_a_revision_is_well_formed(source):
    assert not is_adapter_id(source)


def test_without_a_revision_there_is_none():
    assert split_revision("org/name") == ("org/name", None)


def test_what_exists_here_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert not is_adapter_id("org/name")


def test_what_would_lie_in_a_folder_that_is_here_is_a_missing_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert not is_adapter_id("runs/missing")
    assert not is_base_model_id("runs/missing")
    assert is_base_model_id("gpt2")
