"""What tells base models apart."""

import pytest

from poc_lora.errors import ModelError
from poc_lora.evaluation.variants import base_digest


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
