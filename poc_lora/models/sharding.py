"""One frozen base model over all ranks: each keeps a part of every layer and gathers a layer while it runs (FSDP2).

Ranks still train different adapters. Only the base's weights cross from one to another, never a gradient.
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
    """Share out the base model that rank 0, and no other, has loaded on the CPU. Called by all ranks at once.

    It travels layer by layer, so that the other ranks never hold more than one layer whole.
    Raises ModelError for a model without a list of decoder layers.
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
            layers[number] = nn.Identity()  # the whole one is no longer needed
    fully_shard(model, mesh=mesh)
    return model


def all_reduce_max(values: list[int]) -> list[int]:
    """The greatest of all ranks' values, position by position. Called by all ranks at once."""
    tensor = torch.tensor(values, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def _from_rank_0(thing: Any) -> Any:
    box = [thing]
    dist.broadcast_object_list(box, src=0)
    return thing if dist.get_rank() == 0 else box[0]


def _layer_list(model: PreTrainedModel) -> nn.ModuleList:
    """The list that holds the decoder layers, or held them before they were taken out."""
    holder = getattr(model.get_decoder(), "layers", None)
    if not isinstance(holder, nn.ModuleList) or not all(isinstance(m, GradientCheckpointingLayer) for m in holder):
        raise ModelError(
            f"{type(model).__name__} has no list of layers to shard", where="model.shard", fix="set it to false"
        )
    return holder


def _plain_parameters(layer: nn.Module) -> None:
    """Make 4-bit weights plain tensors, which FSDP can cut; what unpacks them stays with their modules."""
    module: Any
    for module in layer.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            module.quant_state = state
            module.weight = nn.Parameter(module.weight.data, requires_grad=False)
