"""Three ways to train the same adapters on the same rows, one optimizer step at a time, so that they can take turns.

Packed    this library: all adapters in one pack.
Loop      a bare PyTorch loop over PEFT, adapter after adapter.
InTrainer transformers.Trainer over PEFT, adapter after adapter.

In step s every side trains adapter j on the rows that `Work.data.order` gives it at step s, with fused AdamW, the same
learning rate, clipping and attention kernels; padding is up to the same multiple of tokens. With a bfloat16 base on a
GPU the baselines run under autocast. All sides share the base's weights.
"""

import contextlib
import copy
import gc
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from poc_lora.config import RunConfig
from poc_lora.data.batches import PAD_MULTIPLE
from poc_lora.lora.bank import resolve_targets
from poc_lora.training.data import TrainingData
from poc_lora.training.memory import Sizes
from poc_lora.training.step import Pack, StepResult


@dataclass(frozen=True)
class Work:
    """What every side is given."""

    config: RunConfig
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase  # of which the baselines' collator needs the pad token
    data: TrainingData
    sizes: Sizes  # of packed; all adapters are one pack

    @property
    def adapters(self) -> range:
        return range(self.config.adapters.count)

    @property
    def autocast(self) -> bool:
        return self.model.device.type == "cuda" and self.model.dtype == torch.bfloat16

    def batch(self, adapter: int, step: int) -> list[dict[str, list[int]]]:
        """The rows of one adapter in one step, as Trainer takes them."""
        return [self._row(i) for i in self.data.order.rows(adapter, step)]

    def _row(self, number: int) -> dict[str, list[int]]:
        example = self.data.train[number]
        ids, labels = list(example.ids), [-100] * len(example.ids)
        for start, end in example.supervised:
            labels[start:end] = ids[start:end]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}

    def tokens(self, step: int) -> int:
        """The tokens of a step over all adapters, without padding."""
        rows = (i for adapter in self.adapters for i in self.data.order.rows(adapter, step))
        return sum(len(self.data.train[i].ids) for i in rows)

    def collator(self) -> DataCollatorForSeq2Seq:
        return DataCollatorForSeq2Seq(self.tokenizer, pad_to_multiple_of=PAD_MULTIPLE)


class Packed:
    def __init__(self, work: Work, steps: int):
        # Baselines change the model's modules too, so that each side has modules of its own.
        self._pack = Pack(work.config, shared_copy(work.model), work.data, list(work.adapters), sizes=work.sizes)
        self.done: list[StepResult] = []

    def step(self, number: int) -> None:
        if result := self._pack.step(number):
            self.done.append(result)

    def close(self) -> None:
        self._pack.close()


class Loop:
    def __init__(self, work: Work, steps: int):
        self._work, self._collate = work, work.collator()
        self._trained = [self._trainable(adapter) for adapter in work.adapters]

    def _trainable(self, adapter: int) -> tuple[PeftModel, list[torch.nn.Parameter], torch.optim.Optimizer]:
        model, optim = peft_model(self._work, adapter), self._work.config.optim
        parameters = [p for p in model.parameters() if p.requires_grad]
        return model, parameters, torch.optim.AdamW(parameters, optim.lr, weight_decay=optim.weight_decay, fused=True)

    def step(self, number: int) -> None:
        work = self._work
        device = work.model.device
        for adapter, (model, parameters, optimizer) in zip(work.adapters, self._trained, strict=True):
            batch = {k: v.to(device) for k, v in self._collate(work.batch(adapter, number)).items()}
            with torch.autocast(device.type, torch.bfloat16, enabled=work.autocast):
                loss = model(**batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, work.config.optim.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()

    def close(self) -> None:
        self._trained.clear()


class InTrainer:
    """Each adapter's Trainer runs in a thread of its own, which waits while it is not its turn."""

    def __init__(self, work: Work, steps: int):
        self._threads = [TrainerThread(work, adapter, steps) for adapter in work.adapters]

    def step(self, number: int) -> None:
        for thread in self._threads:
            thread.take_turn()

    def close(self) -> None:
        for thread in self._threads:
            thread.end()
        self._threads.clear()


class TrainerThread(TrainerCallback):
    """A Trainer that takes a step, from drawing the batch on, whenever it gets a turn."""

    def __init__(self, work: Work, adapter: int, steps: int):
        self._work, self._adapter, self._steps = work, adapter, steps
        self._go, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._problem: BaseException | None = None
        self._thread = threading.Thread(target=self._train, daemon=True)
        self._thread.start()
        self._wait()

    def take_turn(self) -> None:
        self._go.release()
        self._wait()

    def end(self) -> None:
        self._go.release()
        self._thread.join()

    def _wait(self) -> None:
        self._paused.acquire()
        if self._problem:
            raise RuntimeError("Trainer failed") from self._problem

    def _train(self) -> None:
        try:
            with tempfile.TemporaryDirectory() as folder:
                self._trainer(folder).train()
        except BaseException as problem:  # raised again where the turn was given
            self._problem = problem
        self._paused.release()

    def _trainer(self, folder: str) -> Trainer:
        work, cuda = self._work, self._work.model.device.type == "cuda"
        optim = work.config.optim
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=self._steps,
            per_device_train_batch_size=work.config.train.batch_size,
            train_sampling_strategy="sequential",
            learning_rate=optim.lr,
            weight_decay=optim.weight_decay,
            max_grad_norm=optim.max_grad_norm,
            optim="adamw_torch_fused",
            bf16=work.autocast,
            use_cpu=not cuda,
            dataloader_pin_memory=cuda,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        rows = [row for step in range(self._steps) for row in work.batch(self._adapter, step)]
        model = peft_model(work, self._adapter)
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=work.collator())
        trainer.remove_callback(PrinterCallback)  # it prints to stdout
        trainer.add_callback(self)
        return trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._pause()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._pause()

    def _pause(self) -> None:
        self._paused.release()
        self._go.acquire()


SIDES: dict[str, Callable[[Work, int], Any]] = {"packed": Packed, "loop": Loop, "trainer": InTrainer}
BASELINES = ("trainer", "loop")


def peft_model(work: Work, adapter: int) -> PeftModel:
    """A fresh PEFT adapter on the base's weights, with modules of its own."""
    config = work.config
    lora = LoraConfig(
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,  # type: ignore[arg-type]
        lora_dropout=config.lora.dropout,
        target_modules=list(resolve_targets(work.model, config.lora.targets)),
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(adapter)
    model: PeftModel = get_peft_model(shared_copy(work.model), lora)
    if config.train.gradient_checkpointing is True:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def shared_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the modules with the same tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


@contextlib.contextmanager
def training(side: str, work: Work, steps: int) -> Iterator[Any]:
    """Within the block, a side that takes up to `steps` steps; its memory is free afterwards."""
    free_memory()
    trained = SIDES[side](work, steps)
    try:
        yield trained
    finally:
        trained.close()
        del trained
        free_memory()


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
