"""Base models as they lie on the Hub: quantised already, and with tensors named otherwise than modules."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from poc_lora.config import validate
from poc_lora.errors import ModelError
from poc_lora.merging.fold import fold
from poc_lora.merging.fold_plan import loading_class
from poc_lora.merging.folders import merge_folders
from poc_lora.models.load import _config, load_base
from poc_lora.models.names import names_in_model
from poc_lora.training.check import check, preflight
from poc_lora.training.train import train
from tests.conftest import build_tokenizer, instruction_rows


def test_a_checkpoint_that_is_quantised_already_is_loaded_as_it_is(tiny_model_dir, tmp_path):
    pytest.importorskip("bitsandbytes")
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    stored = AutoModelForCausalLM.from_pretrained(tiny_model_dir, quantization_config=how, dtype=torch.float32)
    stored.save_pretrained(tmp_path / "base")
    for path in tiny_model_dir.glob("tokenizer*"):
        (tmp_path / "base" / path.name).write_bytes(path.read_bytes())
    model, _ = load_base(str(tmp_path / "base"), dtype="float32")
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    tokens = torch.arange(1, 9)[None]
    torch.testing.assert_close(model(tokens).logits, stored(tokens).logits, rtol=0.02, atol=0.02)
    with pytest.raises(ModelError, match="quantised already"):
        load_base(str(tmp_path / "base"), quantization="int8")


@pytest.fixture(params=["nf4", "int8"])
def stored(request, tmp_path):
    """A checkpoint that bitsandbytes quantised with its defaults, and a configuration that trains on it."""
    pytest.importorskip("bitsandbytes")
    tokenizer = build_tokenizer([row["instruction"] + " " + row["output"] for row in instruction_rows(60)])
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(tokenizer))).save_pretrained(tmp_path / "full")
    how = BitsAndBytesConfig(load_in_8bit=True)
    if request.param == "nf4":
        how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "full", quantization_config=how)
    model.save_pretrained(tmp_path / "base")
    for name in ("full", "base"):
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "rows.json").write_text(json.dumps(instruction_rows(40)))
    sections = dict(
        model={"name": str(tmp_path / "base"), "dtype": "float32"},
        adapters={"count": 2},
        lora={"rank": 2, "alpha": 4, "targets": ["q_proj", "v_proj"]},
        data={"train": [str(tmp_path / "rows.json")], "validation": 4},
        train={"max_steps": 2, "batch_size": 2},
        output=str(tmp_path / "run"),
    )
    return request.param, validate(sections, where="test")


def test_a_base_that_is_stored_quantised_is_checked_trained_on_and_merged(stored, tmp_path):
    kind, config = stored
    facts = check(config)
    assert facts["base weights"] == f"{kind}, computing in float32"
    full = config.model_copy(update={"model": config.model.model_copy(update={"name": str(tmp_path / "full")})})
    names = ["memory on cpu: base model", "memory on cpu: peak"]
    asked = check(full.model_copy(update={"model": full.model.model_copy(update={"quantization": kind})}))
    assert [facts[name].split()[0] for name in names] == [asked[name].split()[0] for name in names]
    done = train(config)
    assert [state.status for state in done.progress.values()] == ["finished"] * 2
    report = merge_folders([tmp_path / "run"], tmp_path / "merged")
    assert report.sources[0].base_model == str(tmp_path / "base")
    assert 0 < report.norm < 1
    with pytest.raises(ModelError, match="quantised, so updates of its weights would be lost"):
        fold(tmp_path / "merged", str(tmp_path / "base"), tmp_path / "folded")
    fold(tmp_path / "merged", str(tmp_path / "full"), tmp_path / "folded")


def test_a_checkpoint_in_float8_is_dequantised(tiny_model_dir, tmp_path):
    weights, expected = load_file(tiny_model_dir / "model.safetensors"), {}
    for path in tiny_model_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for name, weight in list(weights.items()):
        expected[name] = weight
        if name.endswith("_proj.weight"):
            scale = weight.abs().max() / torch.finfo(torch.float8_e4m3fn).max
            weights[name], weights[f"{name}_scale_inv"] = (weight / scale).to(torch.float8_e4m3fn), scale.reshape(1, 1)
            expected[name] = weights[name].float() * scale
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    how = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": how}))
    model, _ = load_base(str(tmp_path), dtype="float32")
    assert _config(str(tmp_path), None).quantization_config["dequantize"]  # on a GPU too
    found = model.state_dict()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight)


@pytest.mark.parametrize(
    ("method", "package"), [("gptq", "gptqmodel and optimum"), ("awq", "gptqmodel"), ("quanto", "optimum-quanto")]
)
def test_a_missing_package_of_a_quantisation_is_named(tiny_model_dir, tmp_path, method, package):
    for path in tiny_model_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    with pytest.raises(ModelError, match=f"needs the package {package}"):
        load_base(str(tmp_path))
    config = validate(
        {"model": {"name": str(tmp_path)}, "data": {"train": ["rows.json"]}, "output": str(tmp_path / "run")},
        where="test",
    )
    with pytest.raises(ModelError, match=f"needs the package {package}"):
        preflight(config, torch.device("cpu"), resume=False)


def test_names_of_files_are_mapped_into_the_model():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=2))
    name = "transformer.h.0.attn.c_attn.weight"
    assert names_in_model(model, [name, "h.0.attn.c_attn.weight", "nothing"]) == {
        name: name,
        "h.0.attn.c_attn.weight": name,
        "nothing": "nothing",
    }


@pytest.mark.parametrize(
    ("architecture", "loaded_by"),
    [
        ("T5ForConditionalGeneration", "AutoModelForSeq2SeqLM"),
        ("LlamaForCausalLM", "AutoModelForCausalLM"),
        ("LlavaForConditionalGeneration", "AutoModelForImageTextToText"),
        ("BertForMaskedLM", "BertForMaskedLM"),
        ("TheirOwnModel", None),
    ],
)
def test_the_class_that_loads_a_model_is_its_architecture_s(architecture, loaded_by):
    assert loading_class({"architectures": [architecture]}) == loaded_by
