"""Base models as they lie on the Hub: quantised already, and with tensors named otherwise than modules."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

from poc_lora.errors import ModelError
from poc_lora.merging.fold_plan import loading_class
from poc_lora.models.load import load_base
from poc_lora.models.names import names_in_model


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
