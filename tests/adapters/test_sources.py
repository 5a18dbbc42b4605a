"""Where adapters come from: a Hub cache as huggingface_hub lays it out, and links that lead elsewhere."""

import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import DryRunError
from safetensors.torch import save_file

from poc_lora.adapters import sources
from poc_lora.adapters.adapter import Adapter, write_adapter
from poc_lora.adapters.factors import Factors
from poc_lora.errors import AdapterError
from poc_lora.merging.fold import fold
from poc_lora.merging.folders import merge_folders

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """One adapter in a cache: snapshots/COMMIT holds links into blobs/."""
    repo = tmp_path / "hub/models--org--name"
    snapshot = repo / "snapshots" / COMMIT
    write_adapter(Adapter({"layer.q_proj": Factors(torch.ones(2, 4), torch.ones(5, 2))}), repo / "blobs")
    snapshot.mkdir(parents=True)
    for path in (repo / "blobs").iterdir():
        (snapshot / path.name).symlink_to(os.path.relpath(path, snapshot))
    asked = []
    sizes = {}

    def download(name, file, *, revision, dry_run=False):
        asked.append((name, file, revision))
        return SimpleNamespace(file_size=sizes.get(file, 100)) if dry_run else str(snapshot / file)

    def download_all(name, *, revision, allow_patterns, dry_run=False):
        assert (name, revision) == ("org/name", COMMIT)
        remote = tmp_path / "remote"
        files = [path for path in remote.iterdir() if path.name in allow_patterns] if remote.exists() else []
        if dry_run:
            if sizes.get("offline"):
                raise DryRunError
            return [SimpleNamespace(filename=p.name, file_size=sizes.get(p.name, p.stat().st_size)) for p in files]
        for path in files:
            shutil.copy(path, repo / "blobs")
            (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
        return str(snapshot)

    monkeypatch.setattr(sources, "hf_hub_download", download)
    monkeypatch.setattr(sources, "snapshot_download", download_all)
    return snapshot, asked, sizes


@pytest.fixture
def remote(tmp_path):
    """What lies beside the adapter on the Hub."""
    (tmp_path / "remote").mkdir()
    for name in ("chat_template.jinja", "tokenizer.json", "training_args.bin", "README.md"):
        (tmp_path / "remote" / name).write_text(f"the adapter's {name}")


def test_the_tokenizer_beside_an_adapter_on_the_hub_is_carried(hub, remote, tmp_path):
    merge_folders(["org/name"], tmp_path / "merged")
    carried = {path.name for path in (tmp_path / "merged").iterdir()}
    assert carried == {
        "adapter_config.json", "adapter_model.safetensors", "merge.json", "chat_template.jinja", "tokenizer.json"
    }  # fmt: skip
    assert (tmp_path / "merged/tokenizer.json").read_text() == "the adapter's tokenizer.json"


def test_the_tokenizer_beside_an_adapter_on_the_hub_is_folded(hub, remote, tmp_path, tiny_model_dir):
    snapshot, *_ = hub
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file(
        {f"{layer}.lora_A.weight": torch.ones(2, 32), f"{layer}.lora_B.weight": torch.ones(32, 2)},
        (snapshot / "adapter_model.safetensors").resolve(),
    )
    fold("org/name", str(tiny_model_dir), tmp_path / "folded")
    for name in ("chat_template.jinja", "tokenizer.json"):
        assert (tmp_path / "folded" / name).read_text() == f"the adapter's {name}"


def test_a_tokenizer_beyond_the_limit_is_not_fetched(hub, remote, tmp_path):
    snapshot, _, sizes = hub
    sizes["tokenizer.json"] = 2**40
    with pytest.raises(AdapterError, match="more than any tokenizer"):
        merge_folders(["org/name"], tmp_path / "merged")
    assert not (snapshot / "tokenizer.json").exists()


def test_offline_the_cache_is_all_there_is(hub, remote, tmp_path):
    hub[2]["offline"] = True
    merge_folders(["org/name"], tmp_path / "merged")
    assert not (tmp_path / "merged/tokenizer.json").exists()


def test_a_hub_id_is_fetched_and_its_commit_is_written_down(hub, tmp_path):
    _, asked, _ = hub
    report = merge_folders(["org/name@v2"], tmp_path / "merged")
    # The weights are those of the configuration's commit, and their size is asked for first.
    assert asked == [
        ("org/name", "adapter_config.json", "v2"),
        ("org/name", "adapter_model.safetensors", COMMIT),
        ("org/name", "adapter_model.safetensors", COMMIT),
    ]
    (source,) = report.sources
    assert (source.name, source.hub_commit) == (f"org/name@{COMMIT}", COMMIT)


def test_weights_beyond_the_limit_are_not_fetched(hub, tmp_path):
    _, asked, sizes = hub
    sizes["adapter_model.safetensors"] = 2**40
    with pytest.raises(AdapterError, match="more than any adapter"):
        merge_folders(["org/name"], tmp_path / "merged")
    assert len(asked) == 2


def test_an_adapter_of_a_run_may_not_be_a_link_out_of_it(tmp_path):
    adapter = Adapter({"layer.q_proj": Factors(torch.ones(1, 4), torch.ones(5, 1))})
    write_adapter(adapter, tmp_path / "elsewhere")
    write_adapter(adapter, tmp_path / "run/adapters/00")
    (tmp_path / "run/adapters/01").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AdapterError, match="link that leads out"):
        merge_folders([tmp_path / "run"], tmp_path / "merged")


def test_links_may_not_lead_out_of_the_repository_s_cache(hub, tmp_path):
    snapshot, *_ = hub
    elsewhere = tmp_path / "secret.safetensors"
    (snapshot / "adapter_model.safetensors").resolve().rename(elsewhere)
    (snapshot / "adapter_model.safetensors").unlink()
    (snapshot / "adapter_model.safetensors").symlink_to(elsewhere)
    with pytest.raises(AdapterError, match="link that leads out"):
        merge_folders(["org/name"], tmp_path / "merged")


def test_a_folder_here_comes_before_a_name_on_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_adapter(Adapter({"layer.q_proj": Factors(torch.ones(1, 4), torch.ones(5, 1))}), tmp_path / "org/name")
    assert merge_folders(["org/name"], tmp_path / "merged").rank == 1
    assert hub[1] == []


def test_what_cannot_be_fetched_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(AdapterError, match="cannot be fetched from the Hub") as problem:  # tests are offline
        merge_folders(["org/nothing"], tmp_path / "merged")
    assert problem.value.where == "org/nothing"
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("name", ["x" * 300, "org/" + "x" * 300, "x\0y"])
def test_a_name_that_no_file_can_have_is_refused(tmp_path, name):
    with pytest.raises(AdapterError):
        merge_folders([name], tmp_path / "merged")
