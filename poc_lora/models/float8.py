"""A frozen base model whose linear layers multiply in float8, which recent GPUs do twice as fast as in bfloat16."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from poc_lora.errors import ConfigError
from poc_lora.models.compilation import require_compiler

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
SMALLEST = 1e-30  # a row's largest value is taken as no less, so that a row of zeros does not divide by zero
MULTIPLE = 16  # GPUs multiply float8 matrices only of such widths
CAPABILITY = (8, 9)  # of the first GPUs that multiply in float8: Ada, before Hopper


class Float8Linear(nn.Linear):
    """A frozen linear layer with weights and inputs in float8: y = x W^T + b.

    The weights W [d_out, d_in] are stored in e4m3 with one float32 scale s for each output, `weight_scale` [d_out, 1].
    Inputs, and in the backward pass gradients, are quantised as they come, with a scale for each token, so that no row
    depends on another. Gradients are in e4m3 too: e5m2 spends a bit on range that scales of rows give already; it
    changed the gradients of adapters on SmolLM2-135M by 7.4 % of their norm, e4m3 by 4.1 %.

    For dX = dY W the scales of W belong to the dimension that is summed over, so they go into dY before it is
    quantised: dX = (dY · s^T) W8, of the very W8 of the forward pass. On a GPU both factors must be contiguous along
    that dimension, so there a transposed copy of W8 is made in the first backward pass and kept: one byte a weight for
    evaluation, two for training, as in bfloat16. A copy with scales of its own would take as much memory, and be of
    weights that are rounded in another way.

    On a CUDA device products are summed by `torch._scaled_mm`, and rounded to bfloat16; elsewhere in float32, of the
    same quantised values. Outputs have the dtype of x.

    Args:
        linear: The layer to quantise; its widths are multiples of 16.
        device: Where the quantised layer goes.
    """

    weight_scale: Tensor
    transposed: Tensor | None
    ones: Tensor | None

    def __init__(self, linear: nn.Linear, device: torch.device):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        weight, scale = quantize_rows(linear.weight.detach().to(device))
        self.weight = nn.Parameter(weight, requires_grad=False)
        if linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.detach().to(device), requires_grad=False)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("transposed", None, persistent=False)
        self.register_buffer("ones", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Float8Product.apply(x.reshape(-1, x.shape[-1]), self)  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], y.shape[-1])

    def product(self, values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns x W^T + b [n, d_out] of rows x [n, d_in] that `quantized` has quantised."""
        y = matmul(values, scale, self.weight, self.weight_scale, dtype)
        return y if self.bias is None else y.add_(self.bias)

    def gradient(self, upstream: Tensor) -> Tensor:
        """Returns dX [n, d_in] of dY [n, d_out], in its dtype."""
        weight, ones = self.for_backward()
        return matmul(*quantized(upstream, self.weight_scale), weight, ones, upstream.dtype)

    def for_backward(self) -> tuple[Tensor, Tensor]:
        """W8^T [d_in, d_out] and its scales, which are ones."""
        if self.transposed is None or self.ones is None:
            self.ones = torch.ones(self.in_features, 1, device=self.weight.device)
            self.transposed = self.weight.detach().t()
            if on_gpu(self.weight):
                self.transposed = self.transposed.contiguous()
        return self.transposed, self.ones


class _Float8Product(torch.autograd.Function):
    """y = x W^T + b and dX = dY W of a Float8Linear, for x [n, d_in] and y [n, d_out]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Float8Linear) -> Tensor:
        ctx.layer = layer
        return layer.product(*quantized(x), x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None]:
        return ctx.layer.gradient(upstream), None


def on_gpu(x: Tensor) -> bool:
    """Whether to multiply by the GPU's own float8 matmul, or by its plain reference."""
    return x.is_cuda


def quantize_rows(x: Tensor, weight_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantise each row of x [n, d] to e4m3, so that its largest value becomes e4m3's.

    weight_scale: [d, 1], by which the columns of x are multiplied before.

    Returns:
        The quantised rows [n, d] and their float32 scales [n, 1]. A NaN or an infinity makes its own row NaN.
    """
    x = x.float()
    if weight_scale is not None:
        x = x * weight_scale.t()
    scale = x.abs().amax(1, keepdim=True).clamp(min=SMALLEST) / LARGEST
    return (x / scale).to(E4M3), scale


def matmul(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(a_scale · a) (b_scale · b)^T [n, m] of a [n, k] and b [m, k] in e4m3, with scales [n, 1] and [m, 1]."""
    if not on_gpu(a):
        return reference_matmul(a, a_scale, b, b_scale).to(dtype)
    y = torch._scaled_mm(a, b.t(), a_scale, b_scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True)
    return y.to(dtype)


def reference_matmul(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    """`matmul`, summed in float32 on any device."""
    with torch.autocast(a.device.type, enabled=False):
        return a.float() @ b.float().t() * a_scale * b_scale.t()


def float8_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The layers that `quantize_float8` quantises, by path: the linear ones of suitable widths, but not the head."""
    head = model.get_output_embeddings()
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and not module.in_features % MULTIPLE
        and not module.out_features % MULTIPLE
    }


def float8_bytes(linear: nn.Linear, device: torch.device) -> int:
    """Bytes that a layer's weights and scales take in training on `device` once it is quantised."""
    copies, scales = (1, linear.out_features) if device.type == "cpu" else (2, linear.out_features + linear.in_features)
    return copies * linear.weight.numel() + 4 * scales


def quantize_float8(model: PreTrainedModel, device: torch.device) -> None:
    """Replace a model's `float8_layers` by quantised ones on `device`, one at a time, and move the rest there."""
    for path, linear in float8_layers(model).items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, Float8Linear(linear, device).train(linear.training))
    model.to(device)  # type: ignore[arg-type]


def require_float8(device: torch.device) -> None:
    """Raises ConfigError where a GPU does not multiply in float8, or torch.compile does not work."""
    if device.type == "cpu":
        return
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < CAPABILITY:
        kind = device.type
        if kind == "cuda":
            major, minor = torch.cuda.get_device_capability(device)
            kind = f"{torch.cuda.get_device_name(device)}, of compute capability {major}.{minor}"
        raise ConfigError(
            f"quantization 'fp8' needs an NVIDIA GPU of compute capability 8.9 or more; this is {kind}",
            where="model.quantization",
            fix="set it to int8 or nf4, or to null",
        )
    require_compiler(device, where="model.quantization")


def quantized(x: Tensor, weight_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`quantize_rows`, as one kernel on a GPU, where its steps one by one would read and write x several times."""
    x = x.detach().contiguous()  # else it is compiled for inputs with and without gradients
    return (_compiled_quantize() if on_gpu(x) else quantize_rows)(x, weight_scale)


@functools.cache
def _compiled_quantize() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(quantize_rows, dynamic=True)
