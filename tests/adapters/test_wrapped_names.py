"""Adapters saved from wrapped models, with many modules, or of one folder's name, merge into what PEFT loads."""

import json

import pytest
import torch
from peft import AutoPeftModel, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from poc_lora.adapters.adapter import CONFIG_NAME, WEIGHTS_NAME, Adapter, read_adapter, write_adapter
from poc_lora.adapters.factors import Factors
from poc_lora.errors import AdapterError
from poc_lora.files import read_json
from poc_lora.merging.folders import merge_folders
from tests.conftest import build_llama

Q = "model.layers.0.self_attn.q_proj"


def small(seed=0, modules=(Q,)):
    generator = torch.Generator().manual_seed(seed)
    return Adapter(
        {m: Factors(torch.randn(2, 4, generator=generator), torch.randn(4, 2, generator=generator)) for m in modules}
    )


def rename(folder, change):
    tensors = load_file(folder / WEIGHTS_NAME)
    save_file({change(key): tensor for key, tensor in tensors.items()}, folder / WEIGHTS_NAME)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("layers.0.", "layers.0._checkpoint_wrapped_module."),
        ("layers.0.", "_fsdp_wrapped_module.layers.0._orig_mod."),
        ("base_model.", "module._orig_mod.base_model."),
        ("base_model.model.", "base_model.model.module."),
        (".lora_", "._orig_mod.lora_"),
    ],
)
def test_wrappers_in_names_are_left_out(tmp_path, old, new):
    write_adapter(small(), tmp_path / "a")
    rename(tmp_path / "a", lambda key: key.replace(old, new, 1))
    read = read_adapter(tmp_path / "a")
    assert list(read.modules) == [Q]
    torch.testing.assert_close(read.modules[Q].A, small().modules[Q].A)


def test_one_tensor_under_two_names_is_refused(tmp_path):
    write_adapter(small(), tmp_path / "a")
    tensors = load_file(tmp_path / "a" / WEIGHTS_NAME)
    wrapped = {key.replace("layers.0", "layers.0._orig_mod"): tensor.clone() for key, tensor in tensors.items()}
    save_file(tensors | wrapped, tmp_path / "a" / WEIGHTS_NAME)
    with pytest.raises(AdapterError, match="are one tensor"):
        read_adapter(tmp_path / "a")


def test_sources_of_one_name_are_told_apart(tmp_path):
    folders = [tmp_path / run / "checkpoint-500" for run in ("a", "b")] + [tmp_path / "c"]
    for seed, folder in enumerate(folders):
        write_adapter(small(seed), folder)
    report = merge_folders(folders, tmp_path / "merged")
    assert [source.name for source in report.sources] == ["a/checkpoint-500", "b/checkpoint-500", "c"]


def test_a_mixture_of_experts_with_every_linear_layer_is_read_and_written(tmp_path):
    paths = [
        f"model.layers.{i}.mlp.experts.{e}.{p}"
        for i in range(48)
        for e in range(128)
        for p in ("gate_proj", "up_proj", "down_proj")
    ]
    modules = {path: Factors(torch.ones(1, 1), torch.ones(1, 1)) for path in paths}
    write_adapter(Adapter(modules), tmp_path / "full")
    assert len(read_adapter(tmp_path / "full").modules) == len(paths)
    known = frozenset({"gate_proj", "up_proj", "down_proj"})
    write_adapter(Adapter(modules, targets=known), tmp_path / "short")
    assert read_json(tmp_path / "short" / CONFIG_NAME)["target_modules"] == sorted(known)


def test_auto_peft_model_loads_the_merge(tmp_path):
    build_llama(97).save_pretrained(tmp_path / "base")
    for seed in range(2):
        base = build_llama(97)
        torch.manual_seed(seed)
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        model.save_pretrained(tmp_path / f"{seed}")
        path = tmp_path / f"{seed}" / CONFIG_NAME
        config = json.loads(path.read_text())
        config["auto_mapping"]["unsloth_fixed"] = True  # as Unsloth does
        path.write_text(json.dumps(config))
    merge_folders([tmp_path / "0", tmp_path / "1"], tmp_path / "merged")
    loaded = AutoPeftModel.from_pretrained(tmp_path / "merged")
    assert type(loaded.base_model.model).__name__ == "LlamaForCausalLM"
