"""`data.chat_template`: a run's own template for training, evaluation and samples, carried with its adapters."""

import pytest
from transformers import AutoTokenizer

from poc_lora.artifacts.run_folder import RunFolder
from poc_lora.errors import DataError, ModelError, RunError
from poc_lora.evaluation.rows import evaluate_rows
from poc_lora.evaluation.sample import sample_texts
from poc_lora.merging.folders import merge_folders
from poc_lora.training.check import check
from poc_lora.training.train import train
from tests.training.conftest import config, facts
from tests.training.test_data import CHATML as TEMPLATE
from tests.training.test_held_out_rows import chat, write_json_lines


@pytest.fixture
def chats(settings, tmp_path):
    (tmp_path / "mine.jinja").write_text(TEMPLATE)
    rows = write_json_lines(tmp_path / "chats.jsonl", [chat(i) for i in range(30)])
    settings["data"] |= {"train": [rows], "learn": "assistant", "chat_template": str(tmp_path / "mine.jinja")}
    return settings


def test_a_base_without_a_chat_template_is_told_what_to_do(chats):
    with pytest.raises(ModelError, match=r"instruct model, or give a template: data\.chat_template") as caught:
        check(config(chats, data__chat_template=None))
    assert "row 1" in str(caught.value)


def test_what_is_learnt_of_a_chat_is_shown(chats):
    shown = check(config(chats))["a row"]
    assert [line[:6] for line in shown] == ["  no l", "> loss", "  no l", "> loss"]
    assert [line.partition("'")[2] for line in shown[1::2]] == ["In the shed.</s>'", "In hall 1.</s>'"]


@pytest.mark.filterwarnings("ignore")
def test_the_template_is_written_with_adapters_and_merge(chats, tiny_model_dir):
    done = train(config(chats))
    run = RunFolder(done.folder)
    merge_folders([run.path], run.merged)
    turns = [{"role": "user", "content": "Where is it?"}]
    for folder in (run.adapter(0), run.adapter(2), run.merged):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert text == "[user]Where is it?</s>[assistant]"
        assert tokenizer("a b c")["input_ids"] == AutoTokenizer.from_pretrained(tiny_model_dir)("a b c")["input_ids"]
    assert run.chat_template.read_text() == TEMPLATE
    again = sample_texts(run.path, "Where is it?", new_tokens=6)
    assert facts(run.path)["chats"]
    assert again == sample_texts(run.path, "Where is it?", chat=True, new_tokens=6)
    assert again != sample_texts(run.path, "Where is it?", chat=False, new_tokens=6)
    rows = str(run.held_out)
    inside = evaluate_rows([run.path], [rows])
    loose = evaluate_rows([run.adapter(0)], [rows], out=run.path / "loose")  # with the template of its folder
    assert len(loose.tokens) == len(inside.tokens)


def test_the_run_keeps_its_template_and_is_not_resumed_with_another(chats, tmp_path):
    run = config(chats)
    train(run)
    train(run, resume=True)
    (tmp_path / "mine.jinja").write_text(TEMPLATE.replace("[", "<"))
    with pytest.raises(RunError, match="its chat template"):
        train(run, resume=True)
    (tmp_path / "mine.jinja").unlink()
    with pytest.raises(DataError, match=r"mine\.jinja"):
        train(run, resume=True)
    assert sample_texts(RunFolder(tmp_path / "run").path, "Where?", new_tokens=2)  # from the run's own copy


def test_without_it_no_tokenizer_is_written(settings):
    done = train(config(settings))
    assert {path.name for path in (done.folder / "adapters/00").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert facts(done.folder)["chats"] is False


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the chat template is empty"),
        ("a\n{% for m in %}", "not valid Jinja: line 2: Expected"),
        ("{{ 'x' * 2**40 }}", "chat template"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(chats, tmp_path, text, said):
    (tmp_path / "mine.jinja").write_text(text)
    with pytest.raises((DataError, ModelError), match=said):
        check(config(chats))
