"""How to serve an adapter with vLLM or llama.cpp."""

VLLM_RANKS = (16, 32, 64, 128, 256, 320, 512)  # the values that vLLM's --max-lora-rank accepts


def vllm_rank(rank: int) -> int | None:
    """The smallest --max-lora-rank of vLLM for an adapter of this rank; None if it is too large for vLLM."""
    return next((largest for largest in VLLM_RANKS if largest >= rank), None)


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
    largest = vllm_rank(rank)
    if largest is None:
        return [f"vLLM serves ranks up to {VLLM_RANKS[-1]}: merge again with --rank {VLLM_RANKS[-1]} or less"]
    return [
        f"to serve it: vllm serve BASE --enable-lora --max-lora-rank {largest};"
        + (
            " llama.cpp does not serve adapters of embeddings: poc-lora fold makes a plain model of it"
            if embeddings
            else f" llama.cpp's convert_lora_to_gguf.py takes it as it is (one alpha, {rank})"
        )
    ]
