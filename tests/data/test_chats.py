"""Chats through real chat templates (those that TRL ships): which tokens are learnt, and what is refused."""

import json
from importlib import resources

import pytest

from poc_lora.data.formats import parse_row
from poc_lora.data.prompts import encode_rows
from poc_lora.data.rows import BadRows
from poc_lora.errors import DataError
from tests.conftest import build_tokenizer

TEMPLATES = resources.files("trl") / "chat_templates"
ROLES = dict(u="user", a="assistant", s="system", t="tool")
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Looks outside.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "where"}}},
    },
}
ANSWER = {"role": "tool", "tool_call_id": "call_1", "name": "weather", "content": "17 degrees"}
SPECIAL = (
    "<|im_start|> <|im_end|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|end|> <|user|> <|assistant|> "
    "<|start|> <|return|> <|message|> <|channel|> <start_of_turn> <end_of_turn>"
).split()


@pytest.fixture
def tokenizer():
    tokenizer = build_tokenizer(["some words to merge into tokens"] * 5)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    return tokenizer


def turns(*given):
    """("u", "text") or ("a", "text", dict(weight=0))"""
    return [{"role": ROLES[role], "content": text, **(more[0] if more else {})} for role, text, *more in given]


FOUR = turns(("u", "one"), ("a", "two"), ("u", "three"), ("a", "four"))


def use(tokenizer, template, eos=None):
    tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
    tokenizer.eos_token = eos or tokenizer.eos_token
    return tokenizer


def encode(tokenizer, messages, learn, max_length=10_000, **columns):
    row = parse_row({"messages": messages, **columns}, "rows.json, row 1")
    return encode_rows([row], tokenizer, template="clean", max_length=max_length, learn=learn)


def learnt(tokenizer, messages, learn, **columns):
    """The text of each span of tokens with a loss."""
    (example,) = encode(tokenizer, messages, learn, **columns).examples
    return [tokenizer.decode(example.ids[start:end]) for start, end in example.supervised]


def refusal(tokenizer, messages, learn="last", **columns):
    with pytest.raises(DataError) as caught:
        encode(tokenizer, messages, learn, **columns)
    assert caught.value.where == "rows.json, row 1"
    return caught.value


@pytest.mark.parametrize(
    ("template", "eos", "end"),
    [
        ("qwen2_5", "<|im_end|>", "<|im_end|>"),
        ("qwen3_training", "<|im_end|>", "<|im_end|>"),
        ("qwen3_instruct_2507", "<|im_end|>", "<|im_end|>"),
        ("llama3", "<|eot_id|>", "<|eot_id|>"),
        ("llama3_1", "<|eot_id|>", "<|eot_id|>"),
        ("gemma3", "<end_of_turn>", "<end_of_turn>"),
        ("phi3", "</s>", "<|end|>"),  # which writes EOS at the end of a chat, not of a turn
    ],
)
def test_every_turn_of_the_assistant_is_learnt_up_to_its_end(tokenizer, template, eos, end):
    use(tokenizer, template, eos)
    first, last = learnt(tokenizer, FOUR, "assistant")
    assert first.removeprefix("<think>\n\n</think>\n\n") == "two" + end
    assert [last] == learnt(tokenizer, FOUR, "last")
    assert last.removeprefix("<think>\n\n</think>\n\n").startswith("four" + end)
    assert last.endswith(eos)
    assert last.count(eos) == 1
    (everything,) = learnt(tokenizer, FOUR, "all")
    assert "one" in everything


@pytest.mark.parametrize(
    "template", sorted(p.name.removesuffix(".jinja") for p in TEMPLATES.iterdir() if p.name.endswith(".jinja"))
)
def test_the_learnt_turns_are_the_same_as_one_by_one_or_are_refused_by_name(tokenizer, template):
    """The reference: each turn as the last of a chat that ends there."""
    use(tokenizer, template)
    try:
        found = learnt(tokenizer, FOUR, "assistant")
    except DataError as problem:
        known = ("otherwise once others follow", "refuses the row", "does not write 'content'")
        assert any(words in problem.what for words in known)  # noqa: PT017
        assert problem.where == "rows.json, row 1"  # noqa: PT017
        return
    alone = [learnt(tokenizer, FOUR[:n], "last")[0] for n in (2, 4)]
    assert found[1] == alone[1]
    assert found[0].rstrip("\n") in (alone[0], alone[0].removesuffix("</s>").rstrip("\n"))
    assert "one" not in "".join(found)
    assert "three" not in "".join(found)


