"""A random model of one shape on one device, and three ways to train adapters of it, measured on the same rows.

packed trains 8 adapters over steps 0, 1, ... of their batches. trainer and loop train one adapter, in turn over the
very batches that packed gives to each of the 8 in those steps. Every side goes through these rows once to warm up, then
`passes` times measured; Trainer's own start and end lie outside. All have the same model, rank, batch size, optimizer
(fused AdamW), learning rate, clipping, attention kernels and padding; trainer and loop run under autocast. What differs
is the library.

Per side: tokens_per_s without padding, computed_per_s with it; tflops, of 4 operations per weight of the base and token
that is not padding, so that what checkpointing computes again does not count; host_share, the seconds that threads of
this process computed in one of the clock; the peak of allocated and of reserved memory. Of packed also the memory that
Footprint predicts from the shape alone.
"""

import contextlib
import statistics
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import train as bench
from peft import PeftModel
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity
from torch.profiler import profile as Profiler
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.models.llama import modeling_llama

from poc_lora.data.batches import PAD_MULTIPLE
from poc_lora.fusion import fusing
from poc_lora.models.forward import without_cudnn_attention
from poc_lora.models.load import default_device
from poc_lora.training.memory import Footprint, Sizes
from poc_lora.training.step import Pack

ADAPTERS, BATCH, STEPS, TOKENS = 8, 16, 2, 4096
CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
Batch = list[dict[str, list[int]]]
Facts = dict[str, Any]


