"""The rows that a run validates on: held out of its own or from files; scored again, their losses are the same."""

import json

import pytest

from poc_lora.data.rows import read_sources
from poc_lora.errors import ConfigError, DataError, RunError
from poc_lora.evaluation.rows import evaluate_rows
from poc_lora.merging.folders import merge_folders
from poc_lora.models.load import load_tokenizer
from poc_lora.training.check import check
from poc_lora.training.data import prepare_data
from poc_lora.training.train import train
from tests.conftest import instruction_rows
from tests.training.conftest import config, facts, metrics

# It writes the time, as some templates write the date.
TEMPLATE = (
    "{{ strftime_now('%S.%f') }}{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def write_json_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat(i):
    texts = ["Where is it?" * (i % 3 + 1), "In the shed.", "And the hat?", f"In hall {i}."]
    turns = [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(texts)]
    turns[1]["weight"] = i % 2
    return {"messages": turns}


def renamed(settings, tmp_path):
    rows = [{"question": r["instruction"], "output": r["answer"], "reply": r["output"]} for r in instruction_rows(60)]
    columns = {"question": "instruction", "output": None, "reply": "output"}
    return {"data__train": [write_json_lines(tmp_path / "theirs.jsonl", rows)], "data__columns": columns}


def chats(settings, tmp_path):
    (tmp_path / "mine.jinja").write_text(TEMPLATE)
    rows = write_json_lines(tmp_path / "chats.jsonl", [chat(i) for i in range(60)])
    return {
        "data__train": [rows],
        "data__chat_template": str(tmp_path / "mine.jinja"),
        "data__learn": "assistant",
        "data__max_length": 60,  # cuts some
    }


def own_file(settings, tmp_path):
    rows = write_json_lines(tmp_path / "own.jsonl", [{"prompt": f"one {i} ", "completion": "two"} for i in range(5)])
    return {"data__validation": "auto", "data__validation_files": [rows]}


@pytest.mark.parametrize("kind", [renamed, chats, own_file])
def test_scored_again_the_held_out_rows_have_the_losses_of_the_verdict(settings, tmp_path, kind):
    done = train(config(settings, **kind(settings, tmp_path)))
    merge_folders([done.folder], done.folder / "merged")
    found = evaluate_rows([done.folder], [str(done.folder / "held_out.jsonl")])
    lines = {line["adapter"]: line for line in metrics(done.folder) if "row_losses" in line}
    assert found.tokens == lines["base"]["row_tokens"]
    assert len(found.tokens) == (5 if kind is own_file else 6)
    names = {"base": found.base, "merge": found.merged} | {int(name): x for name, x in found.adapters.items()}
    assert names.keys() == lines.keys() - {"merge_of_best"}
    for name, losses in names.items():
        assert losses == pytest.approx(lines[name]["row_losses"], abs=2e-3), name
    assert not found.trained_on


def test_held_out_rows_are_kept_whole_and_in_the_order_of_their_losses(settings):
    run = config(settings)
    done, data = train(run), prepare_data(run, load_tokenizer(run.model.name))
    kept = read_sources([str(done.folder / "held_out.jsonl")])
    assert kept == data.held_out
    assert len(kept) == 6
    everything = read_sources(run.data.train)
    assert all(row in everything for row in kept)
    assert not (
        train(config(settings, output=f"{settings['output']}-none", data__validation=0)).folder / "held_out.jsonl"
    ).exists()


def test_with_files_of_its_own_validation_takes_no_rows_and_changes_no_adapter(settings, tmp_path):
    plain = train(config(settings, data__validation=0))
    done = train(config(settings, output=str(tmp_path / "own"), **own_file(settings, tmp_path)))
    for adapter in ("00", "01", "02"):
        one, other = (d.folder / "adapters" / adapter / "adapter_model.safetensors" for d in (plain, done))
        assert one.read_bytes() == other.read_bytes()
    written = facts(done.folder)
    assert written["data_sha256"] == facts(plain.folder)["data_sha256"]
    assert len(written["validation_sha256"]) == 3
    assert facts(plain.folder)["validation_sha256"] == {}


def test_a_run_is_resumed_on_the_validation_files_that_it_began_with(settings, tmp_path):
    run = config(settings, **own_file(settings, tmp_path))
    train(run)
    train(run, resume=True)
    with pytest.raises(RunError, match=r"data\.validation_files was"):
        train(config(settings), resume=True)
    write_json_lines(tmp_path / "own.jsonl", [{"prompt": "one ", "completion": "three"}])
    with pytest.raises(RunError, match=r"the validation files have changed since the run began: .*own\.jsonl"):
        train(run, resume=True)


def test_validation_rows_from_two_places_are_refused(settings, tmp_path):
    changes = own_file(settings, tmp_path) | {"data__validation": 6}
    with pytest.raises(ConfigError, match="validation_files, or validation: 6"):
        config(settings, **changes)
    train_file = settings["data"]["train"]
    with pytest.raises(DataError, match="is trained on too"):
        check(config(settings, data__validation="auto", data__validation_files=train_file))


def test_validation_files_that_cannot_be_used_are_refused(settings, tmp_path):
    write_json_lines(tmp_path / "own.jsonl", [{"instruction": "a"}])
    changes = {"data__validation": 0, "data__validation_files": [str(tmp_path / "own.jsonl")]}
    with pytest.raises(DataError, match=r"own.jsonl, row 1"):
        check(config(settings, **changes))
    with pytest.raises(DataError, match=r"validation_files has no usable rows \(0 rows lost .* 1 are bad"):
        check(config(settings, **changes, data__skip_bad_rows=True))