@pytest.mark.parametrize("template", ["qwen3", "qwen3_6", "gptoss"])
def test_a_template_that_writes_earlier_turns_otherwise_is_refused_with_a_way_out(tokenizer, template):
    use(tokenizer, template, "<|return|>" if template == "gptoss" else "<|im_end|>")
    problem = refusal(tokenizer, FOUR, "assistant")
    assert problem.what.startswith("the place of turn 2 (assistant) cannot be told")
    assert "data.learn: last" in problem.fix
    assert "four" in learnt(tokenizer, FOUR, "last")[0]


def test_a_turn_of_weight_0_is_read_and_not_learnt(tokenizer):
    use(tokenizer, "qwen2_5", "<|im_end|>")
    messages = turns(("u", "one"), ("a", "two", dict(weight=0)), ("u", "three"), ("a", "four", dict(weight=1)))
    assert learnt(tokenizer, messages, "assistant") == ["four<|im_end|>"] == learnt(tokenizer, messages, "last")
    same = encode(tokenizer, messages, "last").examples[0].ids
    assert same == encode(tokenizer, FOUR, "last").examples[0].ids
    messages = turns(("u", "one"), ("a", "two"), ("u", "three"), ("a", "four", dict(weight=0)))
    assert learnt(tokenizer, messages, "assistant") == ["two<|im_end|>"]
    assert encode(tokenizer, messages, "assistant").examples[0].ids == same
    assert "last turn has weight 0" in refusal(tokenizer, messages, "last").what
    problem = refusal(tokenizer, messages, "all")
    assert "turn 4 (assistant) has weight 0" in problem.what
    assert "data.learn: assistant" in problem.fix


def test_a_chat_with_nothing_to_learn_is_refused(tokenizer):
    use(tokenizer, "qwen2_5")
    messages = turns(("u", "one"), ("a", "two", dict(weight=0)))
    assert "nothing is to be learnt" in refusal(tokenizer, messages, "assistant").what
    begun = turns(("a", "hello"), ("u", "one"), ("a", "two"))
    assert "begins with the assistant's turn" in refusal(tokenizer, begun, "assistant").what
    begun[0]["weight"] = 0
    assert learnt(tokenizer, begun, "assistant") == ["two<|im_end|></s>"]


@pytest.mark.parametrize("weight", [0.5, 2, "0", -1])
def test_a_weight_is_0_or_1(tokenizer, weight):
    use(tokenizer, "qwen2_5")
    messages = turns(("u", "one"), ("a", "two", dict(weight=weight)))
    assert "neither 0 nor 1" in refusal(tokenizer, messages, "assistant").what


def test_truncation_clips_what_is_learnt(tokenizer):
    use(tokenizer, "qwen2_5", "<|im_end|>")
    (whole,) = encode(tokenizer, FOUR, "assistant").examples
    (first, second) = whole.supervised
    assert second[1] == len(whole.ids)
    cut = encode(tokenizer, FOUR, "assistant", max_length=second[0] + 1)
    assert cut.examples[0].supervised == (first, (second[0], second[0] + 1))
    cut = encode(tokenizer, FOUR, "assistant", max_length=second[0])
    assert (cut.examples[0].supervised, cut.truncated) == ((first,), 1)
    cut = encode(tokenizer, FOUR, "assistant", max_length=first[1] - 1)
    assert cut.examples[0].supervised == ((first[0], first[1] - 1),)
    gone = encode(tokenizer, FOUR, "assistant", max_length=first[0])
    assert (gone.examples, gone.dropped) == ([], 1)


def test_rows_without_turns_have_one_answer_whatever_is_learnt(tokenizer):
    row = parse_row({"prompt": "some words", "completion": " to merge"}, "")
    last, assistant = (
        encode_rows([row], tokenizer, template="clean", max_length=99, learn=learn).examples
        for learn in ("last", "assistant")
    )
    assert last == assistant


CALLS = [
    *turns(("u", "one"), ("a", "", dict(tool_calls=[CALL]))),
    ANSWER,
    *turns(("a", "two")),
]


def test_tools_and_calls_are_written_by_the_template(tokenizer):
    use(tokenizer, "qwen2_5", "<|im_end|>")
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>'
    assert learnt(tokenizer, CALLS, "assistant", tools=[TOOL]) == [call, "two<|im_end|>"]
    assert learnt(tokenizer, CALLS[:2], "last", tools=json.dumps([TOOL])) == [call]
    (whole,) = learnt(tokenizer, CALLS, "all", tools=[TOOL])
    assert "Looks outside." in whole
    assert "17 degrees" in whole


