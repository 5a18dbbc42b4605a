"""Options of PEFT beyond those in test_adapter.py: an adapter saved with one reads right or is refused."""

from pathlib import Path

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from poc_lora.adapters.adapter import read_adapter
from poc_lora.errors import AdapterError
from poc_lora.merging.folders import merge_folders
from tests.adapters.test_adapter import WEIGHTS, dense, peft_adapter, tiny_llama

TOKENS = torch.arange(1, 13).view(2, 6)
TARGETS = ["q_proj", "v_proj", "up_proj"]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2))


def trained(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with adapter weights moved off their start."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def check_updates(folder: Path, model: nn.Module, adapter: str = "default") -> None:
    """What is read is what PEFT adds to the weights, for every module that it targets."""
    read = read_adapter(folder)
    assert sorted(read.modules) == sorted(model.base_model.targeted_module_names)
    for name, factors in read.modules.items():
        expected = model.base_model.model.get_submodule(name).get_delta_weight(adapter).detach().double()
        transposed = read.fan_in_fan_out or name in read.embeddings
        found = dense(factors).T if transposed else dense(factors)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("targets", "fan_in_fan_out"),
    [(["c_attn", "c_fc"], True), (["wte"], False), (["c_proj", "wte"], True), (["c_attn", "wpe"], True)],
)
def test_transposed_layers_and_embeddings(tmp_path, targets, fan_in_fan_out):
    config = LoraConfig(r=3, lora_alpha=5, target_modules=targets, fan_in_fan_out=fan_in_fan_out)
    model = trained(get_peft_model(tiny_gpt2(), config))
    model.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    check_updates(tmp_path / "a", model)


def test_a_transposed_layer_is_noted_where_the_user_did_not(tmp_path):
    """PEFT finds out that GPT-2's layers are transposed, and saves that."""
    model = trained(get_peft_model(tiny_gpt2(), LoraConfig(r=3, target_modules=["c_attn"], fan_in_fan_out=False)))
    model.save_pretrained(tmp_path / "a")
    check_updates(tmp_path / "a", model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision(tmp_path, dtype):
    config = LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, use_rslora=True, rank_pattern={"v_proj": 2})
    model = trained(get_peft_model(tiny_llama().to(dtype), config, autocast_adapter_dtype=False))
    model.save_pretrained(tmp_path / "a")
    assert {tensor.dtype for tensor in load_file(tmp_path / "a" / WEIGHTS).values()} == {dtype}
    read = read_adapter(tmp_path / "a")
    assert {factors.A.dtype for factors in read.modules.values()} == {dtype}
    check_updates(tmp_path / "a", model.double())


def test_adapters_saved_in_subfolders(tmp_path):
    first = LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS)
    second = LoraConfig(r=2, lora_alpha=9, target_modules=TARGETS, use_rslora=True)
    model = get_peft_model(tiny_llama(), first)
    model.add_adapter("other", second)
    trained(model).save_pretrained(tmp_path / "both")
    check_updates(tmp_path / "both", model)
    check_updates(tmp_path / "both" / "other", model, "other")
    assert len(merge_folders([tmp_path / "both", tmp_path / "both/other"], tmp_path / "merged").sources) == 2
    assert len(merge_folders([tmp_path / "both"], tmp_path / "alone").sources) == 1


@pytest.mark.parametrize("targets", [["lm_head", "q_proj"], ["embed_tokens", "q_proj"], ["embed_tokens", "lm_head"]])
def test_a_table_with_factors_is_read_with_its_base_weights_and_without_them(tmp_path, targets):
    """PEFT saves the whole table beside the factors, unless it is told not to."""
    model = trained(get_peft_model(tiny_llama(), LoraConfig(r=3, target_modules=targets)))
    model.save_pretrained(tmp_path / "plain", save_embedding_layers=False)
    check_updates(tmp_path / "plain", model)
    model.save_pretrained(tmp_path / "whole")
    check_updates(tmp_path / "whole", model)
    assert not read_adapter(tmp_path / "plain").modules_to_save
    saved = read_adapter(tmp_path / "whole").modules_to_save
    tables = {f"{name}.weight" for name in model.base_model.targeted_module_names if "q_proj" not in name}
    assert saved.keys() == tables
    assert all(torch.equal(saved[name], tiny_llama().state_dict()[name]) for name in tables)


def test_a_table_with_factors_is_known_whatever_its_name(tmp_path):
    model = trained(get_peft_model(tiny_gpt2(), LoraConfig(r=3, target_modules=["wte"])))
    model.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    path = tmp_path / "a" / WEIGHTS
    stored = load_file(path)
    assert "base_model.model.transformer.wte.base_layer.weight" in stored
    save_file({key.replace("wte", "tokens"): tensor for key, tensor in stored.items()}, path)
    assert set(read_adapter(tmp_path / "a").modules_to_save) == {"lm_head.weight", "transformer.tokens.weight"}


