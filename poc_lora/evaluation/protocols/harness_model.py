"""A loaded model for lm-eval. Importing this module imports lm-eval, which is optional."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from poc_lora.errors import RequestError
from poc_lora.models.load import context_length
from poc_lora.models.vocabulary import embedding_rows, require_embeddings

BATCH_SIZE = 16  # rows
TOKENS_PER_BATCH = 8192  # of log-likelihoods: lm-eval computes the logits of every token, twice
UNLIMITED = 2**40  # tokens, where the model's config states no limit: lm-eval would take 2048


class LoadedModel(HFLM):  # type: ignore[misc, unused-ignore]
    """lm-eval's Hugging Face model around a loaded one, so that lm-eval scores the variant that a bank computes.

    Logits have the model's dtype, so in bfloat16 some labels tie. Log-probabilities are computed and summed in float32;
    otherwise many more would.

    Args:
        tokenizer: Is copied, since lm-eval adds a pad token.
        on_progress: Called with 1 after every answer and with 0 before every batch; what it raises ends the scoring.

    Attributes:
        truncated: Requests that were cut on the left to fit the context, as (task, document).
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, on_progress: Callable[[int], object]
    ):
        super().__init__(
            pretrained=model,
            backend="causal",
            tokenizer=copy.deepcopy(tokenizer),
            max_length=context_length(model) or UNLIMITED,
            batch_size=BATCH_SIZE,
            softmax_dtype=torch.float32,
        )
        if self.tokenizer.pad_token_id >= embedding_rows(model):  # prompts of differing lengths are padded
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.truncated: set[tuple[str, int]] = set()
        self._on_progress = on_progress
        self._requests: list[Any] = []
        self.set_cache_hook(self)  # there is no cache; lm-eval calls its hook, `add_partial`, after every answer

    def add_partial(self, *_: Any) -> None:
        self._on_progress(1)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        self._requests = requests
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        self._requests = []  # a text is cut into windows, which all fit
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        for request in requests:
            context, settings = request.args
            room = self.max_length - self.new_tokens(request.task_name, settings)
            ids = self.tok_encode(context)
            require_embeddings(self.model, self.tokenizer, [ids], where=request.task_name)
            if len(ids) > room:
                self.truncated.add((request.task_name, request.doc_id))
        return super().generate_until(requests, disable_tqdm=True)

    def new_tokens(self, task: str, settings: dict[str, Any]) -> int:
        """The most tokens that a task generates. Raises RequestError if they leave no room for a prompt."""
        count = int(normalize_gen_kwargs(settings, self.max_gen_toks)["max_gen_toks"])
        if count >= self.max_length:
            what = f"the task generates up to {count:,} tokens, and the base's context has {self.max_length:,}"
            raise RequestError(what, where=task, fix="leave it out, or set its max_gen_toks in a task of your own")
        return count

    def _loglikelihood_tokens(self, requests: list[tuple[Any, list[int], list[int]]], **_: Any) -> Any:
        ids = [[*context, *continuation] for _, context, continuation in requests]
        where = self._requests[0].task_name if self._requests else "the text"
        require_embeddings(self.model, self.tokenizer, ids, where=where)
        if self._requests:
            for request, tokens in zip(self._requests, ids, strict=True):
                if len(tokens) > self.max_length + 1:  # the last token is not run
                    self.truncated.add((request.task_name, request.doc_id))
        longest = min(max(map(len, ids)), self.max_length)
        self.batch_size_per_gpu = max(1, min(BATCH_SIZE, TOKENS_PER_BATCH // longest))
        try:
            return super()._loglikelihood_tokens(requests, disable_tqdm=True)
        finally:
            self.batch_size_per_gpu = BATCH_SIZE

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
        """Encode without the EOS that some tokenizers add: it would stand between context and label."""
        ids: list[int] = super().tok_encode(string, *args, **kwargs)
        return ids[:-1] if self._has_added_eos(ids, string) else ids

    def tok_batch_encode(self, strings: list[str], **options: Any) -> tuple[Tensor, Tensor]:
        ids, mask = super().tok_batch_encode(strings, **options)  # padded on the left
        ends = self._has_added_eos(ids[0].tolist(), strings[0])
        return (ids[:, :-1], mask[:, :-1]) if ends else (ids, mask)

    def _has_added_eos(self, ids: list[int], string: str) -> bool:
        """Whether the tokenizer added the EOS at the end: a text may end with one too, as chat templates write it."""
        before = ids[:-1]  # which a truncation on the left may have cut
        if ids[-1:] != [self.tokenizer.eos_token_id]:
            return False
        own = self.tokenizer.encode(string, add_special_tokens=False)[-len(before) :] if before else []
        return before[len(before) - len(own) :] == own

    def _model_call(self, inps: Tensor, *_: Any, **__: Any) -> Any:
        self._on_progress(0)
        with torch.no_grad():
            return self.model(input_ids=inps, use_cache=False).logits

    def _model_generate(self, context: Tensor, *args: Any, **settings: Any) -> Any:
        self._on_progress(0)
        return super()._model_generate(context, *args, **settings)
