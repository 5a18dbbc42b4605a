"""Adapters of GPT-2's transposed layers and of embeddings, as PEFT saves them: merged, written, applied and folded."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from poc_lora.adapters.adapter import Adapter, read_adapter
from poc_lora.adapters.factors import Factors
from poc_lora.errors import AdapterError
from poc_lora.merging.fold import fold
from poc_lora.merging.folders import merge_folders
from poc_lora.merging.merge import merge

TOKENS = torch.arange(1, 13).view(2, 6)


@pytest.fixture
def base(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2, tie_word_embeddings=False, initializer_range=0.3
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(base):
    return AutoModelForCausalLM.from_pretrained(base).eval()


def members(base, tmp_path, **settings):
    folders = []
    for seed in range(3):
        torch.manual_seed(seed)
        lora = LoraConfig(r=2 + seed, lora_alpha=3, init_lora_weights=False, **settings)
        model = get_peft_model(load(base), lora)
        with torch.no_grad():  # PEFT leaves an embedding's B at zero
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.2)
        model.save_pretrained(tmp_path / f"{seed}", save_embedding_layers=False)
        folders.append(tmp_path / f"{seed}")
    return folders


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def averaged(base, folders):
    """The base with the mean of what PEFT makes of each adapter's weights."""
    model, plain = load(base), load(base).state_dict()
    merged = [PeftModel.from_pretrained(load(base), f).merge_and_unload().state_dict() for f in folders]
    model.load_state_dict({key: sum(m[key] for m in merged) / len(merged) for key in plain})
    return model


KINDS = {
    "transposed": {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
    "embedding": {"target_modules": ["wte"]},
    "both": {"target_modules": ["c_proj", "wte"], "fan_in_fan_out": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_peft_applies_the_average_of_such_adapters_and_so_does_the_folded_base(base, tmp_path, kind):
    folders = members(base, tmp_path, **KINDS[kind])
    merge_folders(folders, tmp_path / "merged")
    expected = logits(averaged(base, folders))
    assert (expected - logits(load(base))).abs().max() > 0.05
    applied = logits(PeftModel.from_pretrained(load(base), tmp_path / "merged"))
    torch.testing.assert_close(applied, expected, rtol=1e-4, atol=1e-4)
    fold(tmp_path / "merged", str(base), tmp_path / "folded")
    torch.testing.assert_close(logits(load(tmp_path / "folded")), expected, rtol=1e-4, atol=1e-4)


def test_what_is_written_reads_as_the_same_kinds(base, tmp_path):
    folders = members(base, tmp_path, **KINDS["both"])
    merge_folders(folders, tmp_path / "merged", rank=3)
    for folder in (folders[0], tmp_path / "merged"):
        adapter = read_adapter(folder)
        assert adapter.embeddings == {"transformer.wte"}
        assert adapter.fan_in_fan_out


def test_tied_embeddings_are_not_folded_into(base, tmp_path):
    folders = members(base, tmp_path, **KINDS["embedding"])
    config = (base / "config.json").read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true')
    (base / "config.json").write_text(config)
    with pytest.raises(AdapterError, match="ties to its output head"):
        fold(folders[0], str(base), tmp_path / "folded")


def test_a_base_with_both_kinds_of_layers_is_folded_right(base, tmp_path):
    """PEFT has one flag for all modules of an adapter, and the last one that it meets sets it."""
    folders = members(base, tmp_path, target_modules=["attn.c_proj", "lm_head"])
    assert not read_adapter(folders[0]).fan_in_fan_out
    fold(folders[0], str(base), tmp_path / "folded")
    expected = PeftModel.from_pretrained(load(base), folders[0]).merge_and_unload()
    torch.testing.assert_close(logits(load(tmp_path / "folded")), logits(expected), rtol=1e-4, atol=1e-4)


def test_adapters_are_merged_whatever_their_flag(base, tmp_path):
    folders = members(base, tmp_path / "a", target_modules=["attn.c_proj", "lm_head"])[:1]
    folders += members(base, tmp_path / "b", target_modules=["attn.c_proj"], fan_in_fan_out=True)[1:2]
    folders += members(base, tmp_path / "c", target_modules=["wte"])[2:]
    merge_folders(folders, tmp_path / "merged")
    expected = logits(averaged(base, folders))
    applied = logits(PeftModel.from_pretrained(load(base), tmp_path / "merged"))
    torch.testing.assert_close(applied, expected, rtol=1e-4, atol=1e-4)
    fold(tmp_path / "merged", str(base), tmp_path / "folded")
    torch.testing.assert_close(logits(load(tmp_path / "folded")), expected, rtol=1e-4, atol=1e-4)


def test_embeddings_tied_by_default_are_not_folded_into(base, tmp_path):
    folders = members(base, tmp_path, **KINDS["embedding"])
    config = json.loads((base / "config.json").read_text())
    del config["tie_word_embeddings"]  # GPT-2's default is to tie
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="ties to its output head"):
        fold(folders[0], str(base), tmp_path / "folded")
    positions = members(base, tmp_path / "wpe", target_modules=["wpe"])
    fold(positions[0], str(base), tmp_path / "folded")


def test_kinds_are_not_mixed():
    factors = Factors(torch.ones(1, 3), torch.ones(2, 1))
    plain, table = Adapter({"wte": factors}), Adapter({"wte": factors}, embeddings=frozenset({"wte"}))
    with pytest.raises(AdapterError, match="is an embedding"):
        merge([plain, table])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("lora_embedding_A", "lora_A.weight"),
        ("lora_embedding_A", "lora_embedding_A.weight"),
        ("lora_embedding_B", "lora_B"),
    ],
)
def test_half_an_embedding_is_refused(base, tmp_path, old, new):
    folder = members(base, tmp_path, **KINDS["embedding"])[0]
    path = folder / "adapter_model.safetensors"
    save_file({key.replace(old, new): tensor for key, tensor in load_file(path).items()}, path)
    with pytest.raises(AdapterError):
        read_adapter(folder)
