"""Tensors that stay in the file until they are asked for, and modules that were saved whole."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from poc_lora.adapters import weights_file
from poc_lora.adapters.adapter import Adapter, open_adapter, read_adapter, write_adapter
from poc_lora.adapters.factors import Factors
from poc_lora.errors import AdapterError
from poc_lora.lora.bank import AdapterBank
from poc_lora.merging.fold import fold
from poc_lora.merging.folders import merge_folders

TOKENS = torch.arange(1, 13).view(2, 6)
WEIGHTS = "adapter_model.safetensors"
WHOLE = {"lm_head.weight", "model.norm.weight"}


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def member(base, folder, seed, shared=1.0, modules_to_save=("lm_head", "model.norm")):
    """An adapter saved by PEFT, its modules saved whole set to a function of `shared`."""
    torch.manual_seed(seed)
    settings = LoraConfig(
        r=2 + seed, target_modules=["q_proj", "up_proj"], init_lora_weights=False, modules_to_save=list(modules_to_save)
    )
    model = get_peft_model(load(base), settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(0.5).add_(shared)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def members(tiny_model_dir, tmp_path):
    return [member(tiny_model_dir, tmp_path / f"{seed}", seed) for seed in range(3)]


def edit(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def test_a_module_is_read_when_it_is_asked_for_and_checked_then(members):
    whole, opened = read_adapter(members[0]), open_adapter(members[0])
    first, second = list(opened.modules)[:2]
    assert list(opened.modules) == list(whole.modules)
    assert {name: opened.shape(name) for name in opened.modules} == {
        name: factors.shape for name, factors in whole.modules.items()
    }
    # As many bytes as before, so the header still holds.
    edit(members[0], lambda tensors: tensors[f"base_model.model.{first}.lora_A.weight"].fill_(torch.nan))
    assert torch.equal(opened.modules[second].B, whole.modules[second].B)
    with pytest.raises(AdapterError, match=f"NaN or infinity in the factors of {first}"):
        opened.modules[first]
    assert opened.shape(first) == whole.shape(first)


def test_a_file_that_changes_while_it_is_read_is_refused(members, tmp_path):
    opened = open_adapter(members[0])
    (members[0] / WEIGHTS).write_bytes((members[1] / WEIGHTS).read_bytes())
    with pytest.raises(AdapterError, match="changed while it was being read"):
        opened.modules[next(iter(opened.modules))]
    (members[0] / WEIGHTS).unlink()
    with pytest.raises(AdapterError, match="No such file"):
        opened.modules_to_save["lm_head.weight"]


def test_what_was_read_is_written_back(members, tmp_path):
    for read in (read_adapter, open_adapter):
        write_adapter(read(members[0]), tmp_path / read.__name__)
        assert load_file(tmp_path / read.__name__ / WEIGHTS).keys() == load_file(members[0] / WEIGHTS).keys()
    one, other = (tmp_path / read.__name__ / WEIGHTS for read in (read_adapter, open_adapter))
    assert one.read_bytes() == other.read_bytes()


def test_modules_to_save_and_the_same_in_all_are_kept(tiny_model_dir, members, tmp_path):
    report = merge_folders(members, tmp_path / "merged")
    assert set(report.modules_to_save) == WHOLE
    stored = load_file(tmp_path / "merged" / WEIGHTS)
    for name in WHOLE:
        key = f"base_model.model.{name}"
        assert torch.equal(stored[key], load_file(members[0] / WEIGHTS)[key])

    models = [PeftModel.from_pretrained(load(tiny_model_dir), folder).merge_and_unload() for folder in members]
    expected = load(tiny_model_dir)
    states = [model.state_dict() for model in models]
    expected.load_state_dict({key: sum(state[key] for state in states) / 3 for key in states[0]})
    applied = PeftModel.from_pretrained(load(tiny_model_dir), tmp_path / "merged")
    torch.testing.assert_close(logits(applied), logits(expected), rtol=1e-4, atol=1e-4)

    fold(tmp_path / "merged", str(tiny_model_dir), tmp_path / "folded")
    torch.testing.assert_close(logits(load(tmp_path / "folded")), logits(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("modules_to_save", [("lm_head", "model.norm"), ("lm_head",), ()])
def test_modules_to_save_that_differ_are_refused(tiny_model_dir, members, tmp_path, modules_to_save):
    other = member(tiny_model_dir, tmp_path / "other", 3, shared=2.0, modules_to_save=modules_to_save)
    for order in ([*members, other], [other, *members]):
        with pytest.raises(AdapterError, match=r"saved whole(, is not the same| in .*, but not here)"):
            merge_folders(order, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_bank_refuses_modules_to_save(tiny_model_dir, members):
    with pytest.raises(AdapterError, match=r"(?s)replaces lm_head.weight .modules_to_save.*fold"):
        AdapterBank.from_adapters(load(tiny_model_dir), [read_adapter(members[0])])


def test_a_tied_table_is_not_folded(tiny_model_dir, members, tmp_path):
    base = tmp_path / "base"
    model = load(tiny_model_dir)
    model.save_pretrained(base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(AdapterError, match="ties to its output head"):
        fold(members[0], str(base), tmp_path / "folded")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("base_model.model.lm_head.weight"), "modules_to_save names 'lm_head'"),
        (lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.ones(2)}), "not a LoRA factor"),
        (lambda t: t.update({"lm_head.weight": torch.ones(2, 2)}), "not a LoRA factor"),
        (lambda t: t.update({"base_model.model.../x.lm_head.weight": torch.ones(2, 2)}), "not a module path"),
        (lambda t: t.update({"base_model.model.lm_head.bias": torch.ones(2, dtype=torch.int8)}), "I8"),
        (lambda t: t.update({"base_model.model.lm_head.bias": torch.ones(1, 1, 1, 1, 1)}), "outside width"),
        (lambda t: t.update({"base_model.model.lm_head.bias": torch.tensor(1.0)}), "outside width"),
    ],
)
def test_tensors_beside_the_factors_are_checked(members, change, words):
    edit(members[0], change)
    with pytest.raises(AdapterError, match=words):
        read_adapter(members[0])


@pytest.mark.parametrize("value", ["lm_head", ["a"] * 1025, [3], {"a": 1}, 1, [["lm_head"]], ["../x"], [""]])
def test_modules_to_save_is_a_short_list_of_names(members, value):
    path = members[0] / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"modules_to_save": value}))
    with pytest.raises(AdapterError):
        read_adapter(members[0])


def test_reading_many_small_modules_parses_the_header_a_bounded_number_of_times(tmp_path, monkeypatch):
    """Parsed once a module, the whole would take a time quadratic in the number of modules."""
    names, opened = [f"layers.{i}.q_proj" for i in range(400)], []
    modules = {name: Factors(torch.randn(1, 4), torch.randn(4, 1), 1.0) for name in names}
    write_adapter(Adapter(modules), tmp_path / "many")
    lazy = open_adapter(tmp_path / "many").modules
    monkeypatch.setattr(weights_file, "safe_open", lambda *args, **named: opened.append(1) or safe_open(*args, **named))
    for name in names:
        assert torch.equal(lazy[name].A, modules[name].A)
    tensors = sum(factors.A.nbytes + factors.B.nbytes for factors in modules.values())
    header = (tmp_path / "many" / WEIGHTS).stat().st_size - tensors
    assert len(opened) <= 1 + tensors // header
