"""What serving a written adapter takes: advice for vLLM and llama.cpp."""

VLLM_RANKS = (16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank may be


def serving_advice(rank: int) -> list[str]:
    """How to serve an adapter of a uniform rank, as `write_adapter` writes it, or what to do where it is too large."""
    fitting = [largest for largest in VLLM_RANKS if largest >= rank]
    if not fitting:
        return [f"vLLM serves ranks up to {VLLM_RANKS[-1]}: merge again with --rank {VLLM_RANKS[-2]} or less"]
    return [
        f"to serve it: vllm serve BASE --enable-lora --max-lora-rank {fitting[0]};"
        f" llama.cpp's convert_lora_to_gguf.py takes it as it is (one alpha, {rank})"
    ]
