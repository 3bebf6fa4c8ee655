"""The VAE: images (B, 3, H, W) in [-1, 1] to latents (B, 4, H/f, W/f) and back; f is 8 for SDXL.

Latents are multiplied by scaling_factor (0.13025 for SDXL, which makes their variance about 1) in
encode and divided by it in decode, and nowhere else. Kingma & Welling 2014; Rombach et al. 2022.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Downsample, ResnetBlock, Upsample, known_values, norm_silu

EPS = 1e-6  # of every GroupNorm in the VAE; the UNet's resnets have 1e-5
STRIPS_ABOVE = 1_500_000  # pixels of a level; see `use_strips`
STRIP_PIXELS = 1 << 17


@dataclass(frozen=True)
class VAEConfig:
    """The sizes, by the names of the official config.json; defaults: SDXL's."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.13025
    force_upcast: bool = True  # the official VAE's activations overflow float16

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "VAEConfig":
        return cls(**known_values(cls, config))


class MidAttention(nn.Module):
    """Self-attention with one head over all positions."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x).flatten(2)  # (B, C, H·W)
        h = h.transpose(1, 2)[:, None]  # (B, 1, H·W, C)
        q = self.to_q(h)
        k = self.to_k(h)
        v = self.to_v(h)
        h = F.scaled_dot_product_attention(q, k, v)
        h = self.to_out[0](h)[:, 0].transpose(1, 2)  # (B, C, H·W)
        return x + h.unflatten(2, x.shape[-2:])


class MidBlock(nn.Module):
    def __init__(self, channels: int, groups: int):
        super().__init__()
        first = ResnetBlock(channels, channels, groups, EPS)
        second = ResnetBlock(channels, channels, groups, EPS)
        self.resnets = nn.ModuleList([first, second])
        self.attentions = nn.ModuleList([MidAttention(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        x = self.attentions[0](x)
        return self.resnets[1](x)


class Level(nn.Module):
    """Resnets at one resolution, then `resample` ("down" or "up") except at the end."""

    def __init__(self, c_in: int, c_out: int, count: int, groups: int, resample: str | None):
        super().__init__()
        self.resnets = nn.ModuleList()
        for i in range(count):
            self.resnets.append(ResnetBlock(c_out if i else c_in, c_out, groups, EPS))
        if resample == "down":
            self.downsamplers = nn.ModuleList([Downsample(c_out, padding=0)])
        if resample == "up":
            self.upsamplers = nn.ModuleList([Upsample(c_out)])

    def layers(self) -> Iterator[nn.Module]:
        yield from self.resnets
        yield from getattr(self, "downsamplers", [])
        yield from getattr(self, "upsamplers", [])


def make_levels(widths: tuple[int, ...], count: int, groups: int, resample: str) -> nn.ModuleList:
    levels = nn.ModuleList()
    for i, c_out in enumerate(widths):
        c_in = widths[max(i - 1, 0)]
        is_last = i == len(widths) - 1
        levels.append(Level(c_in, c_out, count, groups, None if is_last else resample))
    return levels


def run_levels(levels: nn.ModuleList, x: Tensor) -> Tensor:
    """All layers; one loop, so that no input of a whole level stays in memory."""
    for level in levels:
        for layer in level.layers():
            if isinstance(layer, ResnetBlock) and use_strips(x):
                x = resnet_in_strips(layer, x)
            elif isinstance(layer, Upsample) and use_strips(x, factor=2):
                x = in_strips(layer, x, x.shape[1], factor=2)
            else:
                x = layer(x)
    return x


class Encoder(nn.Module):
    def __init__(self, cfg: VAEConfig):
        super().__init__()
        c = cfg.block_out_channels
        groups = cfg.norm_num_groups
        self.conv_in = nn.Conv2d(cfg.in_channels, c[0], 3, padding=1)
        self.down_blocks = make_levels(c, cfg.layers_per_block, groups, "down")
        self.mid_block = MidBlock(c[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, c[-1], eps=EPS)
        self.conv_out = nn.Conv2d(c[-1], 2 * cfg.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> mean and log variance (B, 8, H/f, W/f)."""
        x = self.mid_block(run_levels(self.down_blocks, self.conv_in(x)))
        return self.conv_out(norm_silu(self.conv_norm_out, x))


