"""How to serve an adapter with vLLM or llama.cpp."""

VLLM_RANKS = (16, 32, 64, 128, 256, 320, 512)  # the values that vLLM's --max-lora-rank accepts


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
    return [
        f"to serve it: {command};"
        + (
            " llama.cpp does not serve adapters of embeddings: poc-lora fold makes a plain model of it"
            if embeddings
            else f" llama.cpp's convert_lora_to_gguf.py takes it as it is (one alpha, {rank})"
        )
    ]
