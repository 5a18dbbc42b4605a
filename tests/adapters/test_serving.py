"""What is said about serving an adapter, and the limits of servers."""

import re
from datetime import date
from pathlib import Path

import pytest

from poc_lora.adapters.serving import SERVERS, servers_of, serving_advice

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("rank", "words"),
    [
        (2, "--max-lora-rank 8"),
        (9, "--max-lora-rank 16"),
        (256, "--max-lora-rank 256"),
        (300, " 320"),
        (513, "--rank 512"),
    ],
)
def test_serving_advice_names_a_rank_that_vllm_takes(rank, words):
    assert words in " ".join(serving_advice(rank))


@pytest.mark.parametrize(
    ("options", "words"),
    [({"modules_to_save": True}, "modules_to_save: poc-lora fold"), ({"embeddings": True}, "of embeddings only with")],
)
def test_serving_advice_says_what_to_do_with_what_cannot_be_served(options, words):
    assert words in " ".join(serving_advice(8, **options))


def test_llama_cpp_takes_factors_of_embeddings():
    (advice,) = serving_advice(8, embeddings=True)
    assert "convert_lora_to_gguf.py takes it" in advice


@pytest.mark.parametrize(
    ("rank", "left_out"),
    [
        (1, {"Fireworks AI"}),
        (32, set()),
        (64, {"Cloudflare Workers AI"}),
        (128, {"Cloudflare Workers AI", "Fireworks AI"}),
        (513, {"Cloudflare Workers AI", "Fireworks AI", "vLLM"}),
    ],
)
def test_the_servers_of_a_rank_are_those_whose_limits_hold_it(rank, left_out):
    assert {server.name for server in SERVERS} - set(servers_of(rank)) == left_out


def test_the_docs_show_the_limits_as_they_are():
    page = (ROOT / "docs/merging.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| \[([^\]]+)\]\(([^)]+)\) \|", page, flags=re.MULTILINE))
    assert rows == {server.name: server.source for server in SERVERS}
    for server in SERVERS:
        date.fromisoformat(server.checked)
        assert server.checked in page
