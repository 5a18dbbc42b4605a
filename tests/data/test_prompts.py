"""Prompts, and where on the tokens the answer starts and ends."""

import pytest
from tokenizers import processors

from poc_lora.data.formats import ChatRow, CompletionRow, InstructionRow
from poc_lora.data.prompts import TEMPLATES, encode_rows, render_prompt
from poc_lora.errors import DataError, ModelError
from tests.conftest import build_tokenizer, instruction_rows

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    texts = [row["instruction"] + " " + row["output"] for row in instruction_rows(60)]
    return build_tokenizer([*texts, *["question answer"] * 20])


@pytest.fixture
def fresh_tokenizer():
    return build_tokenizer(["some words to merge into tokens"] * 5)


def encode(tokenizer, *rows, template="clean", max_length=512, learn="last"):
    return encode_rows(rows, tokenizer, template=template, max_length=max_length, learn=learn)


def parts(tokenizer, example):
    """The text of the prompt tokens and of the answer tokens."""
    decode = lambda ids: tokenizer.decode(ids, clean_up_tokenization_spaces=False)  # noqa: E731
    ((start, end),) = example.supervised
    assert end == len(example.ids)
    return decode(example.ids[:start]), decode(example.ids[start:])


def test_braces_in_a_row_are_left_alone():
    prompt = render_prompt("say {input} and {0} {", "{instruction} }", "bare")
    assert prompt == "say {input} and {0} {\n{instruction} }\n"


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_input_section_appears_only_with_an_input(template):
    without, with_input = render_prompt("DO", "", template), render_prompt("DO", "GIVEN", template)
    assert "DO" in without
    assert "GIVEN" in with_input
    assert "{" not in without + with_input
    assert ("### Input" in without, "### Input" in with_input) == (False, template != "bare")


def test_prompt_and_answer_tokens_partition_the_text(tokenizer):
    row = InstructionRow("Which thing is made of wood?", "cup or hat", "the correct answer is cup")
    (example,) = encode(tokenizer, row).examples
    prompt, answer = parts(tokenizer, example)
    assert prompt == "<s>" + render_prompt(row.instruction, row.input, "clean")
    assert answer == row.output + "</s>"


def test_a_token_that_holds_prompt_end_and_answer_start_counts_as_answer(tokenizer):
    row = CompletionRow("quest", "ion")
    whole = tokenizer("question")["input_ids"]
    assert len(whole) < len(tokenizer("quest")["input_ids"]) + len(tokenizer("ion")["input_ids"]) - 1  # they merge
    (example,) = encode(tokenizer, row).examples
    assert list(example.ids) == [*whole, tokenizer.eos_token_id]
    prompt, answer = parts(tokenizer, example)
    assert prompt + answer == "<s>question</s>"
    assert "<s>quest".startswith(prompt)
    assert len(answer) > len("ion</s>")


def test_the_first_token_is_never_an_answer(fresh_tokenizer):
    fresh_tokenizer._tokenizer.post_processor = processors.ByteLevel()
    merged = fresh_tokenizer("some")["input_ids"]
    assert len(merged) == 1  # without BOS, prompt and answer are one token
    (example,) = encode(fresh_tokenizer, CompletionRow("so", "me")).examples
    assert example.supervised == ((1, len(example.ids)),)


def eos_adding(tokenizer):
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return tokenizer


def test_a_tokenizer_that_adds_bos_and_one_that_adds_eos_give_the_same_example(fresh_tokenizer):
    row = CompletionRow("merge into ", "words")
    plain = encode(fresh_tokenizer, row).examples
    assert plain[0].ids[0] == fresh_tokenizer.bos_token_id
    assert encode(eos_adding(fresh_tokenizer), row).examples == plain
    assert plain[0].ids.count(fresh_tokenizer.eos_token_id) == 1


def test_a_tokenizer_without_a_pad_token_is_enough(tokenizer):
    assert tokenizer.pad_token is None
    assert len(encode(tokenizer, CompletionRow("a", "b"), CompletionRow("a longer one", "b")).examples) == 2


