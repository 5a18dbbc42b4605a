"""Which tokens a base model has an embedding of: a tokenizer may know more, such as a [PAD] that was added to it."""

from collections.abc import Iterable, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from poc_lora.errors import ModelError


def embedding_rows(model: PreTrainedModel) -> int:
    """The number of tokens that the base model has an embedding of."""
    embeddings: Any = model.get_input_embeddings()  # type: ignore[no-untyped-call, unused-ignore]
    return int(embeddings.weight.shape[0])


def may_exceed(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer knows a token without an embedding."""
    return max(tokenizer.get_vocab().values(), default=0) >= embedding_rows(model)


def require_embeddings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Iterable[Sequence[int]], *, where: str
) -> None:
    """Raise ModelError, which names the token, if rows of token ids hold one without an embedding."""
    size = embedding_rows(model)
    largest = max((max(row, default=0) for row in rows), default=0)
    if largest >= size:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise ModelError(
            f"token {largest}, {token!r}, is beyond the base model's {size} embeddings",
            where=where,
            fix="take it out of the rows, take the base model's own tokenizer, or save the base with more embeddings "
            "(model.resize_token_embeddings)",
        )