def test_arguments_are_text_for_templates_that_take_text(tokenizer):
    use(tokenizer, "deepseekv3")
    assert '{"city": "Paris"}' in learnt(tokenizer, CALLS[:2], "last")[0]


@pytest.mark.parametrize(
    ("template", "messages", "columns", "what", "fix"),
    [
        ("llama3", FOUR, dict(tools=[TOOL]), "does not write the row's tools", "{tools: null}"),
        ("llama3", CALLS, {}, "does not write 'tool_calls' of turn 2 (assistant)", "{messages.tool_calls: null}"),
        ("phi3", [*FOUR[:2], ANSWER, *FOUR[2:]], {}, "does not write 'content' of turn 3 (tool)", "take it out"),
        (
            "llama3_1",
            [FOUR[0], {**CALLS[1], "content": "let me see"}, *CALLS[2:]],
            {},
            "does not write 'content' of turn 2 (assistant)",
            "take it out",
        ),
        (
            "llama3",
            [*FOUR[:3], {**FOUR[3], "reasoning_content": "count on"}],
            {},
            "does not write 'reasoning_content' of turn 4 (assistant)",
            "{messages.reasoning_content: null}",
        ),
        ("qwen2_5", [{**FOUR[0], "name": "Ann"}, *FOUR[1:]], {}, "does not write 'name' of turn 1 (user)", "null"),
        ("qwen2_5", [*FOUR[:3], {**FOUR[3], "train": False}], {}, "does not write 'train' of turn 4", "null"),
        ("qwen2_5", [*FOUR[:3], {**FOUR[3], "function_call": CALL}], {}, "'function_call' of turn 4", "null"),
    ],
)
def test_what_the_template_does_not_write_is_refused_by_name(tokenizer, template, messages, columns, what, fix):
    use(tokenizer, template)
    problem = refusal(tokenizer, messages, **columns)
    assert what in problem.what
    assert fix in problem.fix


def test_the_second_of_two_calls_counts_too(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
        "{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    assert learnt(tokenizer, CALLS[:2], "last") == ["weather</s>"]
    twice = [CALLS[0], {**CALLS[1], "tool_calls": [CALL, {"name": "time", "arguments": {}}]}]
    assert "does not write 'tool_calls' of turn 2" in refusal(tokenizer, twice).what


def test_reasoning_is_written_where_the_template_writes_it(tokenizer):
    use(tokenizer, "qwen3", "<|im_end|>")
    messages = [FOUR[0], {**FOUR[1], "reasoning_content": "one and one"}, FOUR[2], FOUR[3]]
    assert "one and one" in learnt(tokenizer, messages[:2], "last")[0]
    # The template takes earlier reasoning out of a chat that goes on, as where the model is used.
    assert "one and one" not in learnt(tokenizer, messages, "all")[0]


def test_a_learnt_turn_that_the_template_cuts_is_refused(tokenizer):
    thinking = turns(("u", "one"), ("a", "<think>one and one</think>two"))
    use(tokenizer, "qwen3", "<|im_end|>")
    assert "one and one" in learnt(tokenizer, thinking, "last")[0]
    use(tokenizer, "deepseek_r1_distill")
    problem = refusal(tokenizer, thinking)
    assert "leaves out a part of the content of turn 2 (assistant)" in problem.what
    assert "<think>" in problem.fix


def test_metadata_of_turns_is_let_through(tokenizer):
    use(tokenizer, "qwen2_5", "<|im_end|>")
    messages = [{**turn, "id": i, "timestamp": "now"} for i, turn in enumerate(FOUR)]
    assert learnt(tokenizer, messages, "last") == ["four<|im_end|>"]


def test_every_turn_is_checked_wherever_it_stands(tokenizer):
    """What was found about one turn is kept for those of its kind only."""
    use(tokenizer, "phi3")
    fine = parse_row({"messages": FOUR}, "row 1")
    lost = parse_row({"messages": [*FOUR[:2], ANSWER, *FOUR[2:]]}, "row 2")
    bad = BadRows()
    encoded = encode_rows([fine, lost, fine, lost], tokenizer, template="clean", max_length=999, bad=bad)
    assert len(encoded.examples) == 2
    assert [problem.where for problem in bad.first] == ["row 2", "row 2"]


def test_a_prompt_that_the_whole_chat_does_not_begin_with_is_refused(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{% if not (messages[-1].role == 'assistant' and loop.index0 == 0) %}<p>{% endif %}"
        "[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    for learn in ("last", "all"):
        problem = refusal(tokenizer, FOUR, learn)
        assert "writes the turns before it otherwise than in its prompt" in problem.what
        assert "data.learn: last" not in problem.fix