class Shape:
    """A random Llama of the shape `name`, made once, and the work on it."""

    def __init__(self, name: str, *, passes: int = 2, adapters: int = ADAPTERS, batch: int = BATCH, steps: int = STEPS):
        self.passes = passes
        words = ["--shape", name, "--adapters", str(adapters), "--batch", str(batch), "--steps", str(steps)]
        # Sizes are given, so that nothing is chosen here by what memory is free.
        words += [f"train.tokens_per_microbatch={TOKENS}", f"adapters.per_device={adapters}"]
        arguments = bench.parse_arguments([*words, "train.gradient_checkpointing=false"])
        device, began = default_device(), time.monotonic()
        self.work = bench.random_work(arguments, bench.run_config(arguments), device)
        bench.synchronise(device)
        model: Any = self.work.model
        self._folder = tempfile.TemporaryDirectory()  # for the model's config.json
        self._footprints: dict[tuple[Any, ...], Footprint] = {}
        self.parameters = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
        self.made = {
            "made_s": round(time.monotonic() - began, 1),
            "weights_gb": round(sum(p.nbytes for p in model.parameters()) / 1e9, 2),
        }

    def packed(
        self,
        *,
        tokens: int = TOKENS,
        checkpointing: bool = False,
        compile: bool = False,
        cudnn: bool = False,
        dropout: float = 0.0,
        liger: bool = False,
        quantization: str | None = None,
        profile: Path | None = None,
    ) -> Facts:
        """All adapters in one pack.

        liger: Liger's norms, rotary embedding and gated activations in place of compiled ones; the loss is compiled.
        quantization: of the model as it is now. profile: a file for the kernels of one step, which take the place of
        the rates.
        """
        work = self._work(checkpointing=checkpointing, compile=compile, dropout=dropout)
        predicted = self._predicted(work, Sizes(tokens, len(work.adapters), checkpointing), quantization)
        steps = [0] if profile else [*range(work.steps)] * self.passes
        measured = Measured(work.model.device, profile)
        with (
            sdpa_kernel(CUDNN_FIRST, set_priority=True) if cudnn else without_cudnn_attention(),
            liger_parts(work.model) if liger else contextlib.nullcontext(),
        ):
            pack = Pack(
                work.config,
                work.model,
                work.data,
                list(work.adapters),
                sizes=Sizes(tokens, len(work.adapters), checkpointing),
            )
            try:
                began = time.monotonic()
                for step in range(work.steps):
                    pack.step(step)
                first = time.monotonic() - began
                measured.start()
                done = [result for step in steps if (result := pack.step(step))]
                measured.stop()
            finally:
                pack.close()
        rates = self._rates(measured, len(steps), sum(s.tokens for s in done), sum(s.padded_tokens for s in done))
        return rates | {
            "loss": round(statistics.mean(done[-1].losses), 3),
            "grad_norm": round(max(done[-1].grad_norms), 4),
            "first_pass_s": round(first, 2),
            "predicted_gb": round(predicted / 1e9, 1),
        }

    def alone(self, side: str, *, checkpointing: bool = False, profile: Path | None = None) -> Facts:
        """One adapter by `trainer` or `loop`, whose batches are a step of packed's. profile: as for `packed`."""
        work, batches = self._work(checkpointing=checkpointing), self.batches()
        chosen = batches[: len(work.adapters)] if profile else batches * self.passes
        measured = Measured(work.model.device, profile)
        train = {"trainer": train_with_trainer, "loop": train_in_loop}[side]
        with without_cudnn_attention(), bench.peft_model(work, 0) as model:
            train(work, model, batches, chosen, measured)
        real = sum(len(row["input_ids"]) for batch in chosen for row in batch)
        computed = sum(collator(work)(batch)["input_ids"].numel() for batch in chosen)
        return self._rates(measured, len(chosen) // len(work.adapters), real, computed)

    def batches(self) -> list[Batch]:
        """The rows of packed's steps, batch by batch: those of each adapter in the first step, then in the next."""
        work, rows = self.work, self.work.rows()
        return [
            [rows[i] for i in work.data.order.rows(adapter, step)]
            for step in range(work.steps)
            for adapter in work.adapters
        ]

    def _work(self, *, checkpointing: bool, compile: bool = False, dropout: float = 0.0) -> bench.Work:
        config = self.work.config
        train = config.train.model_copy(update={"compile": compile, "gradient_checkpointing": checkpointing})
        lora = config.lora.model_copy(update={"dropout": dropout})
        return replace(self.work, config=config.model_copy(update={"train": train, "lora": lora}))

    def _predicted(self, work: bench.Work, sizes: Sizes, quantization: str | None) -> int:
        """Bytes by Footprint, which reads the shape from a folder; takes seconds, once for each way."""
        key = (sizes.gradient_checkpointing, quantization, work.config.train.compile, work.config.lora.dropout)
        if key not in self._footprints:
            folder = self._folder.name
            work.model.config.save_pretrained(folder)
            section = work.config.model.model_copy(update={"name": folder, "quantization": quantization})
            config = work.config.model_copy(update={"model": section})
            self._footprints[key] = Footprint(config, work.model.device, longest=work.data.longest)
        return self._footprints[key].memory(sizes).total

    def _rates(self, measured: "Measured", steps: int, real: int, computed: int) -> Facts:
        """steps: of packed, or as many rows, that were measured; `real` of their `computed` tokens are not padding."""
        if measured.profile:
            return measured.kernels
        seconds = measured.seconds
        return {
            "tokens_per_s": round(real / seconds),
            "computed_per_s": round(computed / seconds),
            "tflops": round(4 * self.parameters * real / seconds / 1e12, 1),
            "step_s": round(seconds / steps, 3),
            "host_share": round(measured.host / seconds, 2),
            **measured.memory,
        }


class Measured:
    """The measured part of a training, from `start` to `stop`, and the memory from the making of this object on.

    seconds: of the clock. host: seconds that this process's threads computed. profile: a file for a table of kernels.
    """

    def __init__(self, device: torch.device, profile: Path | None):
        self.device, self.profile = device, profile
        self.seconds = self.host = 0.0
        self.kernels: Facts = {}
        self.memory: Facts = {}
        self._profiler = Profiler(activities=[ProfilerActivity.CUDA])
        bench.free_memory()  # what the one before left reserved
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._retries = torch.cuda.memory_stats(device)["num_alloc_retries"]

    def start(self) -> None:
        bench.synchronise(self.device)
        if self.profile:
            self._profiler.start()
        self.seconds, self.host = -time.monotonic(), -time.process_time()

    def stop(self) -> None:
        bench.synchronise(self.device)
        self.seconds += time.monotonic()
        self.host += time.process_time()
        if self.device.type == "cuda":
            self.memory = {
                "peak_gb": round(torch.cuda.max_memory_allocated(self.device) / 1e9, 2),
                "reserved_gb": round(torch.cuda.max_memory_reserved(self.device) / 1e9, 2),
                "retries": torch.cuda.memory_stats(self.device)["num_alloc_retries"] - self._retries,
            }
        if self.profile:
            self._profiler.stop()
            averages = self._profiler.key_averages()
            table = averages.table(sort_by="self_cuda_time_total", row_limit=45, max_name_column_width=90)
            self.profile.write_text(table)
            kernels = [row for row in averages if row.device_type == DeviceType.CUDA]
            kernels.sort(key=lambda row: -row.self_device_time_total)
            self.kernels = {
                "wall_s": round(self.seconds, 3),
                "gpu_busy_s": round(sum(row.self_device_time_total for row in kernels) / 1e6, 3),
                "top_ms": {row.key[:70]: round(row.self_device_time_total / 1e3, 1) for row in kernels[:15]},
            }


def train_in_loop(
    work: bench.Work, model: PeftModel, warm: Sequence[Batch], chosen: Sequence[Batch], measured: Measured
) -> None:
    """A bare loop over batches, the first `warm` to warm up."""
    optim, device, collate = work.config.optim, work.model.device, collator(work)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=optim.lr, weight_decay=optim.weight_decay, fused=True)
    for number, rows in enumerate([*warm, *chosen]):
        if number == len(warm):
            measured.start()
        batch = {name: tensor.to(device) for name, tensor in collate(rows).items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=work.autocast):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, optim.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    measured.stop()


