"""Losses on rows from a file: against PEFT, one row at a time."""

import json
import re
import shutil
import signal

import peft
import pytest
import torch

from poc_lora.adapters.adapter import write_adapter
from poc_lora.artifacts.row_losses import RowLosses
from poc_lora.config import load_config
from poc_lora.data.prompts import encode_rows, row_limit
from poc_lora.data.rows import read_sources
from poc_lora.errors import AdapterError, DataError, Interrupted, RequestError
from poc_lora.evaluation import rows as module
from poc_lora.evaluation.rows import evaluate_rows
from poc_lora.evaluation.variants import adapter_digest, load_base_of
from poc_lora.merging.folders import merge_folders
from poc_lora.models.load import context_length, load_base
from tests.evaluation import test_evaluate
from tests.evaluation.test_evaluate import adapter

run = test_evaluate.run  # the fixture
ROWS = [
    *({"instruction": f"Where is thing {i}? {'old ' * i}", "output": "in the hall " * (i % 3 + 1)} for i in range(6)),
    {"prompt": "The hat is made of ", "completion": "wool"},
]


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "held-out.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def by_peft(run, rows, folder=None):
    """The log-probability of every answer token of each row, by PEFT, without batches."""
    config = load_config(run / "config.yaml")
    model, tokenizer = load_base(config.model.name, dtype="float32", device=torch.device("cpu"))
    if folder is not None:
        model = peft.PeftModel.from_pretrained(model, folder).eval()
    encoded = encode_rows(
        read_sources([str(rows)]),
        tokenizer,
        template=config.data.prompt,
        max_length=row_limit(config.data.max_length, context_length(model)),
        learn="last",
    )
    found = []
    for example in encoded.answers:
        ((start, end),) = example.supervised
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([example.ids])).logits[0].double()
        ids = torch.tensor(example.ids)
        found.append(logits[start - 1 : end - 1].log_softmax(-1)[torch.arange(end - start), ids[start:end]])
    return found


def sums(log_probs):
    return [-row.sum().item() for row in log_probs]


def test_each_variants_losses_are_those_of_peft_row_by_row(run, rows, monkeypatch):
    monkeypatch.setattr(module, "TOKENS_PER_BATCH", 64)  # some batches of several rows, some of one
    found = evaluate_rows([run], [str(rows)])
    near = {"abs": 2e-3}
    assert found.base == pytest.approx(sums(by_peft(run, rows)), **near)
    members = [by_peft(run, rows, run / "adapters" / name) for name in ("00", "01", "02")]
    for name, member in zip(("00", "01", "02"), members, strict=True):
        assert found.adapters[name] == pytest.approx(sums(member), **near)
    assert found.merged == pytest.approx(sums(by_peft(run, rows, run / "merged")), **near)
    together = [torch.stack(row).exp().mean(0).log() for row in zip(*members, strict=True)]
    assert found.ensemble == pytest.approx(sums(together), **near)
    assert found.tokens == [len(row) for row in together]
    assert len({tuple(losses) for losses in [found.base, found.merged, found.ensemble, *found.adapters.values()]}) == 6
    assert RowLosses.read(run / "eval-rows" / "rows.json") == found


def test_losses_that_were_measured_already_are_read_and_changed_ones_measured_again(run, rows, monkeypatch):
    first = evaluate_rows([run], [str(rows)])
    loads = []
    monkeypatch.setattr(module, "load_base_of", lambda *a: loads.append(1) or load_base_of(*a))
    assert evaluate_rows([run], [str(rows)]) == first
    assert not loads
    rows.write_text(rows.read_text().replace("wool", "glass"))
    changed = evaluate_rows([run], [str(rows)])
    assert changed.base[:-1] == first.base[:-1]
    assert changed.base[-1] != first.base[-1]
    evaluate_rows([run], [str(rows)], prompt="clean")
    (run / "eval-rows" / "rows.json").write_text("{")
    assert evaluate_rows([run], [str(rows)]) == changed
    assert len(loads) == 3


