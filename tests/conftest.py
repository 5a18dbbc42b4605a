"""What tests share: a tiny random Llama with its tokenizer, made afresh, and rows to train on."""

import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# A model of any family with Llama's names for its parts.
SMALL = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    initializer_range=0.2,
)
QUESTIONS = [
    f"Which thing is made of {m} and kept in the {p}?" for m in ("wood", "glass", "wool") for p in ("shed", "hall")
]


def instruction_rows(n: int) -> list[dict[str, str]]:
    """Rows in the LLM-Adapters format, of differing lengths."""
    rows = []
    for i in range(n):
        padding = " It is old." * (i % 5)
        question = QUESTIONS[i % len(QUESTIONS)] + padding
        text = f"Please choose: {question} Answer1: cup Answer2: hat\n\nAnswer format: answer1/answer2"
        label = f"answer{1 + i % 2}"
        rows.append({"instruction": text, "input": "", "output": f"the correct answer is {label}", "answer": label})
    return rows


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer as Llama 3's, which adds BOS, with no pad token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def build_llama(vocab_size: int, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocab_size,
        max_position_embeddings=256,
        initializer_range=0.2,  # large enough that logits differ between tokens
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory):
    """A saved two-layer Llama and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = build_tokenizer([row["instruction"] + " " + row["output"] for row in instruction_rows(60)])
    build_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def padded_model_dir(tiny_model_dir, tmp_path):
    """The same with a [PAD] token that it has no embedding of, as many models on the Hub."""
    folder = tmp_path / "padded"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    LlamaForCausalLM.from_pretrained(tiny_model_dir).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_llama():
    """A frozen two-layer Llama with random weights."""
    return build_llama(vocab_size=97).requires_grad_(False)


@pytest.fixture
def train_file(tmp_path):
    """A file of 60 instruction rows."""
    path = tmp_path / "train.json"
    path.write_text(json.dumps(instruction_rows(60)))
    return path
