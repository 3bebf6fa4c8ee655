"""The VAE: images (B, 3, H, W) in [-1, 1] to latents (B, 4, H/f, W/f) and back; f is 8 for SDXL.

Latents are multiplied by scaling_factor (0.13025 for SDXL, which makes their variance about 1) in
encode and divided by it in decode, and nowhere else. Kingma & Welling 2014; Rombach et al. 2022.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Downsample, ResnetBlock, Upsample, norm_silu

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
        chosen = {f.name: config[f.name] for f in fields(cls) if config.get(f.name) is not None}
        if "block_out_channels" in chosen:
            chosen["block_out_channels"] = tuple(chosen["block_out_channels"])
        return cls(**chosen)


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
        h = self.group_norm(x).flatten(2).transpose(1, 2)[:, None]  # (B, 1, H·W, C)
        h = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        return x + self.to_out[0](h)[:, 0].transpose(1, 2).unflatten(2, x.shape[-2:])


class MidBlock(nn.Module):
    def __init__(self, channels: int, groups: int):
        super().__init__()
        resnets = [ResnetBlock(channels, channels, groups, EPS) for _ in range(2)]
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList([MidAttention(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Level(nn.Module):
    """Resnets at one resolution, then `resample` (a Downsample or Upsample) except at the end."""

    def __init__(self, c_in: int, c_out: int, count: int, groups: int, resample: str | None):
        super().__init__()
        widths = [c_in] + [c_out] * count
        resnets = [ResnetBlock(widths[i], c_out, groups, EPS) for i in range(count)]
        self.resnets = nn.ModuleList(resnets)
        if resample == "down":
            self.downsamplers = nn.ModuleList([Downsample(c_out, padding=0)])
        if resample == "up":
            self.upsamplers = nn.ModuleList([Upsample(c_out)])

    def layers(self) -> list[nn.Module]:
        resample = getattr(self, "downsamplers", getattr(self, "upsamplers", []))
        return [*self.resnets, *resample]


def run(levels: nn.ModuleList, x: Tensor) -> Tensor:
    """All layers of the levels; one loop, so that no input of a whole level stays in memory."""
    for layer in [layer for level in levels for layer in level.layers()]:
        if isinstance(layer, ResnetBlock) and use_strips(x):
            x = resnet_in_strips(layer, x)
        elif isinstance(layer, Upsample) and use_strips(x, factor=2):
            x = upsample_in_strips(layer, x)
        else:
            x = layer(x)
    return x


def levels(widths: tuple[int, ...], count: int, groups: int, resample: str) -> nn.ModuleList:
    made = []
    for i, c_out in enumerate(widths):
        is_last = i == len(widths) - 1
        c_in = widths[max(i - 1, 0)]
        made.append(Level(c_in, c_out, count, groups, None if is_last else resample))
    return nn.ModuleList(made)


class Encoder(nn.Module):
    def __init__(self, cfg: VAEConfig):
        super().__init__()
        c, groups = cfg.block_out_channels, cfg.norm_num_groups
        self.conv_in = nn.Conv2d(cfg.in_channels, c[0], 3, padding=1)
        self.down_blocks = levels(c, cfg.layers_per_block, groups, "down")
        self.mid_block = MidBlock(c[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, c[-1], eps=EPS)
        self.conv_out = nn.Conv2d(c[-1], 2 * cfg.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> mean and log variance (B, 8, H/f, W/f)."""
        x = self.mid_block(run(self.down_blocks, self.conv_in(x)))
        return self.conv_out(norm_silu(self.conv_norm_out, x))


