"""The VAE: pictures (B,3,H,W) in [-1,1] to latents (B,4,H/f,W/f) and back. f is 8 for SDXL, 4 for the miniature.

Latents are times scaling_factor (0.13025 for SDXL, which makes their variance about one) from encode to decode, everywhere.
Kingma & Welling 2014; Rombach et al. 2022.
"""

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn

from .blocks import Downsample, ResnetBlock, Upsample

EPS = 1e-6  # of every GroupNorm here


@dataclass(frozen=True)
class VAEConfig:
    """The sizes, by the names of the official config.json; the defaults are SDXL's."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.13025
    force_upcast: bool = True  # activations overflow float16

    @classmethod
    def from_config(cls, config):
        chosen = {f.name: config[f.name] for f in fields(cls) if config.get(f.name) is not None}
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in chosen.items()})


class MidAttention(nn.Module):
    """One head over all places."""

    def __init__(self, channels, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x):
        h = self.group_norm(x).flatten(2).transpose(1, 2)[:, None]  # (B, 1, H·W, C)
        h = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        return x + self.to_out[0](h)[:, 0].transpose(1, 2).unflatten(2, x.shape[-2:])


class MidBlock(nn.Module):
    def __init__(self, channels, groups):
        super().__init__()
        self.resnets = nn.ModuleList(
            [ResnetBlock(channels, channels, groups, EPS) for _ in range(2)]
        )
        self.attentions = nn.ModuleList([MidAttention(channels, groups)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Level(nn.Module):
    """Resnets at one resolution, then a change of it, or none."""

    def __init__(self, c_in, c_out, layers, groups, down=False, up=False):
        super().__init__()
        self.resnets = nn.ModuleList(
            [ResnetBlock(c_in if i == 0 else c_out, c_out, groups, EPS) for i in range(layers)]
        )
        if down:
            self.downsamplers = nn.ModuleList([Downsample(c_out, padding=0)])
        if up:
            self.upsamplers = nn.ModuleList([Upsample(c_out)])

    def forward(self, x):
        for resnet in self.resnets:
            x = resnet(x)
        for resample in [*getattr(self, "downsamplers", []), *getattr(self, "upsamplers", [])]:
            x = resample(x)
        return x


class Encoder(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        c, groups = cfg.block_out_channels, cfg.norm_num_groups
        self.conv_in = nn.Conv2d(cfg.in_channels, c[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            [
                Level(c[max(i - 1, 0)], c[i], cfg.layers_per_block, groups, down=i < len(c) - 1)
                for i in range(len(c))
            ]
        )
        self.mid_block = MidBlock(c[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, c[-1], eps=EPS)
        self.conv_out = nn.Conv2d(
            c[-1], 2 * cfg.latent_channels, 3, padding=1
        )  # mean and log variance

    def forward(self, x):
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        c, groups = cfg.block_out_channels[::-1], cfg.norm_num_groups
        self.conv_in = nn.Conv2d(cfg.latent_channels, c[0], 3, padding=1)
        self.mid_block = MidBlock(c[0], groups)
        self.up_blocks = nn.ModuleList(
            [
                Level(c[max(i - 1, 0)], c[i], cfg.layers_per_block + 1, groups, up=i < len(c) - 1)
                for i in range(len(c))
            ]
        )
        self.conv_norm_out = nn.GroupNorm(groups, c[-1], eps=EPS)
        self.conv_out = nn.Conv2d(c[-1], cfg.out_channels, 3, padding=1)

    def forward(self, x):
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    def __init__(self, config=VAEConfig()):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, images):
        """(B,3,H,W) in [-1,1], sides a multiple of the factor -> mean and std (B,4,H/f,W/f) of the latents, float32 or better. Raises as decode does."""
        moments = self.quant_conv(self.encoder(images.to(self.quant_conv.weight.dtype)))
        moments = moments.to(torch.promote_types(moments.dtype, torch.float32))
        mean, log_variance = moments.chunk(2, dim=1)
        if not moments.isfinite().all():
            raise FloatingPointError(
                "the VAE encoded to NaN or infinity (the official VAE overflows in float16: use bfloat16 or float32)"
            )
        std = torch.exp(0.5 * log_variance.clamp(-30, 20))
        return mean * self.config.scaling_factor, std * self.config.scaling_factor

    def decode(self, latents):
        """(B,4,h,w) -> pictures (B,3,h·f,w·f), about [-1,1], in the dtype of the latents. Raises FloatingPointError where not finite."""
        x = (latents / self.config.scaling_factor).to(self.quant_conv.weight.dtype)
        images = self.decoder(self.post_quant_conv(x)).to(latents.dtype)
        if not images.isfinite().all():
            raise FloatingPointError(
                "the VAE decoded to NaN or infinity (the official VAE overflows in float16: use bfloat16 or float32)"
            )
        return images