def test_rows_at_the_limit_are_whole_and_longer_ones_are_counted(tokenizer):
    row = InstructionRow("Which thing?", "", "the correct answer is answer1")
    (whole,) = encode(tokenizer, row).examples
    size, start = len(whole.ids), whole.supervised[0][0]

    at_limit = encode(tokenizer, row, max_length=size)
    assert (at_limit.examples, at_limit.truncated, at_limit.dropped) == ([whole], 0, 0)

    cut = encode(tokenizer, row, max_length=start + 1)
    assert (cut.truncated, cut.dropped) == (1, 0)
    assert cut.examples[0].ids == whole.ids[: start + 1]

    gone = encode(tokenizer, row, max_length=start)
    assert (gone.examples, gone.truncated, gone.dropped) == ([], 0, 1)


def test_rows_that_lose_their_answer_leave_the_others_in_order(tokenizer):
    long = CompletionRow("word " * 200, "x")
    encoded = encode(tokenizer, CompletionRow("a", "b"), long, CompletionRow("c", "d"), max_length=20)
    assert encoded.dropped == 1
    assert [parts(tokenizer, e)[1] for e in encoded.examples] == ["b</s>", "d</s>"]


def test_a_limit_of_one_token_leaves_no_answer(fresh_tokenizer):
    assert encode(fresh_tokenizer, CompletionRow("a", "b"), max_length=1).dropped == 1


def test_a_chat_follows_the_tokenizers_template_and_learns_its_last_turn(fresh_tokenizer):
    fresh_tokenizer.chat_template = CHAT_TEMPLATE
    turns = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
    row = ChatRow(tuple({"role": role, "content": content} for role, content in turns))
    (example,) = encode(fresh_tokenizer, row).examples
    prompt, answer = parts(fresh_tokenizer, example)
    assert prompt == "<s>[user]one</s>\n[assistant]two</s>\n[user]three</s>\n[assistant]"  # one BOS: the template's
    assert answer == "four</s>"  # one EOS, and not the line end after it


