"""The UNet: from noisy latents, a timestep and the conditioning to the prediction (epsilon or v).

SDXL base (2.57 billion parameters) at 1024 x 1024:

    level   channels   latents     transformer depth   heads   skips kept (their channels)
    0       320        128 x 128   none                -       conv_in 320, 320, 320, downsampled 320
    1       640         64 x 64    2                   10      640, 640, downsampled 640
    2       1280        32 x 32    10                  20      1280, 1280
    middle  1280        32 x 32    10                  20      -

The way up takes the nine skips back from the last to the first, three a level. Podell et al. 2023.
"""

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .attention import Transformer2D
from .blocks import Downsample, ResnetBlock, Upsample
from .lora import LoRAConv2d, LoRALinear


@dataclass(frozen=True)
class UNetConfig:
    """The sizes, by the names of the official config.json; the defaults are SDXL base."""

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple = (320, 640, 1280)
    down_block_types: tuple = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
    up_block_types: tuple = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
    layers_per_block: int = 2
    transformer_layers_per_block: tuple = (1, 2, 10)
    attention_head_dim: tuple = (
        5,
        10,
        20,
    )  # a misnomer kept upstream for its files' sake: these are numbers of heads
    cross_attention_dim: int = 2048
    addition_time_embed_dim: int = 256
    projection_class_embeddings_input_dim: int = 2816
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    sample_size: int = 128

    @classmethod
    def from_config(cls, config):
        """Take what a config.json (a dict) says. A single number for a list holds for every level."""
        chosen = {f.name: config[f.name] for f in fields(cls) if config.get(f.name) is not None}
        levels = len(chosen.get("block_out_channels", cls.block_out_channels))
        for name in ("transformer_layers_per_block", "attention_head_dim"):
            if isinstance(chosen.get(name), int):
                chosen[name] = (chosen[name],) * levels
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in chosen.items()})


def timestep_embedding(values, dim):
    """Numbers (N,) to (N, dim) in float32: cosines first, then sines, of wavelengths from 2π to 20000π. Vaswani et al. 2017, 3.5."""
    half = dim // 2
    frequency = torch.exp(
        -math.log(10000) * torch.arange(half, dtype=torch.float32, device=values.device) / half
    )
    angle = values.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class Embedding(nn.Module):
    """Linear, SiLU, Linear."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.linear_1, self.linear_2 = LoRALinear(c_in, c_out), LoRALinear(c_out, c_out)

    def forward(self, x):
        return self.linear_2(F.silu(self.linear_1(x)))


def transformers(cfg, level, count):
    """count transformers of a level's width, depth and number of heads."""
    return nn.ModuleList(
        [
            Transformer2D(
                cfg.block_out_channels[level],
                cfg.attention_head_dim[level],
                cfg.transformer_layers_per_block[level],
                cfg.cross_attention_dim,
                cfg.norm_num_groups,
            )
            for _ in range(count)
        ]
    )


def resnets(cfg, channels):
    """A resnet for each (in, out) of channels."""
    return nn.ModuleList(
        [
            ResnetBlock(a, b, cfg.norm_num_groups, cfg.norm_eps, 4 * cfg.block_out_channels[0])
            for a, b in channels
        ]
    )


class DownBlock(nn.Module):
    """Resnets, each followed by a transformer where the level has attention; every result is a skip, the halved one too."""

    def __init__(self, cfg, level):
        super().__init__()
        c_in, c = cfg.block_out_channels[max(level - 1, 0)], cfg.block_out_channels[level]
        last = level == len(cfg.block_out_channels) - 1
        self.resnets = resnets(cfg, [(c_in, c)] + [(c, c)] * (cfg.layers_per_block - 1))
        self.attentions = transformers(
            cfg, level, len(self.resnets) if "CrossAttn" in cfg.down_block_types[level] else 0
        )
        self.downsamplers = nn.ModuleList([] if last else [Downsample(c, padding=1)])

    def forward(self, x, emb, context, skips, run):
        for i, resnet in enumerate(self.resnets):
            x = run(resnet, x, emb)
            x = run(self.attentions[i], x, context) if self.attentions else x
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        return x


