"""Label scores against a plain log-likelihood of every option, run alone."""

import copy
import math

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from poc_lora.data.prompts import render_prompt
from poc_lora.data.questions import Question
from poc_lora.errors import DataError
from poc_lora.evaluation.protocols import label
from poc_lora.evaluation.protocols.label import ANSWER_PREFIX, prepare, score_labels
from poc_lora.models.load import context_length

NUMBERED = ("answer1", "answer2", "answer3", "answer4")
WORDS = ("glass", "dark wood", "wool")
PREFIXES = ("answer1", "answer10", "answer")  # each is the start of another in tokens
SETS = (NUMBERED, WORDS, ("true", "false"), PREFIXES)


def questions(n=14):
    return [
        Question(
            f"Which thing is made of wood? {'It is old. ' * (i % 5)}", "in the hall" * (i % 3 == 0), labels, labels[1]
        )
        for i, labels in ((i, SETS[i % len(SETS)]) for i in range(n))
    ]


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return LlamaForCausalLM.from_pretrained(tiny_model_dir).eval()


@pytest.fixture
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


@torch.no_grad()
def plain(model, tokenizer, question, template="clean"):
    """log p(everything after the tokens that all labels share), one full forward pass per option."""
    context = render_prompt(question.instruction, question.input, template) + ANSWER_PREFIX
    sequences = [tokenizer(f"{context} {label}")["input_ids"] for label in question.labels]
    sequences = [s[:-1] if s[-1] == tokenizer.eos_token_id else s for s in sequences]
    shared = 0
    while all(len(s) > shared + 1 for s in sequences) and len({s[shared] for s in sequences}) == 1:
        shared += 1
    scores = []
    for s in sequences:
        log_probs = model(torch.tensor([s])).logits[0].log_softmax(-1)
        scores.append(sum(log_probs[i - 1, s[i]].item() for i in range(shared, len(s))))
    return scores


def check(model, tokenizer, scores, asked):
    for i, question in enumerate(asked):
        k = len(question.labels)
        # float32 sums of at most ten tokens, in another order of the same matrix products
        assert scores[i, :k].tolist() == pytest.approx(plain(model, tokenizer, question), abs=2e-4)
        assert scores[i, k:].eq(-math.inf).all()


@pytest.mark.parametrize("tokens_per_batch", [1, 300, 100_000])
def test_scores_equal_the_plain_log_likelihood_in_any_batching(model, tokenizer, tokens_per_batch, monkeypatch):
    monkeypatch.setitem(label.TOKENS_PER_BATCH, "cpu", tokens_per_batch)
    asked = questions()
    prepared = prepare(asked, tokenizer, prompt="clean")
    scores = score_labels(model, prepared)
    assert scores.shape == (1, len(asked), 4)
    check(model, tokenizer, scores[0], asked)


def test_the_labels_of_the_fixture_are_of_one_token_and_of_several(tokenizer):
    """What the comparison above rests on."""
    rows = [prepare([Question("Which?", "", s, s[0])], tokenizer, prompt="clean").rows for s in SETS]
    assert rows[0] == 1  # one forward pass for answer1..answer4
    assert max(rows) > 1


@pytest.mark.parametrize("template", ["<s> $A </s>", "$A </s>", "$A"])
def test_bos_and_eos_of_the_tokenizer_are_handled(model, tokenizer, template):
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    asked = questions(6)
    assert (tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id) == template.endswith("</s>")
    scores = score_labels(model, prepare(asked, tokenizer, prompt="clean"))
    check(model, tokenizer, scores[0], asked)


def test_a_tokenizer_that_puts_spaces_into_words_is_scored_alike(model):
    """As SentencePiece models do: "▁answer1" is another token than "answer1", and BOS comes first."""
    texts = [f"{q.instruction} {' '.join(q.labels)} {ANSWER_PREFIX}" for q in questions()]
    inner = Tokenizer(models.Unigram())
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    inner.train_from_iterator([*texts, render_prompt("", "x", "clean")], trainer)
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    assert len(tokenizer) <= model.config.vocab_size
    lengths = {label: len(tokenizer(label)["input_ids"]) for labels in SETS for label in labels}
    assert len(set(lengths.values())) > 1  # labels of one token and of several
    asked = questions()
    scores = score_labels(model, prepare(asked, tokenizer, prompt="clean"))[0]
    check(model, tokenizer, scores, asked)


