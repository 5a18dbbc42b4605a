"""Folding into bases as they lie on the Hub, whose files name tensors otherwise than modules, or tie their head."""

import json
import shutil

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from poc_lora.adapters.adapter import open_adapter
from poc_lora.artifacts.merge_report import MergeReport
from poc_lora.errors import AdapterError
from poc_lora.evaluation.whole_weights import in_weights, named_as_in
from poc_lora.hub.collect import collect
from poc_lora.merging.fold import fold
from poc_lora.merging.folders import merge_folders
from poc_lora.reporting.summaries import merge_summary

TOKENS = torch.arange(1, 13).view(2, 6)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def gpt2(folder):
    GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2)).save_pretrained(folder)


def gpt2_without_prefix(folder):
    gpt2(folder)
    stored = load_file(folder / "model.safetensors")
    renamed = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})


def qwen3_5(folder):
    config = AutoConfig.for_model("qwen3_5")
    sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    more = dict(num_key_value_heads=2, head_dim=16, layer_types=["full_attention"] * 2, linear_num_key_heads=2)
    for name, value in (sizes | more | dict(linear_num_value_heads=2)).items():
        setattr(config.text_config, name, value)
    vision = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=32)
    for name, value in vision.items():
        setattr(config.vision_config, name, value)
    transformers.Qwen3_5ForConditionalGeneration(config).save_pretrained(folder)


@pytest.mark.parametrize(
    ("make", "targets"),
    [(gpt2, ["c_attn"]), (gpt2_without_prefix, ["c_attn", "c_proj"]), (qwen3_5, ["q_proj", "down_proj"])],
)
def test_an_adapter_is_folded_and_evaluated_whatever_its_base_s_files_call_its_modules(tmp_path, make, targets):
    torch.manual_seed(0)
    make(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    settings = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    get_peft_model(base, settings).save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    expected = logits(PeftModel.from_pretrained(base, tmp_path / "adapter"))
    fold(tmp_path / "adapter", str(tmp_path / "base"), tmp_path / "folded")
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "folded")
    torch.testing.assert_close(logits(folded), expected, rtol=1e-5, atol=1e-5)

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before = logits(plain)
    assert (before - expected).abs().max() > 1e-3
    with in_weights(plain, [named_as_in(plain, open_adapter(tmp_path / "adapter"))]):
        torch.testing.assert_close(logits(plain), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(plain), before)
    names = [load_file(tmp_path / folder / "model.safetensors").keys() for folder in ("folded", "base")]
    assert names[0] == names[1]


def tied(folder):
    sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)).save_pretrained(folder, max_shard_size="20KB")