class Decoder(nn.Module):
    def __init__(self, cfg: VAEConfig):
        super().__init__()
        c, groups = cfg.block_out_channels[::-1], cfg.norm_num_groups
        self.conv_in = nn.Conv2d(cfg.latent_channels, c[0], 3, padding=1)
        self.mid_block = MidBlock(c[0], groups)
        self.up_blocks = levels(c, cfg.layers_per_block + 1, groups, "up")
        self.conv_norm_out = nn.GroupNorm(groups, c[-1], eps=EPS)
        self.conv_out = nn.Conv2d(c[-1], cfg.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Latents (B, 4, h, w) -> images (B, 3, h·f, w·f)."""
        x = run(self.up_blocks, self.mid_block(self.conv_in(x)))
        if use_strips(x):
            return conv_in_strips(self.conv_out, x, self.conv_norm_out)
        return self.conv_out(norm_silu(self.conv_norm_out, x))


# Large feature maps in strips of rows: a level of 2048 x 2048 with 256 channels is 2.1 GB in bf16.
# Convolutions see one row of the strips beside theirs, and GroupNorm's statistics are those of the
# whole map, so there are no seams.


def use_strips(x: Tensor, factor: int = 1) -> bool:
    """Whether a level of `factor` times the sides of x is processed in strips."""
    return not torch.is_grad_enabled() and factor**2 * x[0, 0].numel() > STRIPS_ABOVE


def strips(x: Tensor) -> Iterator[tuple[int, int]]:
    """(first row, end row) of each strip of x (B, C, H, W)."""
    height, width = x.shape[-2:]
    rows = max(STRIP_PIXELS // width, 1)
    for start in range(0, height, rows):
        yield start, min(start + rows, height)


def empty(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    """A new tensor with the dtype, device and memory format of x."""
    is_last = x.is_contiguous(memory_format=torch.channels_last)
    form = torch.channels_last if is_last else torch.contiguous_format
    size = (len(x), channels, height, width)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=form)


def norm_factors(norm: nn.GroupNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """a and b (B, C, 1, 1) with norm(x) = a x + b, statistics in float32 or better."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    means, variances, rows = [], [], []
    for start, end in strips(x):
        part = x[:, :, start:end].to(dtype).reshape(len(x), norm.num_groups, -1)
        variance, mean = torch.var_mean(part, dim=-1, correction=0)  # (B, groups)
        means.append(mean)
        variances.append(variance)
        rows.append(end - start)
    share = torch.tensor(rows, dtype=dtype, device=x.device)[:, None, None] / sum(rows)
    means, variances = torch.stack(means), torch.stack(variances)
    mean = (share * means).sum(0)
    variance = (share * (variances + (means - mean).square())).sum(0)
    scale = (variance + norm.eps).rsqrt()
    channels = x.shape[1] // norm.num_groups
    mean, scale = mean.repeat_interleave(channels, 1), scale.repeat_interleave(channels, 1)
    a = scale * norm.weight
    b = norm.bias - mean * a
    return a[..., None, None], b[..., None, None]


def activated(x: Tensor, factors: tuple[Tensor, Tensor]) -> Tensor:
    """silu(norm(x)) of a strip, by the factors of the whole."""
    a, b = factors
    return F.silu(torch.addcmul(b, x.to(a.dtype), a).to(x.dtype), inplace=True)


def conv_strip(conv: nn.Module, x: Tensor, start: int, end: int, factors: tuple) -> Tensor:
    """Rows start to end of conv(silu(norm(x))), of a 3 x 3 convolution with padding 1."""
    top, bottom = max(start - 1, 0), min(end + 1, x.shape[-2])
    y = conv(activated(x[:, :, top:bottom], factors))
    return y[:, :, start - top : y.shape[-2] - (bottom - end)]


def conv_in_strips(conv: nn.Module, x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """conv(silu(norm(x)))."""
    factors = norm_factors(norm, x)
    y = empty(x, conv.out_channels, *x.shape[-2:])
    for start, end in strips(x):
        y[:, :, start:end] = conv_strip(conv, x, start, end, factors)
    return y


def resnet_in_strips(resnet: ResnetBlock, x: Tensor) -> Tensor:
    """resnet(x), holding x and one tensor of the output's size."""
    h = conv_in_strips(resnet.conv1, x, resnet.norm1)
    factors = norm_factors(resnet.norm2, h)
    # The result replaces h from the top; the last row of h before a strip is still needed then.
    above = None
    for start, end in strips(h):
        rows = h[:, :, start : end + 1]
        rows = rows if above is None else torch.cat([above, rows], dim=2)
        first = 0 if above is None else 1
        y = conv_strip(resnet.conv2, rows, first, first + end - start, factors)
        above = h[:, :, end - 1 : end].clone()
        h[:, :, start:end] = y + resnet.shortcut(x[:, :, start:end])
    return h


def upsample_in_strips(upsample: Upsample, x: Tensor) -> Tensor:
    """upsample(x), without the interpolated tensor."""
    channels, height, width = x.shape[1:]
    result = empty(x, channels, 2 * height, 2 * width)
    for start, end in strips(result):
        # Source rows, with one above and one below; strips may start at an odd row of the result.
        top, bottom = max(start // 2 - 1, 0), min((end + 1) // 2 + 1, height)
        y = upsample(x[:, :, top:bottom])
        result[:, :, start:end] = y[:, :, start - 2 * top : end - 2 * top]
    return result


class VAE(nn.Module):
    def __init__(self, config: VAEConfig = VAEConfig()):  # noqa: B008
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [-1, 1] -> mean, std (B, 4, H/f, W/f) of the latents.

        The sides are multiples of f; results are float32 or better. Raises FloatingPointError for
        NaN or infinity.
        """
        moments = self.quant_conv(self.encoder(images.to(self.quant_conv.weight.dtype)))
        moments = moments.to(torch.promote_types(moments.dtype, torch.float32))
        mean, log_variance = moments.chunk(2, dim=1)
        check_finite(moments, "encoded")
        std = torch.exp(0.5 * log_variance.clamp(-30, 20))
        return mean * self.config.scaling_factor, std * self.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, 4, h, w) -> images (B, 3, h·f, w·f), about [-1, 1], in the latents' dtype.

        Raises FloatingPointError for NaN or infinity.
        """
        x = (latents / self.config.scaling_factor).to(self.quant_conv.weight.dtype)
        images = self.decoder(self.post_quant_conv(x)).to(latents.dtype)
        check_finite(images, "decoded")
        return images


def check_finite(x: Tensor, verb: str) -> None:
    if not x.isfinite().all():
        raise FloatingPointError(
            f"the VAE {verb} to NaN or infinity "
            "(the official VAE overflows in float16: use bfloat16 or float32)"
        )