def test_copies_are_scored_adapter_major(model, tokenizer, monkeypatch):
    asked = questions(9)
    prepared = prepare(asked, tokenizer, prompt="clean")
    alone = score_labels(model, prepared)
    seen = []

    def second_half_louder(_, __, hidden):
        seen.append(hidden.shape[0])
        half = hidden.shape[0] // 2
        return torch.cat([hidden[:half], hidden[half:] * 3])

    hook = model.model.embed_tokens.register_forward_hook(second_half_louder)
    monkeypatch.setitem(label.TOKENS_PER_BATCH, "cpu", 500)
    both = score_labels(model, prepared, copies=2)
    hook.remove()
    triple = model.model.embed_tokens.register_forward_hook(lambda _, __, hidden: hidden * 3)
    second = score_labels(model, prepared)
    triple.remove()
    assert all(rows % 2 == 0 for rows in seen)
    torch.testing.assert_close(both[0], alone[0], atol=2e-4, rtol=0)
    torch.testing.assert_close(both[1], second[0], atol=2e-4, rtol=0)
    assert not torch.allclose(both[0][:, :2], both[1][:, :2], atol=1e-2)


def test_a_prompt_beyond_the_context_is_marked_and_the_others_are_scored(model, tokenizer):
    asked = questions(6)
    asked[2] = Question("wood " * 300, "", NUMBERED, "answer1")
    prepared = prepare(asked, tokenizer, prompt="clean", max_length=context_length(model))
    assert prepared.too_long.tolist() == [False, False, True, False, False, False]
    scores = score_labels(model, prepared)[0]
    assert scores[2].eq(-math.inf).all()
    check(model, tokenizer, scores[[0, 1, 3, 4, 5]], asked[:2] + asked[3:])


def test_a_row_that_just_fits_is_scored(model, tokenizer):
    question = Question("Which?", "", NUMBERED, "answer1")
    length = int(prepare([question], tokenizer, prompt="clean").starts[-1])
    assert not prepare([question], tokenizer, prompt="clean", max_length=length).too_long.any()
    none_left = prepare([question], tokenizer, prompt="clean", max_length=length - 1)
    assert none_left.too_long.all()
    assert score_labels(model, none_left).eq(-math.inf).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_labels_do_not_tie_by_the_rounding_of_a_narrow_dtype(model, tokenizer, dtype):
    """A head whose logits are all about 20: in bfloat16 there they are 1/8 apart, in float16 1/64."""
    narrow = copy.deepcopy(model).to(dtype)
    head = nn.Linear(narrow.lm_head.in_features, narrow.lm_head.out_features, dtype=dtype)
    head.weight.data, head.bias.data[:] = narrow.lm_head.weight.data / 50, 20.0
    narrow.lm_head = head
    asked = [Question(f"Which thing {i}?", "", NUMBERED, "answer1") for i in range(40)]
    prepared = prepare(asked, tokenizer, prompt="clean")
    before = head(torch.ones(1, head.in_features, dtype=dtype))
    scores = score_labels(narrow, prepared)[0]
    assert all(len(set(row)) == len(NUMBERED) for row in scores.tolist())
    assert head(torch.ones(1, head.in_features, dtype=dtype)).equal(before)  # in its own dtype again
    states = []
    hook = head.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
    with torch.no_grad():
        narrow(
            tokenizer(
                f"{render_prompt('Which thing 3?', '', 'clean')}{ANSWER_PREFIX} answer", return_tensors="pt"
            ).input_ids
        )
    hook.remove()
    logits = states[0][0, -1].float() @ head.weight.float().T + head.bias.float()
    tokens = [tokenizer(f"{ANSWER_PREFIX} {label}")["input_ids"][-1] for label in NUMBERED]
    # The hidden state is in the narrow dtype and was computed in a batch of another shape.
    torch.testing.assert_close(scores[3] - scores[3].mean(), logits[tokens] - logits[tokens].mean(), atol=5e-3, rtol=0)


def test_labels_that_the_tokenizer_cannot_tell_apart_are_an_error(tokenizer):
    inner = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    few = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    with pytest.raises(DataError, match="cannot tell the labels 'oui' and 'non' apart"):
        prepare([Question("a", "", ("a", "oui", "non"), "non")], few, prompt="clean")


def test_what_all_rows_share_at_the_start_is_run_once(model, tokenizer, monkeypatch):
    prepared = prepare(questions(), tokenizer, prompt="clean")
    monkeypatch.setitem(label.TOKENS_PER_BATCH, "cpu", 400)
    run = []
    hook = model.model.embed_tokens.register_forward_hook(lambda _, inputs, __: run.append(inputs[0].numel()))
    with_prefix = score_labels(model, prepared)
    short = sum(run)
    run.clear()
    monkeypatch.setattr(label, "MIN_PREFIX", 10_000)
    without = score_labels(model, prepared)
    hook.remove()
    torch.testing.assert_close(with_prefix, without, atol=1e-4, rtol=0)
    assert short < 0.8 * sum(run)