def test_the_file_names_the_weights_and_how_many_adapters_were_merged(run, rows):
    found = evaluate_rows([run], [str(rows)])
    own = {f"adapter-{name}": run / "adapters" / name for name in ("00", "01", "02")} | {"merged": run / "merged"}
    assert found.adapter_digests == {variant: adapter_digest(folder) for variant, folder in own.items()}
    assert found.merged_adapters is None  # there is no merge.json
    shutil.rmtree(run / "merged")
    averaged = evaluate_rows([run], [str(rows)])
    assert averaged.merged_adapters == 3
    assert averaged.adapter_digests.keys() == own.keys() - {"merged"}
    merge_folders([run], run / "merged", leave_out=[run / "adapters" / "01"])
    assert evaluate_rows([run], [str(rows)]).merged_adapters == 2


def written_by_peft(run, rows, folder=None):
    """What follows each row's prompt, greedily, by PEFT and transformers' own `generate`, one row at a time."""
    config = load_config(run / "config.yaml")
    model, tokenizer = load_base(config.model.name, dtype="float32", device=torch.device("cpu"))
    if folder is not None:
        model = peft.PeftModel.from_pretrained(model, folder).eval()
    encoded = encode_rows(
        read_sources([str(rows)]), tokenizer, template=config.data.prompt, max_length=256, learn="last"
    )
    texts = []
    for example in encoded.answers:
        ((start, _),) = example.supervised
        ids = torch.tensor([example.ids[:start]])
        new = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=module.NEW_TOKENS,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
        texts.append(tokenizer.decode(new[0, start:], skip_special_tokens=True))
    return texts


def test_the_texts_in_place_of_answers_are_those_of_peft_row_by_row(run, rows, monkeypatch):
    monkeypatch.setattr(module, "NEW_TOKENS", 12)
    monkeypatch.setattr(module, "TEXTS_PER_BATCH", 3)
    found = evaluate_rows([run], [str(rows)], texts=100)
    losses = {name: sum(values) for name, values in found.adapters.items()}
    assert found.texts.best == min(losses, key=losses.get)
    assert found.texts.variants["base"] == written_by_peft(run, rows)
    assert found.texts.variants["best"] == written_by_peft(run, rows, run / "adapters" / found.texts.best)
    assert found.texts.variants["merged"] == written_by_peft(run, rows, run / "merged")
    assert [answer.strip() for answer in found.texts.answers[1:2]] == ["in the hall in the hall"]
    assert found.texts.prompts[-1].endswith("The hat is made of")
    assert RowLosses.read(run / "eval-rows" / "rows.json") == found
    assert not any(found.texts.right["merged"])
    again = evaluate_rows([run], [str(rows)], texts=2, match="$").texts  # the empty text at the end of both
    assert again.right == {"base": [True] * 2, "best": [True] * 2, "merged": [True] * 2}


def test_texts_are_not_read_for_others(run, rows, monkeypatch):
    monkeypatch.setattr(module, "NEW_TOKENS", 2)
    assert evaluate_rows([run], [str(rows)]).texts is None
    assert len(evaluate_rows([run], [str(rows)], texts=2).texts.answers) == 2
    assert evaluate_rows([run], [str(rows)], texts=2, match="hall").texts.match == "hall"


@pytest.mark.parametrize(
    ("text", "answer", "pattern", "same"),
    [
        (" in the hall\n", "in the hall", None, True),
        ("in the hall.", "in the hall", None, False),
        ("So 3 + 4 = 7. #### 7", "3 and 4 make 7\n#### 7", r"#### (-?\d+)", True),
        ("#### 7 or #### 8", "#### 7", r"#### (-?\d+)", False),  # the last one counts
        ("seven", "#### 7", r"#### (-?\d+)", False),
        ("7", "seven", r"\d", False),
        ("a", "b", r"(x)?[ab]", False),  # the group is not in the match
    ],
)
def test_a_text_matches_an_answer(text, answer, pattern, same):
    assert module.matches(text, answer, pattern and re.compile(pattern)) is same


def test_the_exact_average_stands_for_a_merge_that_is_not_there(run, rows, tmp_path):
    merged = evaluate_rows([run], [str(rows)])
    shutil.move(run / "merged", tmp_path / "merged")
    averaged = evaluate_rows([run], [str(rows)])
    assert (merged.exact_average, averaged.exact_average) == (False, True)
    assert averaged.merged == pytest.approx(merged.merged, abs=2e-3)


