"""The rows of a run: what identifies them on resuming, and which are left out."""

import hashlib
import json

import pytest

from poc_lora.artifacts.run_info import SUPERVISED_TOKENS, TOKENIZED_ROWS
from poc_lora.config import COLUMNS, load_config
from poc_lora.data.formats import FORMATS
from poc_lora.errors import DataError, RunError
from poc_lora.models.load import load_tokenizer
from poc_lora.reporting.summaries import training_summary
from poc_lora.training.check import check
from poc_lora.training.data import prepare_data
from poc_lora.training.run import Run, require_same_rows
from poc_lora.training.train import train
from tests.conftest import instruction_rows
from tests.training.conftest import config, facts

CHATML = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def chats(path, weight):
    turns = [("user", "one", None), ("assistant", "two", weight), ("user", "three", None), ("assistant", "four", 1)]
    row = {"messages": [{"role": role, "content": text, "weight": w} for role, text, w in turns]}
    path.write_text(json.dumps([row] * 20))
    return path


def digests(run, tokenizer):
    files = prepare_data(run, tokenizer).files
    return files[TOKENIZED_ROWS], files[SUPERVISED_TOKENS]


@pytest.mark.parametrize("learn", ["all", "last"])
def test_tokenised_rows_are_known_by_their_tokens_alone(settings, learn):
    run = config(settings, data__learn=learn, data__validation=0)
    data = prepare_data(run, load_tokenizer(run.model.name))
    assert data.files[TOKENIZED_ROWS] == hashlib.sha256(repr([e.ids for e in data.train]).encode()).hexdigest()


def test_rows_of_the_same_tokens_are_told_apart_by_what_has_a_loss(settings, tmp_path):
    tokenizer = load_tokenizer(settings["model"]["name"])
    tokenizer.chat_template = CHATML
    settings["data"] |= {"train": [str(tmp_path / "chats.json")], "learn": "assistant"}
    chats(tmp_path / "chats.json", 1)
    run = config(settings)
    both = digests(run, tokenizer)
    chats(tmp_path / "chats.json", 0)
    one = digests(run, tokenizer)
    assert both[0] == one[0]
    assert both[1] != one[1]


def test_a_run_on_rows_with_another_loss_is_not_resumed(settings):
    done = train(config(settings))
    run = Run(done.folder, None, [], None)
    run.update_info(data_sha256=facts(done.folder)["data_sha256"])
    require_same_rows(run, run.info.data_sha256, {})
    recorded = dict(run.info.data_sha256)
    run.update_info(data_sha256={k: v for k, v in recorded.items() if k != SUPERVISED_TOKENS})
    require_same_rows(run, recorded, {})  # a run of before it was recorded
    run.update_info(data_sha256=recorded)
    with pytest.raises(RunError, match="which of them have a loss, are not those"):
        require_same_rows(run, run.info.data_sha256 | {SUPERVISED_TOKENS: "ab" * 32}, {})


def test_bad_rows_are_refused_or_left_out_and_counted(settings, tmp_path):
    path = tmp_path / "some.json"
    rows = instruction_rows(60)
    path.write_text(json.dumps([*rows[:30], {"instruction": "a"}, {"output": 3}, *rows[30:]]))
    with pytest.raises(DataError, match="2 rows cannot be used"):
        train(config(settings, data__train=[str(path)]))
    plain = train(config(settings))
    skipping = config(settings, data__train=[str(path)], data__skip_bad_rows=True, output=str(tmp_path / "skipping"))
    assert check(skipping)["rows left out (data.skip_bad_rows)"] == 2
    done = train(skipping)
    assert done.skipped == facts(done.folder)["skipped_rows"] == 2
    assert (plain.skipped, facts(plain.folder)["skipped_rows"]) == (0, 0)
    assert "2 rows that cannot be used were left out (data.skip_bad_rows)" in training_summary(done)
    ours, theirs = (d.folder / "adapters/00/adapter_model.safetensors" for d in (done, plain))
    assert ours.read_bytes() == theirs.read_bytes()


def test_where_no_row_can_be_used_the_reason_is_told(settings, tmp_path):
    path = tmp_path / "none.json"
    path.write_text(json.dumps([{"instruction": "a"}] * 3))
    with pytest.raises(DataError, match="3 are bad: the column 'output' is missing"):
        train(config(settings, data__train=[str(path)], data__skip_bad_rows=True))


def test_columns_are_kept_in_the_run_and_on_resuming(settings, tmp_path):
    path = tmp_path / "theirs.json"
    renamed = [{"question": r["instruction"], "reply": r["output"], "hints": "x"} for r in instruction_rows(60)]
    path.write_text(json.dumps(renamed))
    columns = {"question": "instruction", "reply": "output", "hints": None}
    run = config(settings, data__train=[str(path)], data__columns=columns)
    done = train(run)
    assert load_config(done.folder / "config.yaml") == run
    train(run, resume=True)


def test_the_configuration_names_the_columns_of_the_formats():
    assert set(COLUMNS) == {column for used, _ in FORMATS.values() for column in used}
