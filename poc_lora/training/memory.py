"""Predict a run's memory without loading weights, and choose the sizes that `auto` stands for.

One micro-batch is run forwards and backwards on tensors that have shapes but no data, and the peak of the bytes alive
is counted. That works for any architecture, with or without gradient checkpointing.
"""

import contextlib
import resource
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from poc_lora.config import RunConfig
from poc_lora.data.batches import MicroBatch
from poc_lora.devices import by_device
from poc_lora.envvars import whole_number
from poc_lora.errors import PocLoraError, first_line
from poc_lora.lora.bank import AdapterBank
from poc_lora.models.compilation import compiled_parts, compiles, memory_of_kernel
from poc_lora.models.float8 import float8_bytes, float8_layers
from poc_lora.models.forward import has_plain_head
from poc_lora.models.load import empty_base, resolve_dtype, stored_quantization
from poc_lora.models.recomputation import gradient_checkpointing
from poc_lora.training.loss import chunk_rows, packed_loss
from poc_lora.training.shapes import PeakBytes, shapes_only

# Tokens of a micro-batch, all adapters counted, that keep the device busy; more would only take memory.
# On a GPU twice as many are some 2 % faster, and took 25 GB more with a base of 8B parameters.
FAST_TOKENS = {"cpu": 2048, "cuda": 4096}
# Below so many, running layers twice costs less than such small matmuls do.
SLOW_TOKENS = {"cpu": 256, "cuda": 1024}
GATHERED_TIMES = 4  # as many of both where the base is sharded: it is gathered twice for every micro-batch
SPARE = 0.1  # of the free memory is left alone: allocators waste some, and the estimate is one
# Per weight, block scales included; checkpoints stored in other ways count as not quantised.
QUANTIZED_BYTES = {"nf4": 0.5 + 1 / 64, "int8": 1.0}


@dataclass(frozen=True)
class Sizes:
    """Micro-batch size, pack size and checkpointing: what `auto` is resolved to; recorded in run.json."""

    tokens_per_microbatch: int
    per_device: int
    gradient_checkpointing: bool


@dataclass(frozen=True)
class Memory:
    """Predicted peak bytes on the device, by part."""

    weights: int  # of the base
    bank: int  # adapters and their gradients
    optimizer: int  # two moments, and the noise of one adapter
    activations: int  # of one micro-batch, the backward pass included
    logits: int  # of one chunk
    commit: int  # the copy of weights and moments that is being written; on a GPU it lies in the host's memory, so 0

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


