"""A random model of one shape on one device, and three ways to train adapters of it, measured on the same rows.

packed trains 8 adapters together. trainer and loop (see sides.py) train one adapter on the very batches that packed
gives to each of the 8, one after another. Two steps of packed warm up, or as many rows; then `steps` more are measured,
without Trainer's own start and end.

Per side: tokens_per_s without padding, of packed also computed_per_s with it; tflops, of 4 operations per weight of the
base and token that is not padding, so that what checkpointing computes again does not count; host_share, the seconds
that threads of this process computed in one of the clock; the peak of allocated and of reserved memory. Of packed also
the memory that Footprint predicts from the shape, and how often a step waits for the GPU.

labels asks questions instead, by the label protocol. An answer is one question put to one adapter, the base or the
merge.
"""

import contextlib
import statistics
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import train as bench
from sides import Work, free_memory, synchronise, training
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity
from torch.profiler import profile as Profiler
from train import ROW_LENGTHS
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama

from poc_lora.data.batches import BatchOrder
from poc_lora.evaluation.protocols.label import PreparedQuestions, score_labels
from poc_lora.fusion import fusing
from poc_lora.models.float8 import Float8Linear, quantize_float8
from poc_lora.models.forward import without_cudnn_attention
from poc_lora.models.load import default_device
from poc_lora.training.memory import Footprint, Sizes
from poc_lora.training.step import Pack

ADAPTERS, BATCH, WARM_UP, TOKENS = 8, 16, 2, 4096
CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
Facts = dict[str, Any]


class Shape:
    """A random Llama of the shape `name`, made once, and the work on it."""

    def __init__(self, name: str, *, steps: int = 4, adapters: int = ADAPTERS, batch: int = BATCH):
        self.steps = steps
        words = ["--shape", name, "--adapters", str(adapters), "--batch", str(batch)]
        # Sizes are given, so that nothing is chosen here by what memory is free.
        words += [f"train.tokens_per_microbatch={TOKENS}", f"adapters.per_device={adapters}"]
        arguments = bench.parse_arguments([*words, "train.gradient_checkpointing=false"])
        device, began = default_device(), time.monotonic()
        self.work = bench.random_work(arguments, bench.run_config(arguments), device)
        synchronise(device)
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
                for step in range(WARM_UP):
                    pack.step(step)
                first = time.monotonic() - began
                measured.start()
                done = [result for step in self._measured_steps(profile) if (result := pack.step(step))]
                measured.stop()
                waits = waits_in(lambda: pack.step(0))
            finally:
                pack.close()
        padded = sum(result.padded_tokens for result in done)
        return self._rates(measured, profile) | {
            "computed_per_s": round(padded / measured.seconds),
            "loss": round(statistics.mean(done[-1].losses), 3),
            "grad_norm": round(max(done[-1].grad_norms), 4),
            "first_pass_s": round(first, 2),
            "waits_per_step": waits,
            "predicted_gb": round(predicted / 1e9, 1),
        }

    def alone(self, side: str, *, checkpointing: bool = False, profile: Path | None = None) -> Facts:
        """One adapter by `trainer` or `loop`, for which M batches are a step. profile: as for `packed`."""
        work, M = self._work(checkpointing=checkpointing), len(self.work.adapters)
        one = work.config.model_copy(update={"adapters": work.config.adapters.model_copy(update={"count": 1})})
        order: Any = InTurn(work.data.order, M)
        work = replace(work, config=one, data=replace(work.data, order=order))
        steps = self._measured_steps(profile)
        measured = Measured(work.model.device, profile)
        with without_cudnn_attention(), training(side, work, M * steps.stop) as trained:
            for step in range(M * steps.start):
                trained.step(step)
            measured.start()
            for step in range(M * steps.start, M * steps.stop):
                trained.step(step)
            measured.stop()
        return self._rates(measured, profile)

    def labels(self, questions: int = 512) -> Facts:
        """Answers to random questions: of the base, of all adapters in one pass or one after another, of the merge."""
        asked = random_questions(questions, self.work.model.config.vocab_size)
        work, adapters = self._work(checkpointing=False), list(self.work.adapters)
        with without_cudnn_attention(), contextlib.ExitStack() as undo:
            pack = Pack(work.config, work.model, work.data, adapters, sizes=Sizes(TOKENS, len(adapters), False))
            undo.callback(pack.close)
            bank = pack.bank
            with torch.no_grad():
                bank.weights.normal_(0, 0.02)
            for module in bank.modules.values():
                module.eval()
            views: dict[str, list[AbstractContextManager[None]]] = {
                "base": [bank.disabled()],
                "packed": [contextlib.nullcontext()],
                "one_by_one": [bank.only(slot) for slot in adapters],
                "merge": [bank.merged()],
            }
            scores, found = {}, {}
            for name, passes in views.items():
                scores[name], found[name] = self._asked(asked, passes, len(adapters) if name == "packed" else 1)
            again = score_labels(work.model, asked, copies=len(adapters))
            waits = waits_in(lambda: score_labels(work.model, asked, copies=len(adapters)))
        return found | {
            "questions": questions,
            "waits": waits,
            "same_bits_again": torch.equal(again, scores["packed"]),
            "packed_from_one_by_one": float((scores["packed"] - scores["one_by_one"]).abs().max()),
        }

    def _asked(
        self, asked: PreparedQuestions, passes: Sequence[AbstractContextManager[None]], copies: int
    ) -> tuple[torch.Tensor, Facts]:
        """The scores of all passes [models, questions, labels], and their rates; a first batch warms up."""
        model, answers, scores = self.work.model, len(passes) * copies * len(asked.answers), []
        measured = Measured(model.device, None)
        for number, view in enumerate(passes):
            with view:
                if not number:
                    score_labels(model, random_questions(8, model.config.vocab_size), copies=copies)
                    measured.start()
                scores.append(score_labels(model, asked, copies=copies))
        measured.stop()
        tokens = answers / len(asked.answers) * len(asked.tokens)
        return torch.cat(scores), {
            "answers_per_s": round(answers / measured.seconds, 1),
            "tokens_per_s": round(tokens / measured.seconds),
            "tflops": round(2 * self.parameters * tokens / measured.seconds / 1e12, 1),
            **measured.memory,
        }

    def _measured_steps(self, profile: Path | None) -> range:
        return range(WARM_UP, WARM_UP + (1 if profile else self.steps))

    def _work(self, *, checkpointing: bool, compile: bool = False, dropout: float = 0.0) -> Work:
        config = self.work.config
        train = config.train.model_copy(update={"compile": compile, "gradient_checkpointing": checkpointing})
        lora = config.lora.model_copy(update={"dropout": dropout})
        return replace(self.work, config=config.model_copy(update={"train": train, "lora": lora}))

    def _predicted(self, work: Work, sizes: Sizes, quantization: str | None) -> int:
        """Bytes by Footprint, which reads the shape from a folder; takes seconds, once for each way."""
        key = (sizes.gradient_checkpointing, quantization, work.config.train.compile, work.config.lora.dropout)
        if key not in self._footprints:
            folder = self._folder.name
            work.model.config.save_pretrained(folder)
            section = work.config.model.model_copy(update={"name": folder, "quantization": quantization})
            config = work.config.model_copy(update={"model": section})
            self._footprints[key] = Footprint(config, work.model.device, longest=work.data.longest)
        return self._footprints[key].memory(sizes).total

    def _rates(self, measured: "Measured", profile: Path | None) -> Facts:
        if profile:
            return measured.kernels
        seconds, steps = measured.seconds, self._measured_steps(profile)
        tokens = sum(self.work.tokens(step) for step in steps)
        return {
            "tokens_per_s": round(tokens / seconds),
            "tflops": round(4 * self.parameters * tokens / seconds / 1e12, 1),
            "step_s": round(seconds / len(steps), 3),
            "host_share": round(measured.host / seconds, 2),
            **measured.memory,
        }