def train_with_trainer(
    work: bench.Work, model: PeftModel, warm: Sequence[Batch], chosen: Sequence[Batch], measured: Measured
) -> None:
    """transformers.Trainer over batches, the first `warm` to warm up."""
    optim, cuda = work.config.optim, work.model.device.type == "cuda"
    rows = [row for batch in (*warm, *chosen) for row in batch]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=len(warm) + len(chosen),
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
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator(work))
        trainer.remove_callback(PrinterCallback)  # it prints to stdout
        trainer.add_callback(AtSteps({len(warm): measured.start, len(warm) + len(chosen): measured.stop}))
        trainer.train()


class AtSteps(TrainerCallback):
    """Calls functions after steps of Trainer, counted from 1."""

    def __init__(self, calls: dict[int, Callable[[], None]]):
        self.calls = calls

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self.calls.get(state.global_step, lambda: None)()


@contextlib.contextmanager
def liger_parts(model: PreTrainedModel) -> Iterator[None]:
    """Within the block, a Llama has Liger's RMSNorm, rotary embedding and SwiGLU, and the loss is compiled."""
    from liger_kernel.transformers import LigerRMSNorm, LigerSwiGLUMLP, liger_rotary_pos_emb

    with contextlib.ExitStack() as undo:
        undo.enter_context(fusing())
        module: Any
        for module in model.modules():
            kind = {"LlamaRMSNorm": LigerRMSNorm, "LlamaMLP": LigerSwiGLUMLP}.get(type(module).__name__)
            if kind:
                for name, value in {"offset": 0.0, "casting_mode": "llama", "in_place": True, "row_mode": None}.items():
                    setattr(module, name, value)
                    undo.callback(delattr, module, name)
                module.forward = types.MethodType(kind.forward, module)
                undo.callback(delattr, module, "forward")
        undo.callback(setattr, modeling_llama, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb)
        modeling_llama.apply_rotary_pos_emb = liger_rotary_pos_emb
        yield


def collator(work: bench.Work) -> DataCollatorForSeq2Seq:
    return DataCollatorForSeq2Seq(work.tokenizer, pad_to_multiple_of=PAD_MULTIPLE)


def quantize(model: PreTrainedModel) -> None:
    """Put bitsandbytes' 4-bit layers in place of the linear ones but the head, as loading in nf4 does."""
    import bitsandbytes as bnb

    head = model.get_output_embeddings()
    for path, linear in list(model.named_modules()):
        if isinstance(linear, torch.nn.Linear) and linear is not head:
            packed = bnb.nn.Linear4bit(
                linear.in_features,
                linear.out_features,
                bias=False,
                compute_dtype=linear.weight.dtype,
                compress_statistics=True,
                quant_type="nf4",
                device="meta",
            )
            weight: Any = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=packed)
            packed.weight = weight.to(linear.weight.device)  # which packs it
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, packed.eval())
