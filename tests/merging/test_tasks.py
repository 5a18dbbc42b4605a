"""Adapters of models that are no causal language models: what PEFT saves is merged into what PEFT loads."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaForSequenceClassification,
)

from poc_lora.adapters.adapter import read_adapter
from poc_lora.errors import AdapterError
from poc_lora.merging.fold import fold
from poc_lora.merging.folders import merge_folders
from tests.conftest import build_llama

TOKENS = torch.arange(1, 13).view(2, 6)
BERT = BertConfig(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=16,
    initializer_range=0.3,
)


def build(kind):
    torch.manual_seed(0)
    if kind is LlamaForSequenceClassification:
        config = build_llama(97).config
        config.pad_token_id = 0
        return kind(config).eval()
    return kind(BERT).eval()


def members(kind, tmp_path, task):
    folders = []
    for seed in range(2):
        model = build(kind)
        targets = ["q_proj"] if kind is LlamaForSequenceClassification else ["query"]
        torch.manual_seed(1 + seed)
        settings = LoraConfig(r=2 + seed, target_modules=targets, init_lora_weights=False, task_type=task)
        get_peft_model(model, settings).save_pretrained(tmp_path / f"{seed}")
        folders.append(tmp_path / f"{seed}")
    return folders


def output(model):
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS)[0]


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        (BertForSequenceClassification, "SEQ_CLS"),
        (LlamaForSequenceClassification, "SEQ_CLS"),
        (BertForSequenceClassification, None),
        (BertModel, "FEATURE_EXTRACTION"),
    ],
)
def test_peft_applies_the_average(kind, task, tmp_path):
    folders = members(kind, tmp_path, task)
    merge_folders(folders, tmp_path / "merged")
    assert json.loads((tmp_path / "merged/adapter_config.json").read_text())["task_type"] == task
    plain = build(kind).state_dict()
    merged = [PeftModel.from_pretrained(build(kind), f).merge_and_unload().state_dict() for f in folders]
    expected = build(kind)
    expected.load_state_dict({key: (merged[0][key] + merged[1][key]) / 2 for key in plain})
    assert (output(expected) - output(build(kind))).abs().max() > 1e-3
    applied = PeftModel.from_pretrained(build(kind), tmp_path / "merged")
    torch.testing.assert_close(output(applied), output(expected), rtol=1e-4, atol=1e-5)


def test_a_head_is_folded_into_a_base_of_a_kind_that_is_not_known(tmp_path):
    build(BertForSequenceClassification).save_pretrained(tmp_path / "base")
    (tmp_path / "base/config.json").write_text('{"model_type": "of my own"}')
    settings = LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"], init_lora_weights=False)
    model = get_peft_model(build(BertForSequenceClassification), settings)
    torch.nn.init.normal_(model.base_model.model.classifier.modules_to_save["default"].weight)
    model.save_pretrained(tmp_path / "adapter")
    fold(tmp_path / "adapter", str(tmp_path / "base"), tmp_path / "folded")
    folded = load_file(tmp_path / "folded/model.safetensors")
    expected = model.merge_and_unload().state_dict()
    assert folded.keys() <= expected.keys()
    for name, tensor in folded.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


def test_tasks_that_differ_leave_the_plain_one(tmp_path):
    folders = members(BertModel, tmp_path, "FEATURE_EXTRACTION")
    path = folders[1] / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"task_type": None}))
    merge_folders(folders, tmp_path / "merged")
    assert read_adapter(tmp_path / "merged").task_type is None
    path.write_text(json.dumps(json.loads(path.read_text()) | {"task_type": "JUGGLING"}))
    with pytest.raises(AdapterError, match="JUGGLING"):
        read_adapter(folders[1])


@pytest.mark.parametrize("revision", ['main"); import os #', "a b", "x\n", "é"])
def test_a_revision_that_is_none_is_refused(tmp_path, revision):
    folder = members(BertModel, tmp_path, None)[0]
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"revision": revision}))
    with pytest.raises(AdapterError, match="revision is not"):
        read_adapter(folder)
