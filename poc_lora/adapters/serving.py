"""What serving a written adapter takes: advice for vLLM and llama.cpp."""

VLLM_RANKS = (16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank may be


def vllm_rank(rank: int) -> int | None:
    """The --max-lora-rank to give vLLM for an adapter of that rank; None where it takes none so large."""
    return next((largest for largest in VLLM_RANKS if largest >= rank), None)


def serving_advice(rank: int, *, whole: bool = False, embeddings: bool = False) -> list[str]:
    """How to serve an adapter of a uniform rank, as `write_adapter` writes it, or what to do where it cannot be.

    whole: it holds parameters of modules trained whole; embeddings: factors of embeddings.
    """
    if whole:
        return [
            "vLLM and llama.cpp take no adapter with modules trained whole: poc-lora fold makes a plain model of it"
        ]
    largest = vllm_rank(rank)
    if largest is None:
        return [f"vLLM serves ranks up to {VLLM_RANKS[-1]}: merge again with --rank {VLLM_RANKS[-1]} or less"]
    return [
        f"to serve it: vllm serve BASE --enable-lora --max-lora-rank {largest};"
        + (
            " llama.cpp takes no factors of embeddings: poc-lora fold makes a plain model of it"
            if embeddings
            else f" llama.cpp's convert_lora_to_gguf.py takes it as it is (one alpha, {rank})"
        )
    ]
