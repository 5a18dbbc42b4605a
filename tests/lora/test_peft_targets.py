"""PEFT attaches what was trained or merged, or it is refused: models with routed experts, state-space models."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraModel
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from poc_lora.adapters.adapter import Adapter, read_adapter, write_adapter
from poc_lora.adapters.factors import Factors
from poc_lora.errors import AdapterError, ModelError
from poc_lora.lora.bank import AdapterBank, matching_linears, resolve_targets
from poc_lora.lora.peft_targets import require_attached
from poc_lora.merging.folders import merge_folders
from tests.conftest import build_llama

SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
)
LINEAR = dict(
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_num_key_heads=2,
    linear_num_value_heads=2,
    layer_types=["linear_attention", "full_attention"],
)
NEOX = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
MODELS = {
    "qwen3_next": lambda: Qwen3NextForCausalLM(Qwen3NextConfig(**SIZES, **LINEAR)),
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, mlp_only_layers=[0])),
    "all_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES)),
    "llama": lambda: build_llama(64),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**NEOX)),
    "mamba": lambda: MambaForCausalLM(
        MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4, time_step_rank=4)
    ),
}
MLP = ["gate_proj", "up_proj", "down_proj"]
ATTENTION = ["q_proj", "v_proj"]


def tiny(kind):
    torch.manual_seed(0)
    return MODELS[kind]().eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("kind", "targets", "attached"),
    [
        ("qwen3_next", MLP, False),
        ("qwen3_next", ["q_proj", "up_proj", "down_proj"], False),
        ("qwen3_next", ATTENTION, True),
        ("qwen3_next", "all-linear", False),
        ("llama", "all-linear", True),
        ("neox", "all-linear", True),
        ("qwen2_moe", "all-linear", True),
        ("all_moe", "all-linear", True),
        ("qwen2_moe", [*ATTENTION, *MLP], True),
        ("qwen3_moe", ["down_proj"], False),
        ("qwen3_moe", ATTENTION, True),
        ("mamba", ["out_proj"], False),
        ("mamba", ["in_proj", "x_proj"], True),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_targets_pass_exactly_where_peft_loads_what_was_trained(tmp_path, kind, targets, attached):
    with torch.device("meta"):
        shapes = MODELS[kind]()
    if not attached:
        with pytest.raises(ModelError, match=r"PEFT (cannot|would not) attach"):
            require_attached(shapes, list(matching_linears(shapes, targets)), resolve_targets(shapes, targets))
    else:
        require_attached(shapes, list(matching_linears(shapes, targets)), resolve_targets(shapes, targets))

    model, tokens = tiny(kind), torch.arange(1, 13).view(2, 6)
    bank = AdapterBank(model, targets=targets, rank=2, alpha=4, adapters=[0])
    with torch.no_grad():
        bank.weights.normal_(0, 0.3)
        ours = model(tokens).logits
    write_adapter(bank.adapter(0), tmp_path / "a")
    try:
        with torch.no_grad():
            theirs = PeftModel.from_pretrained(tiny(kind), tmp_path / "a")(tokens).logits
    except ValueError:
        assert not attached
    else:
        assert torch.allclose(ours, theirs, atol=1e-4) == attached


@pytest.mark.parametrize("kind", ["llama", "neox", "qwen2_moe"])
@pytest.mark.filterwarnings("ignore")
def test_all_linear_is_what_it_is_in_peft(kind):
    model = MODELS[kind]()
    ours = matching_linears(model, "all-linear").keys()
    short = matching_linears(model, resolve_targets(model, "all-linear")).keys()
    theirs = LoraModel(model, LoraConfig(r=1, target_modules="all-linear"), "default").targeted_module_names
    assert set(ours) == set(short) == set(theirs)


def test_all_linear_is_named_by_paths_where_another_module_has_the_name():
    model = nn.ModuleDict({"a": nn.ModuleDict({"x": nn.Linear(2, 2), "y": nn.Linear(2, 2)}), "x": nn.LayerNorm(2)})
    assert resolve_targets(model, "all-linear") == ("a.x", "y")
    assert list(matching_linears(model, ["a.x", "y"])) == ["a.x", "a.y"]


def test_a_base_without_linear_layers_is_refused():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2))  # transposed layers, and a head
    with pytest.raises(ModelError, match="no linear layer that can be adapted"):
        resolve_targets(model, "all-linear")


def test_a_layer_whose_weight_the_model_multiplies_by_itself_is_refused():
    model = tiny("mamba")
    bank = AdapterBank(model, targets=["dt_proj"], rank=2, alpha=4, adapters=[0])
    with pytest.raises(ModelError, match=r"'backbone.layers.0.mixer.dt_proj' without calling"):
        model(torch.arange(6).view(1, 6))
    with bank.disabled():
        model(torch.arange(6).view(1, 6))


def adapter_of(model, paths, base, targets):
    def factors(path):
        linear = model.get_submodule(path)
        return Factors(torch.randn(2, linear.in_features), torch.randn(linear.out_features, 2))

    return Adapter({p: factors(p) for p in paths}, base_model=str(base), targets=frozenset(targets))


def test_a_merge_that_peft_would_attach_elsewhere_is_refused(tmp_path):
    model = tiny("qwen3_next")
    model.config.save_pretrained(tmp_path / "base")
    for i in range(2):
        write_adapter(adapter_of(model, matching_linears(model, MLP), tmp_path / "base", MLP), tmp_path / f"{i}")
    with pytest.raises(AdapterError, match="PEFT would not attach"):
        merge_folders([tmp_path / "0", tmp_path / "1"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_merge_names_its_modules_in_full_where_peft_needs_it(tmp_path):
    model = tiny("qwen2_moe")
    model.config.save_pretrained(tmp_path / "base")
    paths = [path for path in matching_linears(model, ["q_proj"]) if ".0." in path]
    for i in range(2):  # layer 1 was left out, which the names do not say
        write_adapter(adapter_of(model, paths, tmp_path / "base", ["q_proj"]), tmp_path / f"{i}")
    merge_folders([tmp_path / "0", tmp_path / "1"], tmp_path / "merged")
    assert sorted(read_adapter(tmp_path / "merged").targets) == sorted(paths)


def test_asking_peft_prints_nothing():
    code = """
from poc_lora.lora.peft_targets import why_not_attached
from tests.conftest import build_llama
paths = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
assert why_not_attached(build_llama(50), paths, ["q_proj"]) is None
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_merge_of_modules_that_its_base_does_not_have_is_refused(tmp_path):
    model = build_llama(50)
    model.config.save_pretrained(tmp_path / "base")
    paths = list(matching_linears(model, ["q_proj"]))
    for name, old in (("inner", "model."), ("other", "model")):
        for i in range(2):
            own = adapter_of(model, paths, "", ["q_proj"]).modules
            renamed = {path.replace(old, "decoder" if name == "other" else ""): own[path] for path in paths}
            write_adapter(Adapter(renamed, base_model=str(tmp_path / "base")), tmp_path / f"{name}{i}")
    merge_folders([tmp_path / "inner0", tmp_path / "inner1"], tmp_path / "merged")  # of the model without its head
    with pytest.raises(AdapterError, match=r"has no module decoder\.layers\.0"):
        merge_folders([tmp_path / "other0", tmp_path / "other1"], tmp_path / "again")