def test_chats_and_other_rows_may_be_mixed(fresh_tokenizer):
    fresh_tokenizer.chat_template = CHAT_TEMPLATE
    chat = ChatRow(({"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}))
    text = CompletionRow("three", " four")
    both = encode(fresh_tokenizer, text, chat, text).examples
    assert both[0] == both[2] == encode(fresh_tokenizer, text).examples[0]
    assert both[1] == encode(fresh_tokenizer, chat).examples[0]


def test_a_chat_that_the_template_refuses_is_named_by_its_row(fresh_tokenizer):
    fresh_tokenizer.chat_template = CHAT_TEMPLATE
    chat = ChatRow(({"role": "system", "content": "one"}, {"role": "assistant", "content": "two"}), where="row 2")
    with pytest.raises(DataError, match="no system role") as caught:
        encode(fresh_tokenizer, CompletionRow("a", "b"), chat)
    assert caught.value.where == "row 2"


def test_a_chat_needs_a_template(fresh_tokenizer):
    chat = ChatRow(({"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}))
    with pytest.raises(ModelError, match="no chat template"):
        encode(fresh_tokenizer, chat)


def test_a_tokenizer_without_eos_is_refused(fresh_tokenizer):
    fresh_tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no EOS"):
        encode(fresh_tokenizer, CompletionRow("a", "b"))


def test_no_rows_at_all_are_refused(tokenizer):
    with pytest.raises(DataError, match="no training rows"):
        encode(tokenizer)


def test_the_llm_adapters_template_has_that_projects_bytes():
    """Its training and evaluation scripts indent by sixteen spaces, and differ at the ends of lines."""
    start, deep = "Below is an instruction that describes a task", " " * 16
    task = "Write a response that appropriately completes the request."
    given = ", paired with an input that provides further context"
    expected = {
        ("training", ""): f"{start}. {task}  \n\n{deep}### Instruction:\n{deep}DO\n{deep}\n{deep}### Response:\n{deep}",
        ("evaluation", ""): f"{start}. {task} \n\n{deep}### Instruction:\n{deep}DO\n\n{deep}### Response:\n{deep}",
        ("training", "GIVEN"): f"{start}{given}. {task} \n\n{deep}### Instruction:\n{deep}DO\n{deep}\n"
        f"{deep}### Input:\n{deep}GIVEN\n{deep}\n{deep}### Response:\n{deep}",
        ("evaluation", "GIVEN"): f"{start}{given}. {task}\n\n{deep}### Instruction:\n{deep}DO\n\n"
        f"{deep}### Input:\n{deep}GIVEN\n\n{deep}### Response:\n{deep}",
    }
    for (purpose, text), prompt in expected.items():
        assert render_prompt("DO", text, "llm-adapters", purpose=purpose) == prompt


@pytest.mark.parametrize(
    "row", [InstructionRow("a " * 2**21, "", "b", where="row 2"), CompletionRow("a", "b" * 2**22, where="row 2")]
)
def test_a_text_that_would_take_the_tokenizer_minutes_is_refused(tokenizer, row, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "__call__", lambda *_, **__: pytest.fail("tokenised"))
    with pytest.raises(DataError, match="4,194,304 are the most") as problem:
        encode(tokenizer, CompletionRow("a", "b"), row)
    assert problem.value.where == "row 2"


@pytest.mark.parametrize("adds_eos", [False, True])
def test_a_row_rendered_beforehand_is_the_chat_that_the_template_renders(fresh_tokenizer, adds_eos):
    """One BOS and one EOS, although the tokenizer would add them to any other text."""
    tokenizer = eos_adding(fresh_tokenizer) if adds_eos else fresh_tokenizer
    tokenizer.chat_template = CHAT_TEMPLATE
    turns = ({"role": "user", "content": "one"}, {"role": "assistant", "content": "two"})
    chat = encode(tokenizer, ChatRow(turns)).examples
    prompt = tokenizer.apply_chat_template(list(turns[:1]), tokenize=False, add_generation_prompt=True)
    assert prompt.startswith("<s>")
    for completion in ("two", "two</s>", "two</s>\n"):
        assert encode(tokenizer, CompletionRow(prompt, completion)).examples == chat
    (bare,) = encode(tokenizer, InstructionRow(prompt.removesuffix("[assistant]"), "", "two"), template="bare").examples
    assert bare.ids[:2] == chat[0].ids[:2]
    mixed = encode(tokenizer, CompletionRow("one", " two"), CompletionRow(prompt, "two")).examples
    assert mixed[1] == chat[0]
    assert [e.ids.count(0) for e in mixed] == [1, 1]
    assert [e.ids.count(1) for e in mixed] == [1, 2]  # the template ends the question with one too


@pytest.mark.parametrize("learn", ["last", "assistant", "all"])
def test_a_text_alone_has_a_loss_on_all_its_tokens(tokenizer, learn):
    (example,) = encode(tokenizer, CompletionRow("", "one two"), learn=learn).examples
    assert example.ids == (0, *tokenizer("one two", add_special_tokens=False)["input_ids"], 1)
    assert example.supervised == ((1, len(example.ids)),)


def test_a_tokenizer_may_add_several_tokens_in_front(fresh_tokenizer):
    fresh_tokenizer.add_special_tokens({"additional_special_tokens": ["[gMASK]"]})
    mask = fresh_tokenizer.convert_tokens_to_ids("[gMASK]")
    fresh_tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="[gMASK] <s> $A", special_tokens=[("[gMASK]", mask), ("<s>", 0)]
    )
    own, given = encode(fresh_tokenizer, CompletionRow("one", " two"), CompletionRow("[gMASK]<s>one", " two")).examples
    assert own == given
    (half,) = encode(fresh_tokenizer, CompletionRow("<s>one", " two")).examples
    assert half.ids[:3] == (mask, 0, 0)  # not what the tokenizer adds, so it stays


def test_a_tokenizer_that_adds_nothing_leaves_a_text_as_it_is(fresh_tokenizer):
    fresh_tokenizer._tokenizer.post_processor = processors.ByteLevel()
    (example,) = encode(fresh_tokenizer, CompletionRow("<s><s>one", " two")).examples
    assert example.ids[:2] == (0, 0)
