"""Shard the frozen base model over all ranks with FSDP2; each layer is gathered while it runs.

Ranks still train different adapters: only the base's weights are communicated, never a gradient.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from poc_lora.errors import ModelError


def shard_base(model: PreTrainedModel | None, device: torch.device) -> PreTrainedModel:
    """Shard a base model over all ranks; a collective operation.

    It is broadcast layer by layer, so that no other rank holds more than one full layer.

    Args:
        model: The base model on the CPU on rank 0; None on the other ranks.
        device: This rank's device.

    Raises:
        ModelError: The model has no list of decoder layers.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    layers: list[nn.Module] = []
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
