"""Shard the frozen base model over all ranks with FSDP2; each layer is gathered while it runs.

Ranks still train different adapters: only the base's weights are communicated, never a gradient.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from poc_lora.errors import ModelError
from poc_lora.models.load import empty_base, load_base, load_tokenizer


def load_to_shard(
    name: str,
    *,
    revision: str | None,
    dtype: str,
    quantization: str | None,
    rank: int,
    chat_template: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a base model and its tokenizer for `shard_base`: on rank 0 to the CPU, elsewhere without weights.

    Args:
        name, revision, quantization, chat_template: As for `load_base`.
        dtype: A torch dtype's name; not `auto`, which would be the CPU's.
        rank: This process's rank.
    """
    if rank:
        model = empty_base(name, revision=revision, dtype=dtype)
        return model, load_tokenizer(name, revision=revision, chat_template=chat_template)
    return load_base(
        name,
        revision=revision,
        dtype=dtype,
        quantization=quantization,
        device=torch.device("cpu"),
        floats_only=True,
        chat_template=chat_template,
    )


def shard_base(model: PreTrainedModel | None, device: torch.device) -> PreTrainedModel:
    """Shard a base model over all ranks; a collective operation.

    It is broadcast layer by layer, so that no other rank holds more than one full layer.

    Args:
        model: The base model on the CPU on rank 0; elsewhere it is not used.
        device: This rank's device.

    Raises:
        ModelError: The model has no list of decoder layers.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    layers: list[nn.Module] = []
    model = model if dist.get_rank() == 0 else None
    if model is not None:
        holder = _layer_list(model)
        layers = list(holder)
        del holder[:]
    count, model = _from_rank_0((len(layers), model))
    holder = _layer_list(model)
    model.to(device)  # type: ignore[arg-type]
    for number in range(count):
        layer = _from_rank_0(layers[number] if layers else None).to(device)
        _plain_parameters(layer)
        holder.append(fully_shard(layer, mesh=mesh))
        if layers:
            layers[number] = nn.Identity()  # frees the full layer
    fully_shard(model, mesh=mesh)
    return model


def all_reduce_max(values: list[int]) -> list[int]:
    """Returns the maximum over all ranks of each value; a collective operation."""
    tensor = torch.tensor(values, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def all_reduce_sum(tensor: Tensor) -> None:
    """Replace `tensor`, on this rank's device, by its sum over all ranks; a collective operation."""
    dist.all_reduce(tensor, dist.ReduceOp.SUM)


def _from_rank_0(thing: Any) -> Any:
    box = [thing]
    dist.broadcast_object_list(box, src=0)
    return thing if dist.get_rank() == 0 else box[0]


def _layer_list(model: PreTrainedModel) -> nn.ModuleList:
    """The model's list of decoder layers, which may have been emptied."""
    holder = getattr(model.get_decoder(), "layers", None)
    if not isinstance(holder, nn.ModuleList) or not all(isinstance(m, GradientCheckpointingLayer) for m in holder):
        raise ModelError(
            f"{type(model).__name__} has no list of layers to shard", where="model.shard", fix="set it to false"
        )
    return holder


def _plain_parameters(layer: nn.Module) -> None:
    """Turn 4-bit weights into plain parameters, which FSDP can shard; their quantisation state stays on the module."""
    module: Any
    for module in layer.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            module.quant_state = state
            module.weight = nn.Parameter(module.weight.data, requires_grad=False)
