"""Loading base models that strangers made."""

import json
import os
import shutil

import pytest

from poc_lora.errors import ModelError
from poc_lora.models.load import empty_base, load_base, load_tokenizer


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_an_attention_kernel_from_the_hub_is_refused(tiny_model_dir, tmp_path, key):
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)
    config = json.loads((base / "config.json").read_text()) | {key: "org/kernel"}
    (base / "config.json").write_text(json.dumps(config))
    for load in (load_base, empty_base):
        with pytest.raises(ModelError, match="'org/kernel', which is code"):
            load(str(base))


@pytest.mark.parametrize("layers", [501, 10**7, 10**400])
def test_a_base_of_a_billion_layers_is_refused_before_they_are_built(tiny_model_dir, tmp_path, layers):
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)
    config = json.loads((base / "config.json").read_text()) | {"num_hidden_layers": layers, "layer_types": None}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="layers, more than any model"):
        empty_base(str(base))


def test_a_pipe_among_a_bases_files_is_refused_not_waited_for(tiny_model_dir, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)
    os.mkfifo(base / "generation_config.json.extra")
    with pytest.raises(ModelError, match="not a plain file"):
        load_base(str(base))


@pytest.mark.parametrize(
    ("name", "nbytes"),
    [
        ("config.json", 2**20),
        ("tokenizer_config.json", 2**24),
        ("chat_template.jinja", 2**20),
        ("tokenizer.json", 2**28),
    ],
)
def test_a_file_beside_the_weights_that_is_too_large_is_refused_unread(tiny_model_dir, tmp_path, name, nbytes):
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)
    with (base / name).open("ab") as file:
        file.truncate(nbytes + 1)  # sparse
    for load in (load_base, empty_base, load_tokenizer):
        with pytest.raises(ModelError, match="where no model has more than") as problem:
            load(str(base))
        assert problem.value.where == str(base / name)
