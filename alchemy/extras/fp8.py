"""Weights of the base kept in 8 bits: half the memory of bfloat16, for an error of at most 1/16 of each weight.

    W ≈ s · W₈        W₈ float8_e4m3fn (4 bits of exponent, 3 of mantissa; Micikevicius et al. 2022), s float32, one for each row

s is a power of two: multiplying by it rounds nothing, in any dtype, and W₈, a floating point number, loses nothing by it either. The
product is in the dtype of x, with W unpacked for it and dropped again; the backward pass unpacks it once more, so that training keeps
W₈ alone.
"""

import torch
import torch.nn.functional as F
from torch import nn

from ..lora import LoRALayer, LoRALinear

MOST = 448.0  # the largest of float8_e4m3fn


def pack(weight):
    """A weight (out, in) to its W₈ (out, in) and s (out, 1)."""
    weight = weight.float()
    _, exponent = torch.frexp(weight.abs().amax(1, keepdim=True) / MOST)  # a row of zeros: s is 1
    scale = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)
    return (weight / scale).to(torch.float8_e4m3fn), scale


def unpack(packed, scale, dtype):
    return packed.to(dtype) * scale.to(dtype)


class Product(torch.autograd.Function):
    """W x + b, whose backward pass is left W₈ and s, not W. Neither of them learns."""

    @staticmethod
    def forward(ctx, x, packed, scale, bias):
        ctx.save_for_backward(packed, scale)
        return F.linear(x, unpack(packed, scale, x.dtype), bias)

    @staticmethod
    def backward(ctx, grad):
        return grad @ unpack(*ctx.saved_tensors, grad.dtype), None, None, None


class FP8(nn.Linear):
    """A linear layer whose weight is W₈ and which has s as the buffer `scale`."""

    def forward(self, x):
        if torch.is_autocast_enabled(
            x.device.type
        ):  # which has no say within an autograd.Function's own backward pass
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return Product.apply(
            x, self.weight, self.scale, self.bias if self.bias is None else self.bias.to(x.dtype)
        )


class FP8LoRALinear(LoRALayer, FP8):
    """The same, and what its adapters add. Merging is refused: added to 3 bits of mantissa, most of a LoRA would be rounded away."""

    def merge(self):
        raise ValueError(
            "a base stored in fp8 cannot take a LoRA into its weights, nor be written as a checkpoint: leave out --fp8-base"
        )


def store_fp8(module):
    """Store the weights of the linear layers of a module, or its own, in fp8, in place; what learns, has none yet (on the meta device)
    or is stored already stays as it is. Names, biases and adapters stay; convolutions, norms and embeddings are not touched."""
    for layer in module.modules():
        if (
            type(layer) is LoRALinear
            and not layer.weight.requires_grad
            and not layer.weight.is_meta
        ):
            if layer.base_weight is not None:
                raise ValueError(
                    "adapters are merged; unmerge before the weights are stored in fp8"
                )
            packed, scale = pack(layer.weight)
            layer.weight = nn.Parameter(packed, requires_grad=False)
            layer.register_buffer("scale", scale, persistent=False)
            layer.__class__ = (
                FP8LoRALinear  # in place: hooks, adapters and whoever holds the layer keep it
            )
    return module


def weight_of(layer):
    """The weight (out, in) of a layer as it is used, float32; of one in fp8 unpacked."""
    return (
        unpack(layer.weight, layer.scale, torch.float32)
        if isinstance(layer, FP8)
        else layer.weight.float()
    )
