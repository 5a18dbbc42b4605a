"""Generated answers against transformers run on one question at a time, without padding or packing."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from poc_lora.adapters.adapter import Adapter
from poc_lora.adapters.factors import Factors
from poc_lora.data.prompts import render_prompt
from poc_lora.data.questions import Question
from poc_lora.evaluation.protocols import generate
from poc_lora.evaluation.protocols.generate import NEW_TOKENS, first_label, generate_answers
from poc_lora.lora.bank import AdapterBank

TARGET = "model.layers.0.self_attn.q_proj"
LABELS = ("glass", "dark wood", "wool")
QUESTIONS = [
    Question(f"Which {'old ' * (5 * i)}thing? Answer format: {'/'.join(LABELS)}", "", LABELS, "wool") for i in range(5)
]


@pytest.fixture
def model(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()


@pytest.fixture
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


def alone(model, tokenizer, question, beams):
    ids = tokenizer(render_prompt(question.instruction, "", "clean"), return_tensors="pt")["input_ids"]
    if ids[0, -1] == tokenizer.eos_token_id:
        ids = ids[:, :-1]
    settings = GenerationConfig(
        max_new_tokens=NEW_TOKENS, num_beams=beams, do_sample=False,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    with torch.no_grad():
        written = model.generate(input_ids=ids, generation_config=settings)
    return tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("beams", [1, 3])
def test_padding_and_packing_change_no_text(model, tokenizer, beams, monkeypatch):
    monkeypatch.setattr(generate, "TOKENS_PER_BATCH", 600)
    draws = torch.Generator().manual_seed(0)
    adapters = [
        Adapter({TARGET: Factors(torch.randn(2, 32, generator=draws), 0.5 * torch.randn(32, 2, generator=draws))})
        for _ in range(2)
    ]
    bank = AdapterBank.from_adapters(model, adapters)
    found = generate_answers(model, tokenizer, QUESTIONS, prompt="clean", beams=beams, copies=2)
    for slot in range(2):
        with bank.only(slot):
            expected = [alone(model, tokenizer, question, beams) for question in QUESTIONS]
        assert [answer.text for answer in found[slot]] == expected
    assert found[0] != found[1]


def test_a_bases_own_ways_of_generating_are_not_used(model, tokenizer):
    (before,) = generate_answers(model, tokenizer, QUESTIONS, prompt="clean")
    model.generation_config.do_sample, model.generation_config.temperature = True, 5.0
    model.generation_config.repetition_penalty, model.generation_config.no_repeat_ngram_size = 1.5, 2
    model.generation_config.min_new_tokens = NEW_TOKENS
    theirs = model.generation_config
    assert generate_answers(model, tokenizer, QUESTIONS, prompt="clean") == [before]
    assert model.generation_config is theirs


def test_a_prompt_that_leaves_no_room_for_an_answer_is_marked(model, tokenizer):
    room = model.config.max_position_embeddings
    long = Question("wood " * room + "Answer format: a/b", "", ("a", "b"), "a")
    (found,) = generate_answers(model, tokenizer, [QUESTIONS[0], long], prompt="clean")
    assert [answer.too_long for answer in found] == [False, True]
    assert found[1].choice is None
    assert found[0].text is not None


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("the correct answer is answer2", "answer2"),
        ("answer10 or answer1", "answer10"),
        ("answer3 answer1", "answer1"),  # which the question does not offer
        ("Answer1", None),
        ("", None),
    ],
)
def test_the_first_of_the_questions_own_labels_is_read(text, choice):
    assert first_label(text, ("answer1", "answer2", "answer10")) == choice
