"""Chat templates that loop, grow, crash or fail: an error of ours, in bounded time and memory."""

import os
import resource
import time
from datetime import datetime

import psutil
import pytest

from poc_lora.data import bounded
from poc_lora.data.bounded import map_bounded
from poc_lora.data.formats import ChatRow, InstructionRow
from poc_lora.data.prompts import encode_rows
from poc_lora.data.rows import BadRows
from poc_lora.errors import DataError, ModelError
from tests.conftest import build_tokenizer

TURNS = ({"role": "user", "content": "one"}, {"role": "assistant", "content": "two"})
PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
PLAIN += "{% if add_generation_prompt %}[assistant]{% endif %}"


@pytest.fixture
def tokenizer():
    return build_tokenizer(["some words to merge into tokens"] * 5)


def encode(tokenizer, template, rows=3, **options):
    tokenizer.chat_template = template
    chats = [ChatRow(TURNS, where=f"row {number}") for number in range(1, rows + 1)]
    return encode_rows(chats, tokenizer, template="clean", max_length=100, **options)


@pytest.mark.parametrize(
    "broken",
    [
        "{{ 1 / 0 }}",
        "{{ 'a' + 1 }}",
        "{{ messages.nothing.more }}",
        "{% include 'other' %}",
        "{% import 'os' as os %}",
        "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
        "{{ raise_exception('no') }}",
        "{{ messages[5].content }}",
        "{% for x in 5 %}{% endfor %}",
        "{{ ''.__class__.__mro__ }}",
        "{{ range(10**9) }}",
        "{{ " + "(" * 500 + ")" * 500 + " }}",
        "{{ 'a' * 10**11 }}",
    ],
)
def test_a_template_that_fails_in_any_way_is_an_error_that_names_the_row(tokenizer, broken):
    with pytest.raises(DataError, match="chat template"):
        encode(tokenizer, broken, rows=1)
    bad = BadRows()
    with pytest.raises(DataError, match="2 rows cannot be used"):
        encode(tokenizer, broken, rows=2)
    assert not encode(tokenizer, broken, rows=2, bad=bad).examples
    assert bad.count == 2


@pytest.mark.parametrize("broken", ["{% endfor %}", "{{ messages | nothing }}"])
def test_a_template_that_is_not_valid_jinja_is_refused_whole(tokenizer, broken):
    with pytest.raises(ModelError, match="not valid Jinja: line 1: "):
        encode(tokenizer, broken, rows=2, bad=BadRows())


@pytest.mark.parametrize(
    "endless",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% set x = a %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}",
        "{{ (10 ** 10) ** (10 ** 9) }}",  # one call of C, which no signal of Python's ends
    ],
)
def test_a_template_that_does_not_end_is_stopped(tokenizer, endless, monkeypatch):
    monkeypatch.setattr(bounded, "SECONDS_PER_ROW", 1.0)
    before, began = set(psutil.Process().children()), time.monotonic()
    with pytest.raises(ModelError, match=r"chat template took too long \(row 1\)") as problem:
        encode(tokenizer, endless)
    assert time.monotonic() - began < 10
    assert "data.chat_template" in problem.value.fix
    assert set(psutil.Process().children()) <= before  # nothing goes on


def test_all_rows_together_have_a_limit_too(tokenizer, monkeypatch):
    monkeypatch.setattr(bounded, "SECONDS", 1.0)
    with pytest.raises(ModelError, match="took too long"):
        list(map_bounded(lambda row: time.sleep(0.2), range(100)))


@pytest.mark.parametrize("size", ["x ~ x", "x + x", "x | replace('a', 'aa')", "[x, x] | join"])
def test_a_template_that_doubles_a_text_fills_no_memory(tokenizer, size, monkeypatch):
    monkeypatch.setattr(bounded, "MEMORY", 2**28)
    grown = "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set x = ns.x %}{% set ns.x = SIZE %}{% endfor %}"
    with pytest.raises((DataError, ModelError), match="chat template"):
        encode(tokenizer, grown.replace("SIZE", size))
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 2**22  # kB


def test_a_crash_is_an_error(tokenizer):
    with pytest.raises(ModelError, match=r"crashed \(row 2\)"):
        list(map_bounded(lambda row: row or os._exit(139), [1, 0, 1]))


def test_results_and_errors_come_in_order_with_all_their_words():
    def half(row):
        if row % 2:
            raise DataError(f"{row} is odd", where="a\nb", fix="double it")
        return row // 2

    first, second, third = map_bounded(half, [2, 3, 4])
    assert (first, third) == (1, 2)
    assert (second.what, second.where, second.fix) == ("3 is odd", "a\\nb", "double it")
    assert list(map_bounded(half, [])) == []


def test_chats_among_other_rows_are_in_their_places_and_see_the_time_of_the_run(tokenizer):
    tokenizer.chat_template = "{{ strftime_now('%Y') }}" + PLAIN
    rows = [InstructionRow("a", "", "b"), ChatRow(TURNS), InstructionRow("c", "", "d"), ChatRow(TURNS)]
    found = encode_rows(rows, tokenizer, template="bare", max_length=100, now=datetime(1984, 1, 1))
    texts = [tokenizer.decode(example.ids) for example in found.examples]
    assert [text.startswith("1984[user]one") for text in texts] == [False, True, False, True]
