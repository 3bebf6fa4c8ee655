"""The convolutional blocks that the VAE and the UNet share. All map (B, C, H, W) to (B, C', H', W')."""

import torch.nn.functional as F
from torch import nn

from .lora import LoRAConv2d, LoRALinear


class ResnetBlock(nn.Module):
    """Two normalised convolutions beside a shortcut; in the UNet, the embedding emb (B, E) of the timestep is added between them."""

    def __init__(self, c_in, c_out, groups, eps, embedding=None):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=eps)
        self.conv1 = LoRAConv2d(c_in, c_out, 3, padding=1)
        if embedding:
            self.time_emb_proj = LoRALinear(embedding, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=eps)
        self.conv2 = LoRAConv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.conv_shortcut = LoRAConv2d(c_in, c_out, 1)
        self.same = c_in == c_out

    def forward(self, x, emb=None):
        h = self.conv1(F.silu(self.norm1(x)))
        if emb is not None:
            h = h + self.time_emb_proj(F.silu(emb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.same else self.conv_shortcut(x))


class Downsample(nn.Module):
    """Halve the sides. The UNet pads all four sides; the VAE's encoder pads right and bottom only: it was trained so."""

    def __init__(self, channels, padding):
        super().__init__()
        self.padding = padding
        self.conv = LoRAConv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x):
        return self.conv(x if self.padding else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbour to twice the sides, or to `size` (an odd level of the UNet is half of it rounded up), then a convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = LoRAConv2d(channels, channels, 3, padding=1)

    def forward(self, x, size=None):
        size = size or (2 * x.shape[-2], 2 * x.shape[-1])
        return self.conv(F.interpolate(x, size=size, mode="nearest"))