def test_adapters_outside_a_run_and_a_model_alone_are_scored(run, rows, tmp_path, tiny_model_dir):
    whole = evaluate_rows([run], [str(rows)])
    one = evaluate_rows([run / "adapters" / "01"], [str(rows)], prompt="bare", out=tmp_path / "one")
    assert one.adapters == {"01": pytest.approx(whole.adapters["01"], abs=2e-3)}
    assert (one.merged, one.ensemble) == (None, None)
    alone = evaluate_rows([tiny_model_dir], [str(rows)], prompt="bare", out=tmp_path / "alone")
    assert alone.base == pytest.approx(whole.base, abs=2e-3)
    assert alone.adapters == {}


def test_rows_that_were_trained_on_are_told(run, rows):
    assert not evaluate_rows([run], [str(rows)]).trained_on
    (run / "run.json").write_text(json.dumps({"data_sha256": {"x": module.sha256_file(rows)}}))
    assert evaluate_rows([run], [str(rows)]).trained_on


def test_rows_in_the_home_folder_are_told_too(run, rows, monkeypatch):
    monkeypatch.setenv("HOME", str(rows.parent))
    (run / "run.json").write_text(json.dumps({"data_sha256": {"x": module.sha256_file(rows)}}))
    assert evaluate_rows([run], [f"~/{rows.name}"]).trained_on


def test_what_two_runs_must_have_in_common_changes_with_rows_and_settings_alone(run, rows):
    found = evaluate_rows([run], [str(rows)])
    shutil.rmtree(run / "merged")
    again = evaluate_rows([run], [str(rows)])
    assert (again.asked, again.measured == found.measured) == (found.asked, False)
    assert evaluate_rows([run], [str(rows)], dtype="bfloat16").asked != found.asked
    rows.write_text(rows.read_text().replace("a", "o"))
    assert evaluate_rows([run], [str(rows)]).asked != found.asked


def test_truncated_rows_are_counted_and_those_without_an_answer_left_out(run, rows):
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("prompt: bare", "prompt: bare\n  max_length: 12"))
    found = evaluate_rows([run], [str(rows)])
    assert found.truncated
    assert found.dropped
    assert len(found.tokens) == len(ROWS) - found.dropped


@pytest.mark.parametrize(
    ("content", "error", "said"),
    [
        (None, RequestError, "--rows"),
        ("", DataError, "no rows"),
        ('{"instruction": "a", "output": "b"}\n{"instruction": 3}', DataError, "row 2"),
        ('{"instruction": "' + "a " * 2000 + '", "output": "b"}', DataError, "no row keeps"),
    ],
)
def test_rows_that_cannot_be_scored_are_refused(run, tmp_path, content, error, said):
    if content is not None:
        (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(error, match=said) as caught:
        evaluate_rows([run], [str(tmp_path / "rows.jsonl")])
    assert "data.skip_bad_rows" not in str(caught.value)
    assert not (run / "eval-rows").exists()


def test_losses_that_are_not_numbers_are_an_error(run, rows, tmp_path, tiny_model_dir):
    write_adapter(adapter(0, tiny_model_dir, size=1e30), tmp_path / "huge")
    with pytest.raises(AdapterError, match="adapter-huge"):
        evaluate_rows([tmp_path / "huge"], [str(rows)], out=tmp_path / "out")


def test_a_request_to_stop_is_heeded(run, rows, monkeypatch):
    original = module.answer_log_probs

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        return original(*args)

    monkeypatch.setattr(module, "answer_log_probs", interrupted)
    with pytest.raises(Interrupted):
        evaluate_rows([run], [str(rows)])
    assert not (run / "eval-rows" / "rows.json").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"texts": 0}, "give 1 to 1,000"),
        ({"texts": 1001}, "give 1 to 1,000"),
        ({"match": "x"}, "add --texts N"),
        ({"texts": 1, "match": "("}, "not a regular expression"),
    ],
)
def test_texts_that_cannot_be_written_are_refused(run, rows, options, said):
    with pytest.raises(RequestError, match=re.escape(said)):
        evaluate_rows([run], [str(rows)], **options)
