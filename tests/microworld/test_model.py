"""The shipped base model is small, complete, and can read every word of the benchmarks."""

import pytest
from microworld.benchmarks import OPTIONS, benchmark
from microworld.world import SPLITS, World

from poc_lora.microworld import MODEL_DIR

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(MODEL_DIR)


def test_only_the_model_its_tokenizer_and_its_card_are_shipped():
    files = {p.name for p in MODEL_DIR.iterdir()}
    assert files == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"}
    assert (MODEL_DIR / "model.safetensors").stat().st_size <= 5 * 2**20


def test_the_model_has_at_most_two_million_parameters():
    assert transformers.AutoModelForCausalLM.from_pretrained(MODEL_DIR).num_parameters() <= 2_000_000


def test_a_word_is_a_token(tokenizer):
    ids = tokenizer("the correct answer is wood", add_special_tokens=False)["input_ids"]
    assert len(ids) == 5
    assert tokenizer.decode(ids) == "the correct answer is wood"


def test_every_benchmark_word_is_known_and_every_label_is_one_token(tokenizer):
    world = World(0)
    for name in OPTIONS:
        for split in SPLITS:
            for row in benchmark(world, name, split):
                assert tokenizer.unk_token_id not in tokenizer(row["instruction"] + " " + row["output"])["input_ids"]
                labels = row["instruction"].rsplit("Answer format: ", 1)[1].split("/")
                ids = [tokenizer(" " + label, add_special_tokens=False)["input_ids"] for label in labels]
                assert all(len(i) == 1 for i in ids)
                assert len({i[0] for i in ids}) == len(labels)