class Footprint:
    """Predicts the memory of a run from its sizes. Reads the base's config, and no weights."""

    def __init__(self, config: RunConfig, device: torch.device, *, longest: int, ranks: int = 1):
        self.config, self.device, self.longest, self.ranks = config, device, longest, ranks
        self._measured: dict[tuple[int, bool], list[tuple[int, int]]] = {}
        self.not_simulated: str | None = None  # why activations were estimated by arithmetic
        self.compiled = compiles(config.train.compile, device)
        section = config.model
        self.dtype = resolve_dtype(section.dtype, device)
        with shapes_only():
            model = empty_base(section.name, revision=section.revision, dtype=self.dtype)
            head = model.get_output_embeddings()
            self.vocabulary: int = head.out_features
            try:
                self.plain_head = has_plain_head(model)
            except PocLoraError:
                raise
            except Exception as problem:  # as in `_activations`
                self.plain_head, self.not_simulated = False, first_line(problem)
            self.can_recompute = any(isinstance(m, GradientCheckpointingLayer) for m in model.modules())
            stored = stored_quantization(section.name, revision=section.revision)
            self.quantization = section.quantization or (stored if stored in QUANTIZED_BYTES else None)
            self.weights, self.largest = _weight_bytes(model, self.quantization, device)
            if section.is_sharded(ranks):
                self.weights = self.weights // ranks + _gathered_bytes(model, self.weights)
            bank = AdapterBank.blank(model, targets=config.lora.targets, rank=config.lora.rank, adapters=[0])
            self.parameters = bank.parameters_per_adapter

    def memory(self, sizes: Sizes) -> Memory:
        """The predicted peak with these sizes."""
        M, P = sizes.per_device, self.parameters
        tokens = max(sizes.tokens_per_microbatch, M * self.longest)
        body, head, backward = (
            fixed + per_token * tokens for fixed, per_token in self._activations(M, sizes.gradient_checkpointing)
        )
        logits = self._logits(tokens)
        return Memory(
            weights=self.weights,
            bank=2 * 4 * M * P,
            optimizer=2 * 4 * M * P + (4 * P if any(self.config.values("optim.temperature")) else 0),
            activations=max(head, max(body, backward) - logits),
            logits=logits,
            commit=snapshot_bytes(M, P) if self.device.type == "cpu" else 0,
        )

    def choose(self, free: int, before: Mapping[str, Any] = MappingProxyType({})) -> Sizes:
        """Choose the sizes that `auto` stands for: the first of the candidates that fits, or the smallest.

        Args:
            free: The free bytes of the device.
            before: Sizes by name that were chosen earlier, which are kept.
        """
        for sizes in self._candidates(_asked(self.config, before)):
            if self.memory(sizes).total <= (1 - SPARE) * free:
                break
        return sizes

    def _candidates(self, asked: dict[str, Any]) -> Iterator[Sizes]:
        """Full packs before halved ones, then plain layers before recomputed ones, then large micro-batches."""
        count = -(-self.config.adapters.count // self.ranks)
        slow, fast = _worthwhile_tokens(self.config, self.device, self.ranks)
        tokens, per_device, recomputing = (asked[field.name] for field in fields(Sizes))
        for M in _halves(count, 1) if per_device == "auto" else [min(per_device, count)]:
            least = M * self.longest  # a micro-batch has a row of each adapter
            choices = [False, True][: 1 + self.can_recompute] if recomputing == "auto" else [recomputing]
            for again in choices:
                floor = least if again == choices[-1] else max(least, slow)
                for n in _halves(fast, floor) if tokens == "auto" else [tokens]:
                    yield Sizes(n, M, again)

    def _logits(self, tokens: int) -> int:
        """Bytes of the logits held at once: in float32, and as much again while they are summed or turned back.

        A compiled loss has them once, in the dtype of the base.
        """
        rows = min(tokens, chunk_rows(self.vocabulary, self.device.type)) if self.plain_head else tokens
        if self.compiled and self.plain_head:
            width: int = getattr(torch, self.dtype).itemsize
            return width * rows * self.vocabulary
        return 2 * 4 * rows * self.vocabulary

    def _activations(self, M: int, checkpointing: bool) -> list[tuple[int, int]]:
        """Peak bytes of a micro-batch of M adapters: fixed ones, and those per token.

        Three peaks: of the model without its head, of head and loss but for the logits, and of the backward pass.
        """
        if (M, checkpointing) not in self._measured:
            try:
                self._measured[M, checkpointing] = self._simulated(M, checkpointing)
            except PocLoraError:
                raise
            except Exception as problem:  # many kinds: layers whose shapes depend on data, such as routed experts
                self.not_simulated = first_line(problem)
                self._measured[M, checkpointing] = [self._estimated(checkpointing)] * 3
        return self._measured[M, checkpointing]

    def _simulated(self, M: int, checkpointing: bool) -> list[tuple[int, int]]:
        with shapes_only():
            section, lora = self.config.model, self.config.lora
            model = empty_base(section.name, revision=section.revision, dtype=self.dtype)
            bank = AdapterBank.blank(
                model, targets=lora.targets, rank=lora.rank, adapters=range(M), dropout=lora.dropout
            )
            for module in bank.modules.values():
                module.train()
            with (
                compiled_parts(model, memory_of_kernel) if self.compiled else contextlib.nullcontext(),
                gradient_checkpointing(model) if checkpointing else contextlib.nullcontext(),
            ):
                measured = zip(self._peaks(model, bank, M), self._peaks(model, bank, 2 * M), strict=True)
        return [(2 * small - large + self.largest, (large - small) // (M * self.longest)) for small, large in measured]

    def _estimated(self, checkpointing: bool) -> tuple[int, int]:
        """An upper bound by the widths of layers, as in `_most_bytes`; a token visits some of the routed experts."""
        with shapes_only():
            section = self.config.model
            model = empty_base(section.name, revision=section.revision, dtype=self.dtype)
            text = model.config.get_text_config()
            width = sum(m.in_features + m.out_features for m in model.modules() if isinstance(m, nn.Linear))
            routed = getattr(text, "num_experts_per_tok", None) or 1
            width += routed * sum(sum(p.shape[1:]) for p in model.parameters() if p.ndim == 3)
        layers = getattr(text, "num_hidden_layers", 1)
        attention = self.longest * layers * getattr(text, "num_attention_heads", 1)
        per_token = 16 * (width + attention)
        return self.largest, per_token * 2 // layers if checkpointing and layers > 1 else per_token

    def _peaks(self, model: PreTrainedModel, bank: AdapterBank, rows: int) -> tuple[int, int, int]:
        T = self.longest
        zeros = torch.zeros(rows * (T - 1), dtype=torch.int64)
        batch = MicroBatch(torch.zeros(rows, T, dtype=torch.int64), zeros, zeros, zeros, zeros, [], 0)
        bank.key_dropout(torch.zeros(rows, dtype=torch.int64))
        body: list[int] = []
        with PeakBytes() as alive:
            hook = model.get_output_embeddings().register_forward_pre_hook(lambda *_: body.append(alive.restart()))
            loss, _ = packed_loss(model, batch, torch.ones(bank.size), plain_head=self.plain_head)
            hook.remove()
            head = alive.restart() - self._logits_seen(len(zeros))
            loss.backward()
        return body[0], head, alive.peak

    def _logits_seen(self, rows: int) -> int:
        """The logits among the bytes of a measured forward pass, which runs on the CPU and sees no kernel's inside."""
        if not self.plain_head:
            return self._logits(rows)
        width: int = getattr(torch, self.dtype).itemsize
        return min(rows, chunk_rows(self.vocabulary, "cpu")) * self.vocabulary * (4 + (width if width != 4 else 0))


def snapshot_bytes(adapters: int, parameters: int) -> int:
    """Bytes of the host's copy of a pack from which a commit is written: weights and two moments."""
    return 3 * 4 * adapters * parameters


def free_bytes(device: torch.device) -> int:
    """Free bytes of the device; of a CPU's memory, the even share of this process among those of its machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        with contextlib.suppress(RuntimeError):  # a device that does not tell, such as a Mac's, which shares the memory
            return torch.accelerator.get_memory_info(device)[0]
    return psutil.virtual_memory().available // whole_number("LOCAL_WORLD_SIZE", 1, least=1)


def peak_bytes(device: torch.device) -> int:
    """The peak of bytes in use so far: by tensors on a GPU, by the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu":
        with contextlib.suppress(RuntimeError):
            if most := torch.accelerator.max_memory_allocated(device):
                return most
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # on Linux it would count the parent's memory too
    return most if sys.platform == "darwin" else most * 1024


def resolve_sizes(
    config: RunConfig,
    model: PreTrainedModel,
    *,
    device: torch.device | None = None,
    free: int,
    longest: int,
    ranks: int = 1,
    before: Mapping[str, Any],
) -> Sizes:
    """Choose the sizes of a run that are `auto`, to fit the memory; a resumed run keeps its own.

    Args:
        config: The run's configuration.
        model: The base model, or its shapes alone.
        device: Default: the model's.
        free: Bytes of each rank's device that are free before the base model is loaded.
        longest: Tokens of the longest row.
        ranks: The number of ranks.
        before: The sizes that a resumed run was started with, by name.
    """
    device = device or model.device
    asked = _asked(config, before)
    largest: dict[str, Any] = {
        "tokens_per_microbatch": _worthwhile_tokens(config, device, ranks)[1],
        "per_device": -(-config.adapters.count // ranks),
        "gradient_checkpointing": False,
    }
    sizes = Sizes(**{name: largest[name] if value == "auto" else value for name, value in asked.items()})
    if "auto" not in asked.values() or _most_bytes(config, model, sizes, longest) <= (1 - SPARE) * free:
        return sizes
    return Footprint(config, device, longest=longest, ranks=ranks).choose(free, before)


def _worthwhile_tokens(config: RunConfig, device: torch.device, ranks: int) -> tuple[int, int]:
    """SLOW_TOKENS and FAST_TOKENS of a run."""
    times = GATHERED_TIMES if config.model.is_sharded(ranks) else 1
    return times * by_device(SLOW_TOKENS, device.type), times * by_device(FAST_TOKENS, device.type)


def _asked(config: RunConfig, before: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of Sizes as the run asks for them; `auto` is what it was `before`, if that is known."""
    asked = {
        "tokens_per_microbatch": config.train.tokens_per_microbatch,
        "per_device": config.adapters.per_device,
        "gradient_checkpointing": config.train.gradient_checkpointing,
    }
    return {name: before.get(name, value) if value == "auto" else value for name, value in asked.items()}


def _most_bytes(config: RunConfig, model: PreTrainedModel, sizes: Sizes, longest: int) -> int:
    """An upper bound of the bytes that a run takes, found at once: small models need no closer look.

    It counts four times the inputs and outputs of every linear layer, where a Llama took a third of that, and four
    times the attention weights, which not every model keeps.
    """
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    width = sum(m.in_features + m.out_features for m in linears)
    tokens = max(sizes.tokens_per_microbatch, sizes.per_device * longest)
    text = model.config.get_text_config()
    attention = longest * getattr(text, "num_hidden_layers", 1) * getattr(text, "num_attention_heads", 1)
    bank = (7 * sizes.per_device + 1) * config.lora.rank * width
    copies = 2 if config.model.quantization == "fp8" else 1  # a second one for the backward pass
    weights = copies * sum(p.nbytes for p in model.parameters())
    weights += max(4 * m.in_features * m.out_features for m in linears)
    return weights + 4 * (bank + 4 * tokens * (width + attention))


def _halves(most: int, least: int) -> list[int]:
    """`most`, half of it, and so on, as long as it is at least `least`; never empty."""
    sizes = [most]
    while sizes[-1] // 2 >= least:
        sizes.append(sizes[-1] // 2)
    return sizes


def _weight_bytes(model: PreTrainedModel, quantization: str | None, device: torch.device) -> tuple[int, int]:
    """Bytes of the base's weights, and of the largest one as it is unpacked for a matmul."""
    head = model.get_output_embeddings()
    if quantization == "fp8":
        layers = list(float8_layers(model).values())
        rest = sum(p.nbytes for p in model.parameters()) - sum(m.weight.nbytes for m in layers)
        largest = max(4 * m.weight.numel() for m in layers) if device.type == "cpu" else 0
        return rest + sum(float8_bytes(m, device) for m in layers), largest
    packed = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not head] if quantization else []
    ids = {id(p) for p in packed}
    plain = sum(p.nbytes for p in model.parameters() if id(p) not in ids)
    if not quantization:
        return plain, 0
    return plain + round(sum(p.numel() for p in packed) * QUANTIZED_BYTES[quantization]), max(p.nbytes for p in packed)


def _gathered_bytes(model: PreTrainedModel, weights: int) -> int:
    """Bytes of a sharded base that are whole at once: two layers, of which one is on its way, and what is no layer."""
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    total = sum(p.nbytes for p in model.parameters())
    in_layers = sum(p.nbytes for layer in layers for p in layer.parameters())
    largest = max(sum(p.nbytes for p in layer.parameters()) for layer in layers)
    outside = total - in_layers
    return outside + round(2 * largest / in_layers * (weights - outside))
