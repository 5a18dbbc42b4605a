"""Adapters as people have them: configurations of PEFT since 0.4, tensors of unusual names and dtypes, other families.

Merged, each is the mean of what PEFT makes of its sources, or it is refused by name.
"""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from poc_lora.errors import AdapterError
from poc_lora.merging.fold import fold
from poc_lora.merging.folders import merge_folders

SIZES = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2)
FAMILIES = {
    "llama": dict(intermediate_size=48, num_key_value_heads=2, tie_word_embeddings=False),
    "gpt2": dict(n_positions=16),
    "phi3": dict(intermediate_size=48, pad_token_id=0),
    "gpt_neox": dict(intermediate_size=64),
    "bloom": dict(n_layer=2, n_head=4),
    "gemma2": dict(intermediate_size=48, num_key_value_heads=2, head_dim=8),
    "qwen2_moe": dict(
        intermediate_size=48, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16
    ),
}
PEFT_0_4 = {
    "auto_mapping": None, "base_model_name_or_path": "org/base", "bias": "none", "fan_in_fan_out": False,
    "inference_mode": True, "init_lora_weights": True, "layers_pattern": None, "layers_to_transform": None,
    "lora_alpha": 6, "lora_dropout": 0.05, "modules_to_save": None, "peft_type": "LORA", "r": 4, "revision": None,
    "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM",
}  # fmt: skip
UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:q_proj|v_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\.(?:(?:q_proj|v_proj)))"
)
PREFIX = "base_model.model."
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    for family, sizes in FAMILIES.items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, **sizes)).save_pretrained(
            folder / family
        )
    return folder


def load(base, kind=AutoModelForCausalLM, **options):
    torch.manual_seed(7)  # of a head that the base does not have
    return kind.from_pretrained(base, **options)


