"""What the networks share: convolutional blocks, (B, C, H, W) to (B, C', H', W'), and configs."""

from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .lora import LoRAConv2d, LoRALinear


def known_values(kind: type, config: dict[str, Any]) -> dict[str, Any]:
    """The values of an official config.json that the dataclass `kind` has; lists as tuples."""
    values = {}
    for field in fields(kind):
        value = config.get(field.name)
        if value is not None:
            values[field.name] = tuple(value) if isinstance(value, list) else value
    return values


def norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """silu(norm(x)); in place on the norm's new tensor where no gradient needs it."""
    return F.silu(norm(x), inplace=not torch.is_grad_enabled())


class ResnetBlock(nn.Module):
    """Two normalized convolutions and a shortcut.

    In the UNet, a projection of the timestep embedding emb (B, E) is added between the two.
    eps of GroupNorm is 1e-5 in the UNet and 1e-6 in the VAE.
    """

    def __init__(self, c_in: int, c_out: int, groups: int, eps: float, embedding: int = 0):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=eps)
        self.conv1 = LoRAConv2d(c_in, c_out, 3, padding=1)
        if embedding:
            self.time_emb_proj = LoRALinear(embedding, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=eps)
        self.conv2 = LoRAConv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.conv_shortcut = LoRAConv2d(c_in, c_out, 1)

    def shortcut(self, x: Tensor) -> Tensor:
        return self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        h = self.conv1(norm_silu(self.norm1, x))
        if emb is not None:
            h = h + self.time_emb_proj(F.silu(emb))[:, :, None, None]
        return self.conv2(norm_silu(self.norm2, h)) + self.shortcut(x)


class Downsample(nn.Module):
    """Halve the sides. padding=0 is the VAE encoder, which was trained with one row and column
    of zeros at the bottom and right only; the UNet pads all four sides.
    """

    def __init__(self, channels: int, padding: int):
        super().__init__()
        self.padding = padding
        self.conv = LoRAConv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.padding else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbour to twice the sides or to `size`, then a convolution.

    The UNet passes the size, because an odd level is halved to the next larger integer.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = LoRAConv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        size = size or (2 * x.shape[-2], 2 * x.shape[-1])
        return self.conv(F.interpolate(x, size=size, mode="nearest"))
