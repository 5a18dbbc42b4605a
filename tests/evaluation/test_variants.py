"""What is evaluated, and what tells base models apart."""

import shutil

import pytest
import torch

from poc_lora.adapters.adapter import Adapter, write_adapter
from poc_lora.adapters.factors import Factors
from poc_lora.config import dump_yaml, validate
from poc_lora.errors import ModelError, RunError
from poc_lora.evaluation.variants import base_digest, find_variants
from poc_lora.merging.folders import merge_folders


def test_a_base_on_the_hub_is_identified_by_its_commit(monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    cache, digests = tmp_path / "models--org--base", []
    for commit in ("a" * 40, "b" * 40):  # as huggingface_hub keeps a repository
        for path, text in {"refs/main": commit, f"snapshots/{commit}/config.json": "{}"}.items():
            (cache / path).parent.mkdir(parents=True, exist_ok=True)
            (cache / path).write_text(text)
        digests.append(base_digest("org/base"))
    assert digests == ["org/base at " + "a" * 40, "org/base at " + "b" * 40]
    assert base_digest("org/base", "a" * 40) == digests[0]
    with pytest.raises(ModelError, match="org/other"):
        base_digest("org/other")


@pytest.fixture
def run(tmp_path):
    """A run of three adapters, without a merge."""
    config = {"model": {"name": "org/base"}, "data": {"train": ["rows.json"]}, "output": str(tmp_path / "run")}
    for number in range(3):
        factors = {"model.layers.0.q_proj": Factors(torch.full((1, 4), number + 1.0), torch.ones(4, 1))}
        write_adapter(Adapter(factors, base_model="org/base"), tmp_path / "run" / "adapters" / f"{number:02d}")
    (tmp_path / "run" / "config.yaml").write_text(dump_yaml(validate(config, where="here")))
    return tmp_path / "run"


def refusal(run):
    with pytest.raises(RunError) as caught:
        find_variants([run])
    return caught.value


def test_a_merge_is_evaluated_beside_the_adapters_that_it_was_made_of(run):
    merge_folders([run], run / "merged")
    assert find_variants([run]).merged is not None
    shutil.rmtree(run / "adapters" / "01")
    shutil.copytree(run / "adapters" / "00", run / "adapters" / "01")  # other weights
    problem = refusal(run)
    assert problem.what == "the merge is out of date: the adapters of the run have changed"
    assert f"poc-lora merge {run}" in problem.fix


def test_a_merge_of_some_adapters_is_called_that_unless_the_others_were_left_out(run):
    merge_folders([run / "adapters" / "00", run / "adapters" / "02"], run / "merged")
    assert refusal(run).what == "the merge is of 2 of the run's 3 adapters"
    shutil.rmtree(run / "merged")
    merge_folders([run], run / "merged", leave_out=[run / "adapters" / "01"])
    assert find_variants([run]).merged is not None