class MidBlock(nn.Module):
    """Resnet, transformer, resnet."""

    def __init__(self, cfg):
        super().__init__()
        c = cfg.block_out_channels[-1]
        self.resnets = resnets(cfg, [(c, c)] * 2)
        self.attentions = transformers(cfg, -1, 1)

    def forward(self, x, emb, context, run):
        x = run(self.attentions[0], run(self.resnets[0], x, emb), context)
        return run(self.resnets[1], x, emb)


class UpBlock(nn.Module):
    """As the DownBlock, one resnet more; each takes the last skip left beside its input. index counts from the coarsest level."""

    def __init__(self, cfg, index):
        super().__init__()
        widths, level = cfg.block_out_channels, len(cfg.block_out_channels) - 1 - index
        c = widths[level]
        # What comes up, then what the skips bring: this level's own resnets, at the end the level below's downsampled result.
        arriving = [widths[min(level + 1, len(widths) - 1)]] + [c] * cfg.layers_per_block
        skipped = [c] * cfg.layers_per_block + [widths[max(level - 1, 0)]]
        self.resnets = resnets(cfg, [(a + b, c) for a, b in zip(arriving, skipped)])
        self.attentions = transformers(
            cfg, level, len(self.resnets) if "CrossAttn" in cfg.up_block_types[index] else 0
        )
        self.upsamplers = nn.ModuleList([Upsample(c)] if level else [])

    def forward(self, x, emb, context, skips, run):
        for i, resnet in enumerate(self.resnets):
            x = run(resnet, torch.cat([x, skips.pop()], dim=1), emb)
            x = run(self.attentions[i], x, context) if self.attentions else x
        for upsample in self.upsamplers:
            x = upsample(
                x, size=skips[-1].shape[-2:]
            )  # to the size of the skip it meets: odd sides work
        return x


class UNet(nn.Module):
    def __init__(self, config=UNetConfig()):
        super().__init__()
        cfg, levels, c = config, range(len(config.block_out_channels)), config.block_out_channels[0]
        self.config, self.checkpointing = config, False
        self.conv_in = LoRAConv2d(cfg.in_channels, c, 3, padding=1)
        self.time_embedding = Embedding(c, 4 * c)
        self.add_embedding = Embedding(cfg.projection_class_embeddings_input_dim, 4 * c)
        self.down_blocks = nn.ModuleList([DownBlock(cfg, level) for level in levels])
        self.mid_block = MidBlock(cfg)
        self.up_blocks = nn.ModuleList([UpBlock(cfg, index) for index in levels])
        self.conv_norm_out = nn.GroupNorm(cfg.norm_num_groups, c, eps=cfg.norm_eps)
        self.conv_out = LoRAConv2d(c, cfg.out_channels, 3, padding=1)

    def forward(self, latents, t, context, pooled, time_ids):
        """latents (B,4,h,w), t (B,) or a number, context (B,77,C), pooled (B,P), time_ids (B,6) -> prediction (B,4,h,w), latents' dtype.

        time_ids: height and width of the original, top and left of the crop, height and width of the target, in pixels.
        """
        dtype = self.conv_in.weight.dtype
        t = (
            t if torch.is_tensor(t) else torch.full((), t, device=latents.device)
        )  # of a number; torch.as_tensor would wait for the device
        emb = self.time_embedding(
            timestep_embedding(
                t.to(latents.device).expand(len(latents)), self.conv_in.out_channels
            ).to(dtype)
        )
        sizes = timestep_embedding(time_ids.flatten(), self.config.addition_time_embed_dim).view(
            len(latents), -1
        )  # (B, 6 · 256)
        emb = emb + self.add_embedding(
            torch.cat([pooled.to(dtype), sizes.to(dtype)], dim=-1)
        )  # pooled first

        x, context, skips = self.conv_in(latents.to(dtype)), context.to(dtype), []
        skips.append(x)
        for block in self.down_blocks:
            x = block(x, emb, context, skips, self.run)
        x = self.mid_block(x, emb, context, self.run)
        for block in self.up_blocks:
            x = block(x, emb, context, skips, self.run)
        return self.conv_out(F.silu(self.conv_norm_out(x))).to(latents.dtype)

    def run(self, layer, *inputs):
        """layer(*inputs); with checkpointing on, its inner activations are computed again in the backward pass, not kept."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(
                layer, *inputs, use_reentrant=False, preserve_rng_state=False
            )  # there is no chance in it
        return layer(*inputs)