class Decoder(nn.Module):
    def __init__(self, cfg: VAEConfig):
        super().__init__()
        c = cfg.block_out_channels[::-1]
        groups = cfg.norm_num_groups
        self.conv_in = nn.Conv2d(cfg.latent_channels, c[0], 3, padding=1)
        self.mid_block = MidBlock(c[0], groups)
        self.up_blocks = make_levels(c, cfg.layers_per_block + 1, groups, "up")
        self.conv_norm_out = nn.GroupNorm(groups, c[-1], eps=EPS)
        self.conv_out = nn.Conv2d(c[-1], cfg.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Latents (B, 4, h, w) -> images (B, 3, h·f, w·f)."""
        x = run_levels(self.up_blocks, self.mid_block(self.conv_in(x)))
        if use_strips(x):
            return conv_in_strips(self.conv_norm_out, self.conv_out, x)
        return self.conv_out(norm_silu(self.conv_norm_out, x))


# Large feature maps in strips of rows: a level of 2048 x 2048 with 256 channels is 2.1 GB in bf16.
# Convolutions see one row of the strips beside theirs, and GroupNorm's statistics are those of the
# whole map, so there are no seams.


def use_strips(x: Tensor, factor: int = 1) -> bool:
    """Whether a level of `factor` times the sides of x is processed in strips."""
    pixels = factor**2 * x[0, 0].numel()
    return pixels > STRIPS_ABOVE and not torch.is_grad_enabled()


def strips(x: Tensor) -> Iterator[tuple[int, int]]:
    """(first row, end row) of each strip of x (B, C, H, W)."""
    height, width = x.shape[-2:]
    rows = max(STRIP_PIXELS // width, 1)
    for start in range(0, height, rows):
        yield start, min(start + rows, height)


def in_strips(
    layer: Callable[[Tensor], Tensor],
    x: Tensor,
    channels: int,
    factor: int = 1,
    in_place: bool = False,
) -> Tensor:
    """layer(x): `channels` at `factor` times the sides, of which each row needs three of x.

    in_place: the result replaces x, which has the same shape.
    """
    batch, _, height, width = x.shape
    if in_place:
        result = x
    else:
        channels_last = x.is_contiguous(memory_format=torch.channels_last)
        result = torch.empty(
            (batch, channels, factor * height, factor * width),
            dtype=x.dtype,
            device=x.device,
            memory_format=torch.channels_last if channels_last else torch.contiguous_format,
        )
    above = x[:, :, :0]  # in place: the row above the strip, before it was replaced
    for start, end in strips(result):
        # The rows of x, one more above and one more below.
        top = max(start // factor - 1, 0)
        bottom = min(-(-end // factor) + 1, height)
        rows = x[:, :, top:bottom]
        if in_place:
            rows = torch.cat([above, x[:, :, start:bottom]], dim=2)
            above = x[:, :, end - 1 : end].clone()
        y = layer(rows)
        offset = factor * top
        result[:, :, start:end] = y[:, :, start - offset : end - offset]
    return result


def conv_in_strips(
    norm: nn.GroupNorm, conv: nn.Conv2d, x: Tensor, in_place: bool = False
) -> Tensor:
    """conv(silu(norm(x))), in place of x or not; norm(x) is a · x + b with a, b (B, C, 1, 1)."""
    mean = group_mean(x, norm.num_groups)
    variance = group_mean(x, norm.num_groups, mean)
    of_group = torch.arange(norm.num_groups, device=x.device)
    of_group = of_group.repeat_interleave(norm.num_channels // norm.num_groups)
    scale = (variance + norm.eps).rsqrt()
    a = scale[:, of_group, None] * norm.weight[:, None, None]
    b = norm.bias[:, None, None] - mean[:, of_group, None] * a

    def norm_silu_conv(rows: Tensor) -> Tensor:
        h = torch.addcmul(b, rows.to(a.dtype), a).to(x.dtype)
        return conv(F.silu(h, inplace=True))

    return in_strips(norm_silu_conv, x, conv.out_channels, in_place=in_place)


def group_mean(x: Tensor, groups: int, center: Tensor | None = None) -> Tensor:
    """The mean (B, groups, 1) of x or of (x − center)², in float32 or better."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    total = torch.zeros(len(x), groups, 1, dtype=dtype, device=x.device)
    for start, end in strips(x):
        rows = x[:, :, start:end].to(dtype)
        rows = rows.reshape(len(x), groups, -1)
        if center is not None:
            rows = (rows - center).square()
        total += rows.sum(-1, keepdim=True)
    return total / (x[0].numel() // groups)


def resnet_in_strips(resnet: ResnetBlock, x: Tensor) -> Tensor:
    """resnet(x)."""
    h = conv_in_strips(resnet.norm1, resnet.conv1, x)
    h = conv_in_strips(resnet.norm2, resnet.conv2, h, in_place=True)
    for start, end in strips(h):
        rows = x[:, :, start:end]
        h[:, :, start:end] += resnet.shortcut(rows)
    return h


class VAE(nn.Module):
    def __init__(self, config: VAEConfig = VAEConfig()):  # noqa: B008
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        channels = config.latent_channels
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [-1, 1] -> mean, std (B, 4, H/f, W/f) of the latents.

        The sides are multiples of f; results are float32 or better. Raises FloatingPointError for
        NaN or infinity.
        """
        x = self.encoder(images.to(self.quant_conv.weight.dtype))
        moments = self.quant_conv(x)
        moments = moments.to(torch.promote_types(moments.dtype, torch.float32))
        check_finite(moments, "encoded")
        mean, log_variance = moments.chunk(2, dim=1)
        std = torch.exp(0.5 * log_variance.clamp(-30, 20))
        return mean * self.config.scaling_factor, std * self.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, 4, h, w) -> images (B, 3, h·f, w·f), about [-1, 1], in the latents' dtype.

        Raises FloatingPointError for NaN or infinity.
        """
        x = latents / self.config.scaling_factor
        x = self.post_quant_conv(x.to(self.quant_conv.weight.dtype))
        images = self.decoder(x).to(latents.dtype)
        check_finite(images, "decoded")
        return images


def check_finite(x: Tensor, verb: str) -> None:
    if not x.isfinite().all():
        raise FloatingPointError(
            f"the VAE {verb} to NaN or infinity "
            "(the official VAE overflows in float16: use bfloat16 or float32)"
        )
