"""How to serve an adapter: the ranks that servers take, and commands for vLLM and llama.cpp."""

from typing import NamedTuple

from poc_lora.config import MAX_RANK

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank accepts; newer versions 1 too


class Server(NamedTuple):
    """The ranks that a server takes, as its source says that was read on the day `checked`."""

    name: str
    ranks: range
    source: str
    checked: str


# Services that do not state their limit, such as Together AI and CoreWeave (W&B), are not listed.
SERVERS = (
    Server(
        "vLLM",
        range(1, VLLM_RANKS[-1] + 1),
        "https://github.com/vllm-project/vllm/blob/main/vllm/config/lora.py",
        "2026-11-27",
    ),
    Server("SGLang", range(1, MAX_RANK + 1), "https://docs.sglang.io/docs/advanced_features/lora", "2026-11-27"),
    Server(
        "llama.cpp",
        range(1, MAX_RANK + 1),
        "https://github.com/ggml-org/llama.cpp/blob/master/src/llama-adapter.cpp",
        "2026-11-27",
    ),
    Server("Fireworks AI", range(4, 65), "https://fireworks.ai/docs/fine-tuning/fine-tuned-import", "2026-11-27"),
    Server(
        "Cloudflare Workers AI",
        range(1, 33),
        "https://developers.cloudflare.com/workers-ai/features/fine-tunes/loras",
        "2026-11-27",
    ),
)


def servers_of(rank: int) -> list[str]:
    """Returns the names of the servers that take adapters of this rank."""
    return [server.name for server in SERVERS if rank in server.ranks]


def vllm_command(base: str, rank: int) -> str | None:
    """Returns the command that serves adapters of this rank with vLLM; None for a rank that is too large for vLLM."""
    largest = next((largest for largest in VLLM_RANKS if largest >= rank), None)
    return None if largest is None else f"vllm serve {base} --enable-lora --max-lora-rank {largest}"


def serving_advice(rank: int, *, modules_to_save: bool = False, embeddings: bool = False) -> list[str]:
    """Returns lines on how to serve an adapter as `write_adapter` writes it, or what to do if it cannot be served.

    Args:
        rank: The rank of all its modules.
        modules_to_save: Whether it has parameters of modules_to_save.
        embeddings: Whether it has factors of embeddings.
    """
    if modules_to_save:
        return [
            "vLLM and llama.cpp do not serve adapters with modules_to_save: poc-lora fold makes a plain model of it"
        ]
    command = vllm_command("BASE", rank)
    if command is None:
        return [f"vLLM serves ranks up to {VLLM_RANKS[-1]}: merge again with --rank {VLLM_RANKS[-1]} or less"]
    where = "; of embeddings only with bases whose class allows it" if embeddings else ""
    return [f"to serve it: {command}{where}; llama.cpp's convert_lora_to_gguf.py takes it as it is (one alpha, {rank})"]
