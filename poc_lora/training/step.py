"""One optimizer step of a pack: adapters at the same step, trained together on one base model."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from poc_lora import rng
from poc_lora.config import RunConfig
from poc_lora.data.batches import MicroBatch, cut_rows, micro_batches, supervised_tokens
from poc_lora.data.prompts import Example
from poc_lora.devices import without_waiting
from poc_lora.lora.bank import AdapterBank
from poc_lora.models.compilation import compiled_parts, compiles
from poc_lora.models.forward import has_plain_head
from poc_lora.models.recomputation import gradient_checkpointing
from poc_lora.models.sharding import all_reduce_max
from poc_lora.optim.noisy_adamw import NoisyAdamW
from poc_lora.optim.schedules import learning_rate
from poc_lora.training.data import TrainingData
from poc_lora.training.loss import packed_loss
from poc_lora.training.memory import Sizes


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did; lists have an entry per slot [M]."""

    losses: list[float]
    grad_norms: list[float]  # before clipping
    noise_norms: list[float]
    lrs: list[float]
    diverged: list[int]  # slots dropped at this step
    tokens: int
    padded_tokens: int  # the same with padding


class Pack:
    """A bank of adapters that are at the same step, and their optimizer.

    Args:
        config: The run's configuration.
        model: The frozen base model. The bank replaces its target modules until `close`.
        data: Tokenised rows and the order in which each adapter draws them.
        adapters: Ids of the adapters to train together.
        sizes: The micro-batch size, and whether layers are recomputed in the backward pass.
        sharded: Whether ranks share the base model. They must then run it equally often, and stop together.
    """

    def __init__(
        self,
        config: RunConfig,
        model: PreTrainedModel,
        data: TrainingData,
        adapters: Sequence[int],
        *,
        sizes: Sizes,
        sharded: bool = False,
    ):
        self.config, self.model, self.data = config, model, data
        self.sharded = sharded
        self._tokens, self.device = sizes.tokens_per_microbatch, model.device
        self._plain_head = has_plain_head(model)
        self._undo = contextlib.ExitStack()
        if compiles(config.train.compile, model.device):
            self._undo.enter_context(compiled_parts(model))
        if sizes.gradient_checkpointing:
            self._undo.enter_context(gradient_checkpointing(model))
        lora, optim, seed = config.lora, config.optim, config.adapters.seed
        self._own = [config.of_adapter(adapter) for adapter in adapters]
        self.bank = AdapterBank(
            model,
            targets=lora.targets,
            rank=lora.rank,
            alpha=[own.lora.alpha for own in self._own],
            adapters=adapters,
            seed=seed,
            dropout=lora.dropout,
        )
        self.optimizer = NoisyAdamW(
            [
                {"params": [row], "adapter": adapter, "temperature": own.optim.temperature}
                for row, adapter, own in zip(self.bank.rows, adapters, self._own, strict=True)
            ],
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            seed=seed,
            fused=True,
        )

    @property
    def live(self) -> list[int]:
        """Slots of the adapters that have not diverged."""
        return [slot for slot in range(self.bank.size) if slot not in self.bank.dropped]

    def step(self, step: int, stop: Callable[[], bool] = lambda: False) -> StepResult | None:
        """Take optimizer step `step` (from 0) with every live adapter.

        Args:
            step: The number of the step, which keys its rows, dropout and noise.
            stop: Called before every micro-batch; the step is abandoned if it returns True.

        Returns:
            What the step did; None, with nothing changed, if `stop` returned True before all rows had been processed.
        """
        optim, bank = self.config.optim, self.bank
        lrs = [
            learning_rate(
                optim.schedule,
                step,
                peak=own.optim.lr,
                warmup_steps=optim.warmup_steps,
                total_steps=self.data.total_steps,
            )
            for own in self._own
        ]
        for group, lr in zip(self.optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr
        bank.zero_grad()
        accumulated = self._accumulate(step, stop)
        if accumulated is None:
            return None
        losses, tokens, padded_tokens = accumulated
        norms = bank.clip_grad_norm(optim.max_grad_norm)
        self.optimizer.step()
        finite = losses.isfinite() & norms.isfinite() & bank.weights.sum(dim=1).isfinite()
        noise = torch.stack(self.optimizer.noise_norms)
        # The step's only read from the device, which waits for all of its work.
        loss, norm, noise_norm, healthy = torch.stack([losses, norms, noise, finite.float()]).tolist()
        diverged = [slot for slot in self.live if not healthy[slot]]
        for slot in diverged:
            bank.drop(slot)
        return StepResult(loss, norm, noise_norm, lrs, diverged, tokens, padded_tokens)

    def _accumulate(self, step: int, stop: Callable[[], bool]) -> tuple[Tensor, int, int] | None:
        """Add up the gradients of one step's rows, micro-batch by micro-batch; None if `stop` returned True."""
        examples = self.data.train
        rows = [self.data.order.rows(adapter, step) for adapter in self.bank.adapters]
        counts = [sum(supervised_tokens(examples[i]) for i in chosen) for chosen in rows]
        tokens_per_slot = without_waiting(torch.tensor(counts, dtype=torch.float32), self.device)
        losses = torch.zeros_like(tokens_per_slot)
        tokens = padded_tokens = 0
        self.model.eval()  # a base with dropout of its own would draw it from torch's global stream
        for module in self.bank.modules.values():
            module.train()
        parts = 1
        if self.sharded:
            parts, stopping = all_reduce_max([len(cut_rows(examples, rows, tokens=self._tokens)), stop()])
            stop = lambda: bool(stopping)  # noqa: E731  (all ranks stop at the same step)
        for batch in self._micro_batches(examples, rows, at_least=parts):
            if stop():
                return None
            if self.config.lora.dropout:
                self.bank.key_dropout(self._dropout_keys(batch, step))
            loss, per_slot = packed_loss(self.model, batch, tokens_per_slot, plain_head=self._plain_head)
            loss.backward()
            losses += per_slot
            tokens += batch.tokens
            padded_tokens += batch.input_ids.numel()
        return losses, tokens, padded_tokens

    def _micro_batches(
        self, examples: Sequence[Example], rows: Sequence[Sequence[int]], at_least: int = 1
    ) -> Iterator[MicroBatch]:
        return micro_batches(
            examples,
            rows,
            tokens=self._tokens,
            at_least=at_least,
            device=self.device,
        )

    def _dropout_keys(self, batch: MicroBatch, step: int) -> Tensor:
        each = len(batch.examples) // self.bank.size
        owners = [adapter for adapter in self.bank.adapters for _ in range(each)]
        seed = self.config.adapters.seed
        keys = [
            rng.key(seed, adapter, "dropout", step, f"row {example}") - 2**63  # into the range of int64
            for adapter, example in zip(owners, batch.examples, strict=True)
        ]
        return without_waiting(torch.tensor(keys, dtype=torch.int64), self.device)

    @torch.no_grad()
    def row_losses(self, examples: Sequence[Example], stop: Callable[[], bool] = lambda: False) -> list[float] | None:
        """Return the loss of each example, summed over its supervised tokens, of the model that the bank computes now.

        Returns None if `stop`, which is called before every micro-batch, returned True.
        """
        self.model.eval()
        losses = [0.0] * len(examples)
        for batch in self._micro_batches(examples, [range(len(examples))]):
            if all_reduce_max([stop()])[0] if self.sharded else stop():
                return None
            by_row = replace(batch, slot=batch.row)
            ones = torch.ones(len(batch.examples), device=self.device)
            found = packed_loss(self.model, by_row, ones, plain_head=self._plain_head)[1]
            for example, loss in zip(batch.examples, found.tolist(), strict=True):
                losses[example] = loss
        return losses

    def close(self) -> None:
        """Give the base model its own modules back."""
        self.bank.remove()
        self._undo.close()
