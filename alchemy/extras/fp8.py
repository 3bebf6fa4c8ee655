"""Base weights in 8 bits: half the memory of bfloat16, with an error of at most 1/16 per weight.

    W ≈ s · W₈     W₈ float8_e4m3fn (Micikevicius et al. 2022), s float32, one per row of W

s is a power of two, so multiplying by it does not round in any dtype. The product is computed in
the dtype of x, with W₈ unpacked for it; the backward pass unpacks again, so that training keeps
only W₈.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from ..lora import LoRALayer, LoRALinear

E4M3_MAX = 448.0


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (out, in) to W₈ (out, in) and s (out, 1). s of a row of zeros is 1."""
    weight = weight.float()
    _, exponent = torch.frexp(weight.abs().amax(1, keepdim=True) / E4M3_MAX)
    scale = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)
    return (weight / scale).to(torch.float8_e4m3fn), scale


def unpack(packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """s · W₈, (out, in), in dtype."""
    return packed.to(dtype).mul_(scale.to(dtype))


class Product(torch.autograd.Function):
    """W x + b that saves W₈ and s for the backward pass, not W. Neither is trained."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(packed, scale)
        rows = x.numel() // x.shape[-1]
        # Scale the smaller of W (out, in) and the result (rows, out). A power of two commutes with
        # rounding, so the bits are the same, except in float16, where W₈ x could overflow.
        if rows >= packed.shape[1] or x.dtype == torch.float16:
            return F.linear(x, unpack(packed, scale, x.dtype), bias)
        scale = scale[:, 0].to(x.dtype)
        bias = None if bias is None else bias / scale
        return F.linear(x, packed.to(x.dtype), bias) * scale

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad @ unpack(*ctx.saved_tensors, grad.dtype), None, None, None


class FP8(nn.Linear):
    """A linear layer with W₈ as its weight and s as the buffer `scale`."""

    def forward(self, x: Tensor) -> Tensor:
        # Autocast does not reach into the backward pass of an autograd.Function.
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return Product.apply(x, self.weight, self.scale, bias)


class FP8LoRALinear(LoRALayer, FP8):
    """The same with adapters.

    Merging raises ValueError: most of a LoRA would be lost in 3 bits of mantissa.
    """

    def merge(self) -> None:
        raise ValueError(
            "a base stored in fp8 cannot take a LoRA into its weights, nor be written as a "
            "checkpoint: leave out --fp8-base"
        )


def store_fp8(module: nn.Module) -> nn.Module:
    """Store the linear layers of a module, or the module itself, in fp8, in place.

    Trained weights, weights on the meta device (not read yet) and convolutions, norms, embeddings,
    biases and adapters stay as they are. Raises ValueError while adapters are merged.
    """
    for layer in module.modules():
        # Not isinstance: a layer that is stored already is skipped.
        if type(layer) is not LoRALinear or layer.weight.requires_grad or layer.weight.is_meta:
            continue
        if layer.base_weight is not None:
            raise ValueError("adapters are merged; unmerge before the weights are stored in fp8")
        packed, scale = pack(layer.weight)
        layer.weight = nn.Parameter(packed, requires_grad=False)
        layer.register_buffer("scale", scale, persistent=False)
        layer.__class__ = FP8LoRALinear  # keeps hooks, adapters and references to the layer
    return module


def weight_of(layer: nn.Linear) -> Tensor:
    """The weight (out, in) that a layer computes with, float32."""
    if isinstance(layer, FP8):
        return unpack(layer.weight, layer.scale, torch.float32)
    return layer.weight.float()