@dataclass(frozen=True)
class InTurn:
    """The batches of `count` adapters, step by step, as those of one adapter."""

    order: BatchOrder
    count: int

    def rows(self, adapter: int, step: int) -> Sequence[int]:
        return self.order.rows(step % self.count, step // self.count)


def random_questions(count: int, vocabulary: int, labels: int = 4) -> PreparedQuestions:
    """Questions of 40 to 160 random tokens, with labels of one token each."""
    draws = np.random.default_rng(count)
    lengths = torch.from_numpy(np.sort(draws.integers(*ROW_LENGTHS, count, endpoint=True))[::-1].copy())
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    first_labels = draws.integers(1, vocabulary - labels, count)  # 0 is padding
    return PreparedQuestions(
        tokens=torch.from_numpy(draws.integers(1, vocabulary, int(starts[-1]))),
        starts=starts,
        first_read=torch.arange(count + 1) * labels,
        read_column=(lengths - 1).repeat_interleave(labels),
        read_token=torch.from_numpy((first_labels[:, None] + np.arange(labels)).flatten()),
        read_slot=torch.arange(count * labels),
        answers=torch.zeros(count, dtype=torch.int64),
        label_exists=torch.ones(count, labels, dtype=torch.bool),
        too_long=torch.zeros(count, dtype=torch.bool),
    )


def waits_in(work: Callable[[], object]) -> int:
    """How often the host waits for the GPU within `work`, as torch counts it."""
    if not torch.cuda.is_available():
        return 0
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in found)


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
        free_memory()  # what the one before left reserved
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._retries = torch.cuda.memory_stats(device)["num_alloc_retries"]

    def start(self) -> None:
        synchronise(self.device)
        if self.profile:
            self._profiler.start()
        self.seconds, self.host = -time.monotonic(), -time.process_time()

    def stop(self) -> None:
        synchronise(self.device)
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


@contextlib.contextmanager
def in_float8(model: PreTrainedModel) -> Iterator[None]:
    """Within the block the linear layers but the head are in float8; after it in bfloat16 again, of rounded weights."""
    device = model.device
    quantize_float8(model, device)
    try:
        yield
    finally:
        for path, layer in list(model.named_modules()):
            if isinstance(layer, Float8Linear):
                linear = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
                weight = (layer.weight.float() * layer.weight_scale).to(model.dtype)
                linear.weight = torch.nn.Parameter(weight, requires_grad=False)
                parent, _, name = path.rpartition(".")
                setattr(model.get_submodule(parent), name, linear.eval())


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
