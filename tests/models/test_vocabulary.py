"""Tokens without an embedding are refused by name before anything runs, and padding needs no token."""

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from poc_lora.data.questions import Question
from poc_lora.errors import ModelError
from poc_lora.evaluation.answers import Item
from poc_lora.evaluation.evaluator import Protocol
from poc_lora.evaluation.protocols.generate import generate_answers
from poc_lora.models.vocabulary import embedding_rows, may_exceed, require_embeddings

QUESTION = Question("Which? Answer format: wood/wool", "", ("wood", "wool"), "wool")


@pytest.fixture
def loaded(padded_model_dir):
    model = AutoModelForCausalLM.from_pretrained(padded_model_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(padded_model_dir)
    assert tokenizer.pad_token_id == embedding_rows(model)
    return model, tokenizer


def test_a_token_without_an_embedding_is_named_before_evaluation(loaded):
    model, tokenizer = loaded
    assert may_exceed(model, tokenizer)
    item = Item("boolq", "test", 1, Question("[PAD]? Answer format: wood/wool", "", ("wood", "wool"), "wool"))
    labels = Item("boolq", "test", 1, Question("Which? Answer format: [PAD]/b", "", ("[PAD]", "b"), "b"))
    fine = Item("boolq", "test", 1, QUESTION)
    for name in ("label", "generate"):
        Protocol(name, "bare").require_embeddings(model, tokenizer, [fine])
        with pytest.raises(ModelError, match=r"'\[PAD\]', is beyond"):
            Protocol(name, "bare").require_embeddings(model, tokenizer, [fine, item])
    with pytest.raises(ModelError, match=r"'\[PAD\]', is beyond"):
        Protocol("label", "bare").require_embeddings(model, tokenizer, [labels])


def test_generation_pads_without_it(loaded, tiny_model_dir):
    model, tokenizer = loaded
    own = AutoTokenizer.from_pretrained(tiny_model_dir)
    questions = [QUESTION, Question("Which old thing? Answer format: wood/wool", "", ("wood", "wool"), "wool")]
    assert generate_answers(model, tokenizer, questions, prompt="bare") == generate_answers(
        model, own, questions, prompt="bare"
    )


def test_rows_within_the_table_pass(loaded):
    model, tokenizer = loaded
    require_embeddings(model, tokenizer, [[], [embedding_rows(model) - 1]], where="rows")
