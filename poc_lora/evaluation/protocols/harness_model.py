"""A loaded model for lm-eval. Importing this module imports lm-eval, which is optional."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from poc_lora.models.load import context_length
from poc_lora.models.vocabulary import require_embeddings

BATCH_SIZE = 16  # rows; lm-eval computes logits for every token of a batch
UNLIMITED = 2**40  # tokens, where the model's config states no limit: lm-eval would take 2048


class LoadedModel(HFLM):  # type: ignore[misc, unused-ignore]
    """lm-eval's Hugging Face model around a loaded one, so that lm-eval scores the variant that a bank computes.

    Logits have the model's dtype, so in bfloat16 some labels tie. Log-probabilities are computed and summed in float32;
    otherwise many more would.

    Args:
        tokenizer: Is copied, since lm-eval adds a pad token.
        on_answer: Called after every request.

    Attributes:
        truncated: Requests that were cut on the left to fit the context, as (task, document).
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, on_answer: Callable[[], object]):
        super().__init__(
            pretrained=model,
            backend="causal",
            tokenizer=copy.deepcopy(tokenizer),
            max_length=context_length(model) or UNLIMITED,
            batch_size=BATCH_SIZE,
            softmax_dtype=torch.float32,
        )
        self.truncated: set[tuple[str, int]] = set()
        self._on_answer = on_answer
        self._requests: list[Any] = []
        self.set_cache_hook(self)  # there is no cache; lm-eval calls its hook, `add_partial`, after every answer

    def add_partial(self, *_: Any) -> None:
        self._on_answer()

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        self._requests = requests
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: list[tuple[Any, list[int], list[int]]], **options: Any) -> Any:
        ids = ([*context, *continuation] for _, context, continuation in requests)
        require_embeddings(self.model, self.tokenizer, ids, where="--data")
        for request, (_, context, continuation) in zip(self._requests, requests, strict=True):
            if len(context) + len(continuation) > self.max_length + 1:  # the last token is not run
                self.truncated.add((request.task_name, request.doc_id))
        return super()._loglikelihood_tokens(requests, **options)

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
        """Encode without the EOS that some tokenizers add: it would stand between context and label."""
        ids: list[int] = super().tok_encode(string, *args, **kwargs)
        return ids[:-1] if ids[-1:] == [self.tokenizer.eos_token_id] else ids

    def _model_call(self, inps: Tensor, *_: Any, **__: Any) -> Any:
        with torch.no_grad():
            return self.model(input_ids=inps, use_cache=False).logits