@pytest.mark.parametrize(
    "options",
    [
        dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
        dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
        dict(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
        dict(target_modules=["q_proj", "embed_tokens"]),
        dict(target_modules=["q_proj", "lm_head"]),
    ],
)
def test_a_tied_head_is_untied_on_request(tmp_path, options):
    torch.manual_seed(0)
    tied(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=2, init_lora_weights=False, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    expected = logits(PeftModel.from_pretrained(base, tmp_path / "adapter"))
    with pytest.raises(AdapterError, match="ties to its output head") as problem:
        fold(tmp_path / "adapter", str(tmp_path / "base"), tmp_path / "folded")
    assert "--untie-head" in problem.value.fix
    fold(tmp_path / "adapter", str(tmp_path / "base"), tmp_path / "folded", untie_head=True)
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "folded")
    torch.testing.assert_close(logits(folded), expected, rtol=1e-5, atol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with in_weights(plain, [open_adapter(tmp_path / "adapter")]):
        torch.testing.assert_close(logits(plain), expected, rtol=1e-5, atol=1e-5)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight


def test_tables_that_peft_resized_and_saved_are_folded(tmp_path):
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(53)
    settings = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    model = get_peft_model(base, settings)
    model.save_pretrained(tmp_path / "adapter")
    assert "base_model.model.model.embed_tokens.weight" in load_file(tmp_path / "adapter/adapter_model.safetensors")
    fold(tmp_path / "adapter", str(tmp_path / "base"), tmp_path / "folded")
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "folded")
    torch.testing.assert_close(logits(folded), logits(model), rtol=1e-5, atol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with in_weights(plain, [open_adapter(tmp_path / "adapter")]):
        torch.testing.assert_close(logits(plain), logits(model), rtol=1e-5, atol=1e-5)


def test_code_is_named_and_the_adapter_s_tokenizer_is_carried(tmp_path):
    torch.manual_seed(0)
    tied(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    weights = load_file(tmp_path / "b/adapter_model.safetensors")
    save_file({k: v + 1 for k, v in weights.items()}, tmp_path / "b/adapter_model.safetensors")
    (tmp_path / "base/modeling_own.py").write_text("")
    (tmp_path / "base/chat_template.jinja").write_text("base's")
    for name in "ab":
        (tmp_path / name / "chat_template.jinja").write_text("own")
    merge_folders([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    done = fold(tmp_path / "merged", str(tmp_path / "base"), tmp_path / "folded")
    assert (tmp_path / "folded/chat_template.jinja").read_text() == "own"
    assert (done.left_out, done.loaded_by) == (["modeling_own.py"], "AutoModelForCausalLM")
    (tmp_path / "b/tokenizer.json").write_text("{}")
    (tmp_path / "a/tokenizer.json").write_text("[]")
    with pytest.raises(AdapterError, match="different tokenizers"):
        merge_folders([tmp_path / "a", tmp_path / "b"], tmp_path / "again")


def test_a_snapshot_of_the_hub_s_cache_is_adapter_and_base(tmp_path):
    torch.manual_seed(0)
    tied(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    for name in ("base", "adapter"):
        repo = tmp_path / f"models--org--{name}"
        (repo / "blobs").mkdir(parents=True)
        (repo / "snapshots/0123").mkdir(parents=True)
        for path in (tmp_path / name).iterdir():
            if path.is_file():
                shutil.move(path, repo / "blobs" / path.name)
                (repo / "snapshots/0123" / path.name).symlink_to(f"../../blobs/{path.name}")
    where = {name: tmp_path / f"models--org--{name}/snapshots/0123" for name in ("base", "adapter")}
    fold(where["adapter"], str(where["base"]), tmp_path / "folded")
    assert json.loads((tmp_path / "folded/config.json").read_text())["model_type"] == "llama"
    assert not any(path.is_symlink() for path in (tmp_path / "folded").iterdir())
    collect(where["adapter"], base_model="org/base")
    merge_folders([where["adapter"]], tmp_path / "merged")


def test_whole_modules_are_averaged_on_request(tmp_path):
    torch.manual_seed(0)
    tied(tmp_path / "base")
    heads = []
    for name in "ab":
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        settings = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
        model = get_peft_model(base, settings)
        head = next(p for n, p in model.named_parameters() if "lm_head.modules_to_save" in n)
        heads.append(head.detach().normal_().clone())
        model.save_pretrained(tmp_path / name, save_embedding_layers=False)
    sources = [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(AdapterError, match="not the same") as problem:
        merge_folders(sources, tmp_path / "merged")
    assert "--modules-to-save mean" in problem.value.fix
    report = merge_folders(sources, tmp_path / "merged", weights=[0.25, 0.75], modules_to_save="mean")
    merged = open_adapter(tmp_path / "merged").modules_to_save["lm_head.weight"]
    torch.testing.assert_close(merged, 0.25 * heads[0] + 0.75 * heads[1])
    assert MergeReport.read(tmp_path / "merged/merge.json") == report
    assert (report.modules_to_save, report.modules_to_save_averaged) == (["lm_head.weight"], ["lm_head.weight"])
    (line,) = [line for line in merge_summary(report) if "saved whole" in line]
    assert line.startswith("saved whole and averaged: lm_head.weight; labels")
    for name in "ab":  # one head
        stored = load_file(tmp_path / name / "adapter_model.safetensors")
        save_file(stored | {"base_model.model.lm_head.weight": heads[0]}, tmp_path / name / "adapter_model.safetensors")
    report = merge_folders(sources, tmp_path / "same", modules_to_save="mean")
    assert (report.modules_to_save, report.modules_to_save_averaged) == (["lm_head.weight"], [])
    assert "saved whole, the same in all adapters: lm_head.weight" in merge_summary(report)


def test_peft_s_wrapped_names_and_plain_ones_are_one_table(tmp_path):
    torch.manual_seed(0)
    tied(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    settings = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    get_peft_model(base, settings).save_pretrained(tmp_path / "a", save_embedding_layers=False)
    path, key = tmp_path / "a/adapter_model.safetensors", "base_model.model.lm_head"
    tensors = load_file(path)
    table = tensors[f"{key}.weight"]
    wrapped = {f"{key}.modules_to_save.weight": table.clone(), f"{key}.original_module.weight": table + 1}
    save_file(tensors | wrapped, path)
    assert torch.equal(open_adapter(tmp_path / "a").modules_to_save["lm_head.weight"], table)
    save_file(tensors | wrapped | {f"{key}.modules_to_save.weight": table + 2}, path)
    with pytest.raises(AdapterError, match="twice"):
        open_adapter(tmp_path / "a").modules_to_save["lm_head.weight"]


@pytest.mark.parametrize(("given", "fetched"), [("org/base", "v1"), ("org/base@v2", "v2"), ("org/other", None)])
def test_a_base_from_the_hub_is_of_the_revision_asked_for_or_the_adapter_s(tmp_path, monkeypatch, given, fetched):
    torch.manual_seed(0)
    tied(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    config |= {"base_model_name_or_path": "org/base", "revision": "v1"}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    asked = []

    def fetch(name, *, revision, allow_patterns):
        asked.append((name, revision))
        return tmp_path / "base"

    monkeypatch.setattr("poc_lora.merging.fold.snapshot_download", fetch)
    fold(tmp_path / "adapter", given, tmp_path / "folded")
    assert asked == [(given.partition("@")[0], fetched)]
