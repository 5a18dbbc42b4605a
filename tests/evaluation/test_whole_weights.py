"""Evaluations of what no bank can hold: models without an adapter, and adapters with modules trained whole."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from poc_lora.adapters.adapter import open_adapter
from poc_lora.cli.app import app
from poc_lora.errors import RequestError
from poc_lora.evaluation.evaluate import evaluate
from poc_lora.evaluation.whole_weights import in_weights
from poc_lora.merging.fold import fold
from poc_lora.merging.folders import merge_folders
from poc_lora.models.load import load_base
from tests.evaluation.test_evaluate import data  # noqa: F401


@pytest.fixture
def adapters(tiny_model_dir, tmp_path):
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        settings = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), settings)
        head = next(p for name, p in model.named_parameters() if "lm_head.modules_to_save" in name)
        head.data.add_(0.2 * head.data.roll(len(list(tmp_path.iterdir())), 0))
        model.save_pretrained(folder, save_embedding_layers=False)
    return folders


def test_whole_modules_are_scored_as_the_folded_model_is(adapters, tiny_model_dir, data, tmp_path):  # noqa: F811
    results = evaluate(adapters[:1], data=data, benchmarks=["piqa"], out=tmp_path / "eval")
    assert list(results.adapters) == ["one"]
    fold(adapters[0], str(tiny_model_dir), tmp_path / "folded", untie_head=True)
    alone = evaluate([tmp_path / "folded"], data=data, benchmarks=["piqa"], out=tmp_path / "eval-folded")
    assert (alone.adapters, alone.merged) == ({}, None)
    assert alone.base.average.value == results.adapters["one"].average.value


def test_a_model_alone_and_its_report(tiny_model_dir, data, tmp_path):  # noqa: F811
    words = ["eval", str(tiny_model_dir), "--data", str(data), "--benchmarks", "piqa", "--out", str(tmp_path / "e")]
    for command in (words, ["report", str(tmp_path / "e")]):
        done = CliRunner().invoke(app, command, catch_exceptions=False)
        assert done.exit_code == 0, done.output
    with pytest.raises(RequestError, match="its own base"):
        evaluate([tiny_model_dir], data=data, base="gpt2", out=tmp_path / "f")


def test_an_embedding_and_the_table_that_peft_saves_beside_its_factors_are_scored(tiny_model_dir, data, tmp_path):  # noqa: F811
    for seed in range(2):
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(std=0.3)
        model.save_pretrained(tmp_path / f"{seed}")
    sources = [tmp_path / "0", tmp_path / "1"]
    results = evaluate(sources, data=data, benchmarks=["piqa"], out=tmp_path / "eval")
    merge_folders(sources, tmp_path / "merged")
    fold(tmp_path / "merged", str(tiny_model_dir), tmp_path / "folded", untie_head=True)
    alone = evaluate([tmp_path / "folded"], data=data, benchmarks=["piqa"], out=tmp_path / "eval-folded")
    assert alone.base.average.value == results.merged.average.value


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_head_trained_whole_on_a_quantised_base_is_computed_as_in_peft(tiny_model_dir, tmp_path, kind):
    pytest.importorskip("bitsandbytes")

    def base():
        return load_base(str(tiny_model_dir), dtype="float32", quantization=kind, device=torch.device("cpu"))[0]

    def logits(model):
        with torch.no_grad():
            return model.eval()(torch.arange(1, 13).view(2, 6)).logits

    for seed in range(2):
        settings = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
        model = get_peft_model(base(), settings)
        head = next(p for name, p in model.named_parameters() if "lm_head.modules_to_save" in name)
        head.data.mul_(1.5)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.manual_seed(seed)
                parameter.data.normal_(std=0.3)
        model.save_pretrained(tmp_path / f"{seed}", save_embedding_layers=False)
    plain, adapters = base(), [open_adapter(tmp_path / f"{seed}") for seed in range(2)]
    before = logits(plain)
    for seed, adapter in enumerate(adapters):
        expected = logits(PeftModel.from_pretrained(base(), tmp_path / f"{seed}"))
        assert (expected - before).abs().max() > 0.1
        with in_weights(plain, [adapter]):
            torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-4)
    merge_folders([tmp_path / "0", tmp_path / "1"], tmp_path / "merged")
    expected = logits(PeftModel.from_pretrained(base(), tmp_path / "merged"))
    with in_weights(plain, adapters):
        torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(plain), before)
