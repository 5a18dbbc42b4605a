"""What `check` shows before a run: a row with its loss mask, lengths, the learning rate in words, and warnings."""

import json

import pytest
import torch

from poc_lora.data.prompts import Example
from poc_lora.models.load import load_tokenizer
from poc_lora.optim.schedules import learning_rate
from poc_lora.training.check import check
from poc_lora.training.preview import (
    MAX_CHARACTERS,
    MAX_PIECES,
    learning_rate_in_words,
    lengths_in_words,
    row_preview,
    unknown_tokens,
)
from tests.conftest import instruction_rows
from tests.training.conftest import config

CPU = torch.device("cpu")


def warnings_of(run):
    """But for that on repeated rows, of which the fixture's file has many."""
    return [found for found in check(run, device=CPU)["warnings"] if "the same as training rows" not in found]


@pytest.fixture
def tokenizer(tiny_model_dir):
    return load_tokenizer(str(tiny_model_dir))


def test_a_row_is_shown_with_what_has_a_loss(settings):
    shown = check(config(settings, data__learn="last"), device=CPU)["a row"]
    prompt, answer = shown
    assert prompt.startswith("  no loss ")
    assert "'<s>Please choose: " in prompt
    assert answer.startswith("> loss ")
    assert "the correct answer is answer" in answer
    assert answer.endswith("</s>'")
    (start, whole) = check(config(settings, data__learn="all"), device=CPU)["a row"]
    assert start == "  no loss     1 tokens  '<s>'"
    assert "Please choose: " in whole
    assert whole.endswith("</s>'")


def test_the_row_with_the_most_answers_is_shown_part_by_part(tokenizer):
    ids = tuple(tokenizer("one two\nthree \x1b[2J four")["input_ids"])
    n = len(ids)
    rows = [Example(ids, ((1, n),)), Example(ids, ((2, 3), (5, 6))), Example(ids[:3], ((1, 2), (2, 3)))]
    lines = row_preview(rows, tokenizer)
    assert [line[:10] for line in lines] == ["  no loss ", "> loss    ", "  no loss ", "> loss    ", "  no loss "]
    shown = "".join(line.partition("'")[2].removesuffix("'") for line in lines)
    assert shown == "<s>one two\\nthree \\x1b[2J four"  # quoted: no line break, no escape of a terminal


def test_a_long_row_is_shown_in_part(tokenizer):
    ids = tuple(tokenizer("word " * 5000)["input_ids"])
    lines = row_preview([Example(ids, tuple((i, i + 1) for i in range(1, 400, 2)))], tokenizer)
    assert len(lines) == MAX_PIECES + 1
    assert lines[-1].startswith("  and ")
    assert lines[-1].endswith(" more parts")
    (only,) = row_preview([Example(ids, ((0, len(ids)),))], tokenizer)
    assert len(only) < MAX_CHARACTERS + 100
    assert "characters ...]" in only


def test_lengths_are_told_before_truncation():
    told = lengths_in_words(list(range(1, 101)), 64)
    assert told == "median 50, 90 % up to 90, 99 % up to 99, longest 100; data.max_length is 64"
    assert lengths_in_words([7], 64).startswith("median 7, 90 % up to 7, 99 % up to 7, longest 7;")


def test_unknown_tokens_are_counted(tokenizer):
    rows = [Example((0, 5, 6, 5), ((1, 4),))]
    assert unknown_tokens(rows, tokenizer) is None  # a tokenizer of bytes
    tokenizer.unk_token = tokenizer.convert_ids_to_tokens(5)
    assert unknown_tokens(rows, tokenizer) == 0.5


@pytest.mark.parametrize(
    ("changes", "steps", "words"),
    [
        ({}, 100, "rises to 0.0001 in 10 steps, then falls linearly to 0 after step 100"),
        ({}, 5, "starts at 0.0001, then falls linearly to 0 after step 5"),
        ({"schedule": "constant"}, 2000, "rises to 0.0001 in 100 steps, then stays there up to step 2000"),
        (
            {"vary": {"optim.lr": [1e-4, 3e-4, 1e-4]}},
            100,
            "rises to 0.0001, 0.0003 by adapter in 10 steps, then falls linearly to 0 after step 100",
        ),
        ({"warmup_steps": 100}, 12, "rises from step 1 to the last, 12, where it is 11% of 0.0001"),
    ],
)
def test_the_learning_rate_is_told_in_words(settings, changes, steps, words):
    vary = changes.pop("vary", {})
    told = config(settings | {"optim": changes}, adapters__vary=vary)
    assert learning_rate_in_words(told, steps) == words
    if "warmup_steps" in changes:
        assert learning_rate("linear", 11, peak=1e-4, warmup_steps=100, total_steps=12) == pytest.approx(1.1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"data__max_length": 45}, "48 of 60 rows are cut at 45 tokens, 24 of them without"),
        ({"optim__warmup_steps": 100}, "the learning rate reaches only 5% of optim.lr: warm-up takes 100 steps and"),
        (
            {"train__batch_size": 50},
            "54 training rows are fewer than one step of all adapters takes (3 times 50)",
        ),
        ({"data__validation": 0}, "no rows are held out"),
    ],
)
def test_what_wastes_a_run_is_warned_of(settings, train_file, changes, words):
    found = warnings_of(config(settings, **changes))
    assert len(found) == (words is not None)
    assert words is None or found[0].startswith(words)


def test_held_out_rows_that_are_trained_on_too_are_warned_of(settings, train_file):
    (warning,) = check(config(settings), device=CPU)["warnings"]  # every row of the file stands there twice
    assert warning.startswith("6 of 6 held-out rows are the same as training rows")
    train_file.write_text(json.dumps([{"instruction": f"Where is {i}?", "output": "here"} for i in range(60)]))
    assert not check(config(settings), device=CPU)["warnings"]


def test_rows_that_lose_their_whole_answer_are_warned_of(settings, train_file):
    rows = [*instruction_rows(50), *({"instruction": "word " * 200, "output": "yes"} for _ in range(3))]
    train_file.write_text(json.dumps(rows))
    (warning,) = warnings_of(config(settings))
    assert warning.startswith("3 of 53 rows are cut at 128 tokens, 3 of them without any answer and left out: ")
    assert "(the longest row has " in warning


def test_unknown_text_is_warned_of(settings, monkeypatch):
    monkeypatch.setattr("poc_lora.training.check.unknown_tokens", lambda *_: 0.125)
    facts = check(config(settings), device=CPU)
    assert facts["unknown tokens"] == "12.50%"
    assert facts["warnings"][0].startswith("12.5% of all tokens stand for text that the base's tokenizer does not know")


def test_by_default_rows_are_as_long_as_the_base_can_read_and_at_most_2048(settings, monkeypatch):
    assert check(config(settings, data__max_length="auto"), device=CPU)["tokens of a row"].endswith(" is 256")
    monkeypatch.setattr("poc_lora.training.check.context_length", lambda model: 131_072)
    assert check(config(settings, data__max_length="auto"), device=CPU)["tokens of a row"].endswith(" is 2,048")
    monkeypatch.setattr("poc_lora.training.check.context_length", lambda model: None)
    assert check(config(settings, data__max_length="auto"), device=CPU)["tokens of a row"].endswith(" is 2,048")
