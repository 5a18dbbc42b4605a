"""Tables of tokens that PEFT saves beside an adapter's factors: merged, evaluated and folded as PEFT applies them."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from poc_lora.adapters.adapter import CONFIG_NAME, WEIGHTS_NAME, open_adapter
from poc_lora.errors import AdapterError
from poc_lora.evaluation.whole_weights import in_weights, named_as_in
from poc_lora.files import read_json
from poc_lora.merging.fold import fold
from poc_lora.merging.folders import merge_folders

TOKENS = torch.arange(1, 13).view(2, 6)
TARGETS = [["q_proj", "embed_tokens"], ["q_proj", "lm_head"], ["embed_tokens", "lm_head"]]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def load(base, rows=None):
    model = AutoModelForCausalLM.from_pretrained(base)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return model


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def base(tmp_path, request):
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    config = LlamaConfig(**sizes, tie_word_embeddings=request.param, initializer_range=0.2)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    return tmp_path / "base"


def peft_adapter(base, folder, targets, *, seed=0, rows=None, save="auto", **options):
    """An adapter as PEFT saves it, of a base whose table may have been resized before, and PEFT's logits with it."""
    torch.manual_seed(99)  # the new rows
    model = load(base, rows)
    torch.manual_seed(seed)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=targets, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder, save_embedding_layers=save)
    return logits(PeftModel.from_pretrained(load(base, rows), folder))


def in_the_weights(base, folder):
    model = load(base)
    before = logits(model)
    with in_weights(model, [named_as_in(model, open_adapter(folder))]):
        found = logits(model)
    assert torch.equal(logits(model), before)
    return found


@pytest.mark.parametrize("rows", [None, 53])
@pytest.mark.parametrize("targets", TARGETS, ids="-".join)
def test_a_table_beside_its_factors_is_folded_and_evaluated_as_in_peft(base, tmp_path, targets, rows):
    if rows and len(set(targets) & {"embed_tokens", "lm_head"}) < 2 and not load(base).config.tie_word_embeddings:
        peft_adapter(base, tmp_path / "a", targets, rows=rows)
        with pytest.raises(AdapterError, match="has a table of 53 tokens, but no"):  # PEFT does not save the other
            fold(tmp_path / "a", str(base), tmp_path / "folded")
        return
    expected = peft_adapter(base, tmp_path / "a", targets, rows=rows)
    assert any("base_layer" in key for key in load_file(tmp_path / "a" / WEIGHTS_NAME))
    torch.testing.assert_close(in_the_weights(base, tmp_path / "a"), expected, rtol=1e-5, atol=1e-5)
    fold(tmp_path / "a", str(base), tmp_path / "folded", untie_head=True)
    torch.testing.assert_close(logits(load(tmp_path / "folded")), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("targets", TARGETS, ids="-".join)
def test_a_table_that_all_sources_share_is_carried(base, tmp_path, targets):
    rows = None if "q_proj" in targets else 53
    for seed in range(2):
        peft_adapter(base, tmp_path / f"{seed}", targets, seed=seed, rows=rows)
    merge_folders([tmp_path / "0", tmp_path / "1"], tmp_path / "merged")
    assert read_json(tmp_path / "merged" / CONFIG_NAME)["modules_to_save"] is None
    tables = {key for key in load_file(tmp_path / "0" / WEIGHTS_NAME) if "base_layer" in key}
    assert tables == {key for key in load_file(tmp_path / "merged" / WEIGHTS_NAME) if "base_layer" in key}
    model = PeftModel.from_pretrained(load(base, rows), tmp_path / "merged")
    for name in model.base_model.targeted_module_names:
        layer = model.base_model.model.get_submodule(name)
        parts = [
            PeftModel.from_pretrained(load(base, rows), tmp_path / f"{seed}").base_model.model.get_submodule(name)
            for seed in range(2)
        ]
        mean = sum(part.base_layer.weight + part.get_delta_weight("default") for part in parts) / 2
        torch.testing.assert_close(layer.base_layer.weight + layer.get_delta_weight("default"), mean)
    torch.testing.assert_close(in_the_weights(base, tmp_path / "merged"), logits(model), rtol=1e-5, atol=1e-5)


def test_a_table_that_is_the_base_s_is_left_out_where_another_source_has_none(base, tmp_path):
    peft_adapter(base, tmp_path / "whole", ["q_proj", "embed_tokens"])
    peft_adapter(base, tmp_path / "plain", ["q_proj", "embed_tokens"], seed=1, save=False)
    peft_adapter(base, tmp_path / "both", ["q_proj"], seed=2, save=True)
    merge_folders([tmp_path / "whole", tmp_path / "plain", tmp_path / "both"], tmp_path / "merged")
    assert not open_adapter(tmp_path / "merged").modules_to_save
    stored = load_file(tmp_path / "whole" / WEIGHTS_NAME)
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    save_file(stored | {key: stored[key] + 1}, tmp_path / "whole" / WEIGHTS_NAME)
    with pytest.raises(
        AdapterError, match=r"model\.embed_tokens\.weight is saved whole in .*whole, but not here"
    ) as problem:
        merge_folders([tmp_path / "whole", tmp_path / "plain"], tmp_path / "again")
    assert "save_embedding_layers=False" in problem.value.fix
    save_file(stored, tmp_path / "whole" / WEIGHTS_NAME)
    (base / "config.json").rename(tmp_path / "config.json")  # a base that is not at hand
    with pytest.raises(AdapterError, match=r"is saved whole in .*, but not here"):
        merge_folders([tmp_path / "whole", tmp_path / "plain"], tmp_path / "again")


def test_tied_tables_that_peft_resized_stay_tied(base, tmp_path):
    expected = peft_adapter(base, tmp_path / "a", ["q_proj"], rows=53)
    assert {"lm_head.weight", "model.embed_tokens.weight"} == set(open_adapter(tmp_path / "a").modules_to_save)
    fold(tmp_path / "a", str(base), tmp_path / "folded")
    folded = load(tmp_path / "folded")
    torch.testing.assert_close(logits(folded), expected, rtol=1e-5, atol=1e-5)
    assert (folded.lm_head.weight is folded.model.embed_tokens.weight) == folded.config.tie_word_embeddings
    torch.testing.assert_close(in_the_weights(base, tmp_path / "a"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("whole", ["embed_tokens", "lm_head"])
def test_a_resized_table_without_its_partner_is_not_folded(base, tmp_path, whole):
    peft_adapter(base, tmp_path / "a", ["q_proj"], rows=53, save=False, modules_to_save=[whole])
    with pytest.raises(AdapterError, match="has a table of 53 tokens, but no"):
        fold(tmp_path / "a", str(base), tmp_path / "folded", untie_head=True)