def peft_adapter(base, folder, seed, *, config=None, fields=None, tensors=None, load=load, **options):
    """An adapter as PEFT saves it; then its configuration and its tensors are changed to those of another version."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **options}
    model = get_peft_model(load(base), LoraConfig(**options))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps((config or json.loads(path.read_text())) | (fields or {})))
    if tensors:
        path = folder / "adapter_model.safetensors"
        save_file(tensors(load_file(path)), path, metadata={"format": "pt"})


def in_peft(base, folder, load=load):
    return PeftModel.from_pretrained(load(base), folder).merge_and_unload().state_dict()


def check_merge(base, tmp_path, *sources, folds=True, load=load, **options):
    folders = [tmp_path / f"{seed}" for seed in range(2)]
    for seed, (folder, source) in enumerate(zip(folders, sources * (2 // len(sources)), strict=True)):
        peft_adapter(base, folder, seed, load=load, **source)
    parts = [in_peft(base, folder, load) for folder in folders]
    mean = {name: sum(part[name].double() for part in parts) / 2 for name in parts[0]}
    plain = load(base).state_dict()
    assert any((mean[name] - tensor).abs().max() > 0.05 for name, tensor in plain.items())
    merge_folders(folders, tmp_path / "merged", **options)
    results = [in_peft(base, tmp_path / "merged", load)]
    if folds:
        fold(tmp_path / "merged", str(base), tmp_path / "folded")
        results.append(load(tmp_path / "folded").state_dict())
    for found in results:
        assert found.keys() == mean.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor.double(), mean[name], rtol=1e-5, atol=1e-6)


READ = {
    "PEFT 0.4": dict(config=PEFT_0_4),
    "keys of PEFT 0.3": dict(config=PEFT_0_4 | {"enable_lora": None, "merge_weights": False}),
    "rank and alpha patterns": dict(
        rank_pattern={"q_proj": 2, "layers.1.self_attn.v_proj": 8},
        alpha_pattern={"v_proj": 3, "layers.1.self_attn.q_proj": 9},
    ),
    "patterns that are expressions": dict(rank_pattern={r"^model.layers.0.self_attn.(q|v)_proj": 2}, use_rslora=True),
    "layers_to_transform": dict(layers_to_transform=[1], layers_pattern=["layers"]),
    "exclude_modules": dict(target_modules="all-linear", exclude_modules=r".*\.(up|down)_proj"),
    "Unsloth's expression": dict(target_modules=UNSLOTH, fields={"task_type": None, "lora_dropout": 0}),
    "no modules_to_save": dict(fields={"modules_to_save": []}),
    "an orthogonal start": dict(init_lora_weights="orthogonal"),
    "fields of other starts": dict(
        fields={"eva_config": {"rho": 2.0}, "corda_config": None, "loftq_config": {}, "init_lora_weights": "eva"}
    ),
    "Megatron's and run-time fields": dict(
        fields={
            "megatron_config": None,
            "megatron_core": "megatron.core",
            "runtime_config": {"ephemeral_gpu_offload": False},
        }
    ),
    "no targets, no task": dict(fields={"target_modules": None, "task_type": None}),
    "default alpha": dict(config={k: v for k, v in PEFT_0_4.items() if k != "lora_alpha"}),
    "a negative alpha": dict(fields={"lora_alpha": -6.0}),
    "bfloat16 and float32": dict(tensors=lambda t: {k: v.bfloat16() if "lora_A" in k else v for k, v in t.items()}),
    "float16": dict(tensors=lambda t: {k: v.half() for k, v in t.items()}),
}


@pytest.mark.parametrize("kind", READ)
def test_what_is_read_is_merged_to_the_mean_of_what_peft_makes_of_it(bases, tmp_path, kind):
    check_merge(bases / "llama", tmp_path, READ[kind])


PAIRS = {
    "ranks and scales": (dict(r=2), dict(r=8, use_rslora=True)),
    "targets": (dict(target_modules=["q_proj"]), dict(target_modules=["k_proj", "v_proj"])),
    "an expression and names": (dict(target_modules=r".*\.(q|v)_proj"), dict()),
    "layers": (dict(layers_to_transform=[0]), dict(layers_to_transform=[1])),
    "what is excluded": (dict(exclude_modules=["layers.0.self_attn.q_proj"]), dict()),
    "paths": (
        dict(target_modules=["model.layers.0.self_attn.q_proj"]),
        dict(target_modules=["layers.1.self_attn.q_proj"]),
    ),
    "an embedding": (dict(target_modules=["embed_tokens"]), dict()),
    "dtypes": (dict(tensors=lambda t: {k: v.bfloat16() for k, v in t.items()}), dict()),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_sources_may_differ_in(bases, tmp_path, kind):
    check_merge(bases / "llama", tmp_path, *PAIRS[kind])


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("gpt2", ["c_attn"]),
        ("phi3", ["qkv_proj", "gate_up_proj"]),
        ("gpt_neox", ["query_key_value", "dense"]),
        ("bloom", ["query_key_value"]),
        ("gemma2", "all-linear"),
        ("qwen2_moe", ["q_proj"]),
    ],
)
def test_families(bases, tmp_path, family, targets):
    check_merge(bases / family, tmp_path, dict(target_modules=targets))


@pytest.mark.parametrize("whole", [["norm"], ["lm_head"], ["embed_tokens", "lm_head"]], ids="-".join)
def test_modules_trained_whole_are_averaged(bases, tmp_path, whole):
    check_merge(bases / "llama", tmp_path, dict(modules_to_save=whole), modules_to_save="mean")


def test_classifiers_are_averaged_and_not_folded_into_a_base_without_a_head(bases, tmp_path):
    def classifier(base):
        return load(base, AutoModelForSequenceClassification, num_labels=3)

    source = dict(task_type="SEQ_CLS", modules_to_save=["classifier", "score"])
    check_merge(bases / "llama", tmp_path, source, load=classifier, modules_to_save="mean", folds=False)
    with pytest.raises(AdapterError, match=r"changes score\.weight") as problem:
        fold(tmp_path / "merged", str(bases / "llama"), tmp_path / "folded")
    assert "merge_and_unload" in problem.value.fix


REFUSED = {
    "enable_lora": dict(config=PEFT_0_4 | {"enable_lora": [True, False, True]}),
    "merge_weights": dict(config=PEFT_0_4 | {"merge_weights": True}),
    "bias is 'lora_only'": dict(bias="lora_only"),
    "use_dora": dict(use_dora=True),
    "lora_magnitude_vector": dict(use_dora=True, fields={"use_dora": False}),
    "lora_bias": dict(lora_bias=True),
    r"lora_B\.bias": dict(lora_bias=True, fields={"lora_bias": False}),
    "trainable_token_indices": dict(trainable_token_indices={"embed_tokens": [1, 2]}),
    "layer_replication": dict(layer_replication=[[0, 2], [1, 2]]),
    "target_parameters": dict(target_modules=[], target_parameters=["q_proj.weight"]),
    "megatron_config": dict(fields={"megatron_config": {"tensor_model_parallel_size": 2}}),
    "use_qalora": dict(fields={"use_qalora": True}),
    "peft_type is 'ADALORA'": dict(fields={"peft_type": "ADALORA"}),
    "peft_type is 'lora'": dict(fields={"peft_type": "lora"}),
    "task_type is 'CAUSAL'": dict(fields={"task_type": "CAUSAL"}),
    "rank 4, but the configuration says 8": dict(fields={"r": 8}),
    "is F64": dict(tensors=lambda t: {k: v.double() for k, v in t.items()}),
    "is F8_E4M3": dict(tensors=lambda t: {k: v.to(torch.float8_e4m3fn) for k, v in t.items()}),
    r"'model\.layers": dict(tensors=lambda t: {k.removeprefix(PREFIX): v for k, v in t.items()}),
    "an adapter already": dict(tensors=lambda t: {PREFIX + k: v for k, v in t.items()}),
    "default": dict(tensors=lambda t: {k.replace(".weight", ".default.weight"): v for k, v in t.items()}),
    "alpha": dict(tensors=lambda t: t | {f"{PREFIX}model.layers.0.self_attn.q_proj.alpha": torch.ones(1)}),
}
REFUSED |= {
    f"init_lora_weights is '{start}'": dict(fields={"init_lora_weights": start})
    for start in ("pissa", "pissa_niter_16", "olora", "loftq", "corda", "lora_ga", "mica", "another")
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_not_plain_lora_is_refused_by_name(bases, tmp_path, words):
    peft_adapter(bases / "llama", tmp_path / "a", 0, **REFUSED[words])
    with pytest.raises(AdapterError, match=words) as problem:
        merge_folders([tmp_path / "a"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert problem.value.fix
