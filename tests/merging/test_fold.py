"""An adapter in its base's weights: the model that PEFT makes of the two, in the base's own files."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from poc_lora.adapters.adapter import read_adapter
from poc_lora.adapters.factors import Factors
from poc_lora.errors import AdapterError, ModelError, PocLoraError, RequestError
from poc_lora.merging.fold import fold, updated
from tests.conftest import build_llama

TOKENS = torch.arange(1, 13).view(2, 6)


@pytest.fixture
def base(tiny_model_dir, tmp_path):
    """The tiny model in several files."""
    folder = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_model_dir).save_pretrained(folder, max_shard_size="20KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model_dir / name, folder)
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def adapter(base, tmp_path):
    torch.manual_seed(0)
    settings = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["q_proj", "down_proj"],
        init_lora_weights=False,
        rank_pattern={"down_proj": 2},
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_the_folded_model_is_peft_s_and_the_base_is_left_alone(base, adapter, tmp_path):
    before = bytes_of(base)
    done = fold(adapter, str(base), tmp_path / "folded")
    assert (done.modules, done.files) == (4, len(list(base.glob("*.safetensors"))))
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "folded")
    torch.testing.assert_close(logits(folded), logits(expected), rtol=1e-5, atol=1e-5)
    assert (logits(folded) - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 0.1
    assert bytes_of(base) == before


def test_files_tensors_and_dtypes_stay_where_they_were(base, adapter, tmp_path):
    fold(adapter, str(base), tmp_path / "folded")
    assert {p.name for p in (tmp_path / "folded").iterdir()} == {p.name for p in base.iterdir()} - {"modeling_evil.py"}
    touched = {f"{module}.weight" for module in read_adapter(adapter).modules}
    for path in base.glob("*.safetensors"):
        with safe_open(path, "pt") as one, safe_open(tmp_path / "folded" / path.name, "pt") as other:
            assert one.metadata() == other.metadata()
            assert list(one.keys()) == list(other.keys())
        a, b = load_file(path), load_file(tmp_path / "folded" / path.name)
        for key in a:
            assert a[key].dtype == b[key].dtype
            assert torch.equal(a[key], b[key]) == (key not in touched)
    for name in ("config.json", "tokenizer.json", "model.safetensors.index.json"):
        assert (tmp_path / "folded" / name).read_bytes() == (base / name).read_bytes()


def test_a_bfloat16_base_is_added_to_in_float32_and_rounded_once():
    stream = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 30, generator=stream).bfloat16()
    factors = Factors(torch.randn(4, 30, generator=stream), torch.randn(40, 4, generator=stream) * 1e-2, 0.5)
    exact = weight.double() + 0.5 * factors.B.double() @ factors.A.double()
    found = updated(weight, factors)
    assert found.dtype == torch.bfloat16
    # Rounded once: at most half a unit in the last place from the exact sum; 2^7 units lie between powers of two.
    unit = torch.exp2(torch.floor(torch.log2(exact.abs()))) * 2**-7
    assert ((found.double() - exact).abs() <= 0.5001 * unit + 1e-6).all()


def test_a_base_in_one_file_is_folded_too(tiny_model_dir, adapter, tmp_path):
    fold(adapter, str(tiny_model_dir), tmp_path / "folded")
    assert (tmp_path / "folded/model.safetensors").exists()


def test_a_quantised_base_is_refused_with_advice(base, adapter, tmp_path):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(ModelError, match="quantised") as problem:
        fold(adapter, str(base), tmp_path / "folded")
    assert "unquantised" in problem.value.fix
    assert not (tmp_path / "folded").exists()


def test_integer_weights_are_refused_and_nothing_is_written(base, adapter, tmp_path):
    (path,) = [p for p in base.glob("*.safetensors") if "model.layers.0.self_attn.q_proj.weight" in load_file(p)]
    tensors = load_file(path)
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(32, 32, dtype=torch.int8)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="int8"):
        fold(adapter, str(base), tmp_path / "folded")
    assert not (tmp_path / "folded").exists()


def test_another_base_is_refused(adapter, tmp_path):
    other = build_llama(50)
    other.config.hidden_size = 32
    small = build_llama(50)
    del small.model.layers[1]
    small.config.num_hidden_layers = 1
    small.save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterError, match="no such weight"):
        fold(adapter, str(tmp_path / "other"), tmp_path / "folded")


@pytest.mark.parametrize("damage", ["pickle", "truncated", "escape", "index"])
def test_a_base_that_cannot_be_read_safely_is_refused(base, adapter, tmp_path, damage):
    first = next(base.glob("*.safetensors"))
    index = json.loads((base / "model.safetensors.index.json").read_text())
    if damage == "pickle":
        for path in base.glob("*.safetensors*"):
            path.unlink()
        (base / "pytorch_model.bin").write_bytes(b"pickle")
    elif damage == "truncated":
        first.write_bytes(first.read_bytes()[:-10])
    elif damage == "escape":
        index["weight_map"]["lm_head.weight"] = "../../etc/model.safetensors"
    else:
        index = {"weights": []}
    if damage in ("escape", "index"):
        (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError):
        fold(adapter, str(base), tmp_path / "folded")
    assert not (tmp_path / "folded").exists()


def test_an_existing_output_is_never_touched(base, adapter, tmp_path):
    with pytest.raises(RequestError, match="exists already"):
        fold(adapter, str(base), base)
    with pytest.raises(ModelError, match="no base model"):
        fold(adapter, str(tmp_path / "nowhere"), tmp_path / "folded")


def test_a_full_disk_is_an_error_that_leaves_nothing(base, adapter, tmp_path, monkeypatch):
    def full(*words, **named):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("poc_lora.merging.fold.save_file", full)
    before = set(tmp_path.iterdir())
    with pytest.raises(PocLoraError, match="cannot be written: No space left"):
        fold(adapter, str(base), tmp_path / "folded")
    assert set(tmp_path.iterdir()) == before


def test_what_a_link_leads_to_outside_is_not_copied(base, adapter, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (base / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match="link that leads out"):
        fold(adapter, str(base), tmp_path / "folded")
    assert not (tmp_path / "folded").exists()
