"""What base, adapter and merge write: against PEFT."""

import shutil

import peft
import pytest
import torch
import yaml
from transformers import AutoTokenizer

from poc_lora.data.prompts import render_prompt
from poc_lora.errors import RequestError
from poc_lora.evaluation.sample import sample_texts
from poc_lora.models.load import load_base
from tests.evaluation import test_evaluate

run = test_evaluate.run  # the fixture


def by_peft(base, folder, prompt, tokens):
    model, tokenizer = load_base(str(base), dtype="float32", device=torch.device("cpu"))
    if folder is not None:
        model = peft.PeftModel.from_pretrained(model, folder).eval()
    ids = torch.tensor([prompt if isinstance(prompt, list) else tokenizer(prompt)["input_ids"]])
    end = tokenizer.eos_token_id
    new = []
    for _ in range(tokens):
        with torch.no_grad():
            token = int(model(input_ids=ids).logits[0, -1].argmax())
        new.append(token)
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        if token == end:
            break
    return tokenizer.decode(new, skip_special_tokens=True)


def test_texts_are_those_of_peft_token_by_token(run, tiny_model_dir):
    found = sample_texts(run, "Where is the hat?", adapter="01", new_tokens=12)
    prompt = render_prompt("Where is the hat?", "", "bare")
    folders = {"base": None, "01": run / "adapters" / "01", "merge": run / "merged"}
    assert found == {name: by_peft(tiny_model_dir, folder, prompt, 12) for name, folder in folders.items()}
    assert list(found) == ["base", "01", "merge"]
    assert len(set(found.values())) == 3


def test_the_exact_average_stands_for_a_merge_that_is_not_there(run, tmp_path):
    merged = sample_texts(run, "Where?", new_tokens=12)
    shutil.move(run / "merged", tmp_path / "merged")
    assert sample_texts(run, "Where?", new_tokens=12) == merged
    assert list(merged) == ["base", "merge"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"adapter": "77"}, "no adapter '77'"),
        ({"new_tokens": 0}, "--tokens"),
        ({"new_tokens": 100_000}, "do not fit"),
        ({"chat": True}, "--chat"),
    ],
)
def test_what_cannot_be_sampled_is_refused(run, asked, said):
    with pytest.raises(RequestError, match=said):
        sample_texts(run, "Where?", **asked)


def test_bytes_that_are_no_text_are_refused(run):
    """The terminal passes those that are not UTF-8 as halves of surrogate pairs."""
    with pytest.raises(RequestError, match="surrogate"):
        sample_texts(run, "a\ud800b")


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(RequestError, match="not a run"):
        sample_texts(tmp_path, "Where?")


def test_a_chat_is_asked_in_the_bases_own_template(run, tiny_model_dir, tmp_path):
    base = tmp_path / "chat"
    shutil.copytree(tiny_model_dir, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{% for m in messages %}the {{ m.content }} old {% endfor %}{{ 'hall' }}"
    tokenizer.save_pretrained(base)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["name"] = str(base)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    found = sample_texts(run, "hat", chat=True, new_tokens=6)
    ids = tokenizer("the hat old hall", add_special_tokens=False)["input_ids"]
    assert found["base"] == by_peft(base, None, ids, 6)