def test_base_weights_without_factors_are_refused(tmp_path):
    model = trained(get_peft_model(tiny_llama(), LoraConfig(r=3, target_modules=["q_proj"])))
    model.save_pretrained(tmp_path / "a")
    stored = load_file(tmp_path / "a" / WEIGHTS)
    for module in ("lm_head", "model.layers.0.self_attn.q_proj"):
        key = f"base_model.model.{module}.base_layer.weight"
        save_file(stored | {key: torch.ones(32, 32)}, tmp_path / "a" / WEIGHTS)
        with pytest.raises(AdapterError, match="base_layer"):
            read_adapter(tmp_path / "a")


# Starts that change the base


def started(init: str, **options: object) -> nn.Module:
    """A model whose LoRA weights PEFT made of its base weights."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options}
    base = tiny_llama()
    torch.manual_seed(5)
    if init == "lora_ga":
        config = LoraConfig(init_lora_weights=init, lora_ga_config=LoraGAConfig(), **options)
        preprocess_loraga(base, config, lambda: base(input_ids=TOKENS, labels=TOKENS).loss.backward())
        base.zero_grad()
    else:
        config = LoraConfig(init_lora_weights=init, **options)
    return get_peft_model(base, config)


@pytest.mark.parametrize(
    ("init", "options"),
    [
        ("pissa", {"rank_pattern": {"v_proj": 2, "layers.1.mlp.up_proj": 6}}),
        ("pissa", {"alpha_pattern": {"q_proj": 3}}),
        ("pissa", {"use_rslora": True}),
        ("pissa_niter_4", {}),
        ("olora", {}),
        ("olora", {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 3}}),
        ("lora_ga", {}),
    ],
)
def test_a_start_in_the_base_is_refused_until_it_is_converted(tmp_path, init, options):
    model = started(init, **options)
    model.peft_config["default"].init_lora_weights = True  # as PEFT's documentation says, so that it loads as saved
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = init
    trained(model).save_pretrained(tmp_path / "raw")
    with pytest.raises(AdapterError, match="path_initial_model_for_weight_conversion"):
        read_adapter(tmp_path / "raw")
    change = {}
    for name in model.base_model.targeted_module_names:
        layer = model.base_model.model.get_submodule(name)
        whole = layer.base_layer.weight + layer.get_delta_weight("default")
        change[name] = (whole - tiny_llama().get_submodule(name).weight).detach().double()
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    plain = read_adapter(tmp_path / "plain").modules
    assert plain.keys() == change.keys()
    for name, factors in plain.items():
        torch.testing.assert_close(dense(factors), change[name], rtol=1e-4, atol=1e-5)


def test_eva_which_deals_out_ranks_by_the_data(tmp_path):
    config = LoraConfig(
        r=4, lora_alpha=5, target_modules=TARGETS, init_lora_weights="eva", eva_config=EvaConfig(rho=2.0)
    )
    model = get_peft_model(tiny_llama(), config, low_cpu_mem_usage=True)
    torch.manual_seed(1)
    batches = [{"input_ids": torch.randint(0, 32, (4, 16))} for _ in range(8)]
    initialize_lora_eva_weights(model, batches, show_progress_bar=False)
    trained(model).save_pretrained(tmp_path / "a")
    ranks = {factors.rank for factors in read_adapter(tmp_path / "a").modules.values()}
    assert len(ranks) > 1
    check_updates(tmp_path / "a", model)


# What is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bias": "all"}, "bias is 'all'"),
        ({"target_modules": [], "target_parameters": ["q_proj.weight"]}, "target_parameters is set"),
    ],
)
def test_further_options_are_refused_by_name(tmp_path, options, words):
    peft_adapter(tmp_path / "a", **options)
    with pytest.raises(AdapterError, match=words):
        read_adapter(tmp_path / "a")


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)


def test_convolutions_are_refused(tmp_path):
    get_peft_model(Pictures(), LoraConfig(r=2, target_modules=["conv", "head"])).save_pretrained(tmp_path / "a")
    with pytest.raises(AdapterError, match=r"conv has factors A \[2, 3, 3, 3\]"):
        read_adapter(tmp_path / "a")


def test_modules_trained_whole_are_named_by_how_their_paths_end(tmp_path):
    """norm is every layer norm for PEFT, as in LongLoRA's ["embed_tokens", "norm"]."""
    model = get_peft_model(tiny_llama(), LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["norm"]))
    trained(model).save_pretrained(tmp_path / "a")
    saved = read_adapter(tmp_path / "a").modules_to_save
    assert len(saved) == 2 * len(tiny_llama().model.layers) + 1
    merge_folders([tmp_path / "a"], tmp_path / "merged")
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "merged").eval()(input_ids=TOKENS).logits
    torch.testing.assert_close(again, model.eval()(input_ids=TOKENS).logits)


def test_an_adapter_of_a_model_with_an_adapter_is_refused(tmp_path):
    inner = get_peft_model(tiny_llama(), LoraConfig(r=3, target_modules=["q_proj"]))
    get_peft_model(inner, LoraConfig(r=3, target_modules=["v_proj"]), "second").save_pretrained(tmp_path / "a")
    folder = tmp_path / "a" / "second"
    with pytest.raises(AdapterError, match="a base that has an adapter already"):
        read_adapter(folder if folder.exists() else tmp_path / "a")
