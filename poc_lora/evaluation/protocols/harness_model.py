"""A loaded model as lm-eval sees it. Importing this module imports lm-eval, which is optional."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from poc_lora.models.load import context_length

UNLIMITED = 2**40  # tokens, where the model's config states no limit: lm-eval would take 2048


class LoadedModel(HFLM):
    """lm-eval's Hugging Face model around one that is already loaded, as it is at the time of each call.

    So a bank's views show lm-eval one adapter at a time. Logits are rounded as the model rounds them: in bfloat16 some
    labels tie. Their log-probabilities are taken and summed in float32, else many more would. Requests that were cut on
    the left to fit the context are noted in `shortened`, as (task, document). advance: called with 1 for every request
    answered.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        advance: Callable[[int], object] = lambda requests: None,
    ):
        super().__init__(
            pretrained=model,
            backend="causal",
            tokenizer=copy.deepcopy(tokenizer),  # it will be given a pad token
            max_length=context_length(model) or UNLIMITED,
            batch_size=batch_size,
            softmax_dtype=torch.float32,
        )
        self.shortened: set[tuple[str, int]] = set()
        self._advance = advance
        self._asked: list[Any] = []
        self.set_cache_hook(self)  # there is no cache; the hook is told of every answer

    def add_partial(self, *_: Any) -> None:
        self._advance(1)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        self._asked = requests
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        for asked, (_, context, continuation) in zip(self._asked, requests, strict=True):
            if len(context) + len(continuation) > self.max_length + 1:  # the last token is not run
                self.shortened.add((asked.task_name, asked.doc_id))
        return super()._loglikelihood_tokens(requests, **options)

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
        """Without the EOS that some tokenizers end every text with: it would stand between context and label."""
        ids: list[int] = super().tok_encode(string, *args, **kwargs)
        return ids[:-1] if ids[-1:] == [self.tokenizer.eos_token_id] else ids

    def _model_call(self, inps: Tensor, *_: Any, **__: Any) -> Tensor:
        with torch.no_grad():
            return self.model(input_ids=inps, use_cache=False).logits
