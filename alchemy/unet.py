"""The UNet: noisy latents, a timestep and the conditioning to the prediction (epsilon or v).

SDXL base (Podell et al. 2023; 2.57 billion parameters) at 1024 x 1024:

    level   channels   latents     depth of a transformer   heads   channels of its skips
    0       320        128 x 128   no transformer           -       320 (conv_in), 320, 320, 320
    1       640         64 x 64    2                        10      640, 640, 640
    2       1280        32 x 32    10                       20      1280, 1280
    middle  1280        32 x 32    10                       20      -

The last skip of levels 0 and 1 is the downsampled result, at the size of the next level.
The up blocks consume the nine skips in reverse, three per level.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import Transformer2D
from .blocks import Downsample, ResnetBlock, Upsample, known_values, norm_silu
from .lora import LoRAConv2d, LoRALinear


@dataclass(frozen=True)
class UNetConfig:
    """The sizes, by the names of the official config.json; defaults: SDXL base."""

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280)
    down_block_types: tuple[str, ...] = ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2
    up_block_types: tuple[str, ...] = ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",)
    layers_per_block: int = 2
    transformer_layers_per_block: tuple[int, ...] = (1, 2, 10)
    # Numbers of heads, despite the name, which is upstream's and stays in the files.
    attention_head_dim: tuple[int, ...] = (5, 10, 20)
    cross_attention_dim: int = 2048
    addition_time_embed_dim: int = 256
    projection_class_embeddings_input_dim: int = 2816
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    sample_size: int = 128

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "UNetConfig":
        """The values of a config.json; a single number in place of a list is for every level."""
        values = known_values(cls, config)
        levels = len(values.get("block_out_channels", cls.block_out_channels))
        for name in ("transformer_layers_per_block", "attention_head_dim"):
            if isinstance(values.get(name), int):
                values[name] = (values[name],) * levels
        return cls(**values)


def timestep_embedding(values: Tensor, dim: int) -> Tensor:
    """Numbers (N,) to (N, dim), float32: cosines, then sines, of wavelengths from 2π to 20000π.

    Vaswani et al. 2017, 3.5. Always float32: bfloat16 would round a timestep or size above 256.
    """
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=values.device)
    frequency = torch.exp(-math.log(10000) * steps / half)
    angle = values.float()[:, None] * frequency  # (N, half)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)  # (N, dim)


class Embedding(nn.Module):
    """Linear, SiLU, Linear."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.linear_1 = LoRALinear(c_in, c_out)
        self.linear_2 = LoRALinear(c_out, c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


def make_resnets(cfg: UNetConfig, inputs: list[int], c_out: int) -> nn.ModuleList:
    """A resnet to c_out channels for each number of input channels."""
    embedding = 4 * cfg.block_out_channels[0]
    resnets = nn.ModuleList()
    for c_in in inputs:
        resnets.append(ResnetBlock(c_in, c_out, cfg.norm_num_groups, cfg.norm_eps, embedding))
    return resnets


def make_transformers(cfg: UNetConfig, level: int, count: int) -> nn.ModuleList:
    """`count` transformers of a level's width, depth and number of heads."""
    transformers = nn.ModuleList()
    for _ in range(count):
        transformer = Transformer2D(
            cfg.block_out_channels[level],
            cfg.attention_head_dim[level],
            cfg.transformer_layers_per_block[level],
            cfg.cross_attention_dim,
            cfg.norm_num_groups,
        )
        transformers.append(transformer)
    return transformers


class DownBlock(nn.Module):
    """Resnets, each followed by a transformer if the level has attention, then a downsampling.

    Every result is also a skip, that of the downsampling too. `run` calls a layer: see UNet.run.
    """

    def __init__(self, cfg: UNetConfig, level: int):
        super().__init__()
        widths = cfg.block_out_channels
        c = widths[level]
        is_last = level == len(widths) - 1
        has_attention = "CrossAttn" in cfg.down_block_types[level]
        above = widths[max(level - 1, 0)]
        inputs = [above] + [c] * (cfg.layers_per_block - 1)
        self.resnets = make_resnets(cfg, inputs, c)
        self.attentions = make_transformers(cfg, level, len(inputs) if has_attention else 0)
        self.downsamplers = nn.ModuleList([] if is_last else [Downsample(c, padding=1)])

    def forward(
        self, x: Tensor, emb: Tensor, context: Tensor, skips: list[Tensor], run: Callable
    ) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            x = run(resnet, x, emb)
            if self.attentions:
                x = self.attentions[i](x, context, run)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        return x


class MidBlock(nn.Module):
    """Resnet, transformer, resnet."""

    def __init__(self, cfg: UNetConfig):
        super().__init__()
        c = cfg.block_out_channels[-1]
        self.resnets = make_resnets(cfg, [c, c], c)
        self.attentions = make_transformers(cfg, level=-1, count=1)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, run: Callable) -> Tensor:
        x = run(self.resnets[0], x, emb)
        x = self.attentions[0](x, context, run)
        return run(self.resnets[1], x, emb)


class UpBlock(nn.Module):
    """A DownBlock with one more resnet and an upsampling; each resnet also takes the last skip.

    index counts from the coarsest level.
    """

    def __init__(self, cfg: UNetConfig, index: int):
        super().__init__()
        widths = cfg.block_out_channels
        level = len(widths) - 1 - index
        c = widths[level]
        # Each resnet's input is x and a skip. The first x comes from the level below, and the last
        # skip from the level above: its downsampled result.
        below = widths[min(level + 1, len(widths) - 1)]
        above = widths[max(level - 1, 0)]
        inputs = [below + c] + [c + c] * (cfg.layers_per_block - 1) + [c + above]
        has_attention = "CrossAttn" in cfg.up_block_types[index]
        self.resnets = make_resnets(cfg, inputs, c)
        self.attentions = make_transformers(cfg, level, len(inputs) if has_attention else 0)
        self.upsamplers = nn.ModuleList([Upsample(c)] if level else [])

    def forward(
        self, x: Tensor, emb: Tensor, context: Tensor, skips: list[Tensor], run: Callable
    ) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            x = torch.cat([x, skips.pop()], dim=1)
            x = run(resnet, x, emb)
            if self.attentions:
                x = self.attentions[i](x, context, run)
        for upsample in self.upsamplers:
            x = upsample(x, size=skips[-1].shape[-2:])  # the next skip's size, so odd sides work
        return x


class UNet(nn.Module):
    """The whole U. `checkpointing` = True recomputes activations in the backward pass."""

    def __init__(self, config: UNetConfig = UNetConfig()):  # noqa: B008
        super().__init__()
        self.config = config
        self.checkpointing = False
        c = config.block_out_channels[0]
        levels = range(len(config.block_out_channels))
        self.conv_in = LoRAConv2d(config.in_channels, c, 3, padding=1)
        self.time_embedding = Embedding(c, 4 * c)
        self.add_embedding = Embedding(config.projection_class_embeddings_input_dim, 4 * c)
        self.down_blocks = nn.ModuleList([DownBlock(config, level) for level in levels])
        self.mid_block = MidBlock(config)
        self.up_blocks = nn.ModuleList([UpBlock(config, index) for index in levels])
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, c, eps=config.norm_eps)
        self.conv_out = LoRAConv2d(c, config.out_channels, 3, padding=1)

    def forward(
        self,
        latents: Tensor,
        t: Tensor | float,
        context: Tensor,
        pooled: Tensor,
        time_ids: Tensor,
    ) -> Tensor:
        """latents (B,4,h,w), t (B,) or a number, context (B,77,C), pooled (B,P), time_ids (B,6).

        Returns the prediction (B,4,h,w) in the dtype of latents. time_ids, in pixels: height and
        width of the original image, top and left of the crop, height and width of the target.
        """
        dtype = self.conv_in.weight.dtype
        emb = self.embed(len(latents), t, pooled, time_ids, dtype)  # (B, 1280)
        x = self.conv_in(latents.to(dtype))  # (B, 320, h, w)
        context = context.to(dtype)

        skips = [x]
        for block in self.down_blocks:  # 320, 640, 1280 channels at h, h/2, h/4
            x = block(x, emb, context, skips, self.run)
        x = self.mid_block(x, emb, context, self.run)  # (B, 1280, h/4, w/4)
        for block in self.up_blocks:  # 1280, 640, 320 channels at h/4, h/2, h
            x = block(x, emb, context, skips, self.run)

        x = self.conv_out(norm_silu(self.conv_norm_out, x))  # (B, 4, h, w)
        return x.to(latents.dtype)

    def embed(
        self,
        batch: int,
        t: Tensor | float,
        pooled: Tensor,
        time_ids: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        """The sum (B, 4 C) of the embeddings of the timestep and of (pooled, time_ids)."""
        device = pooled.device
        if not torch.is_tensor(t):
            t = torch.full((), t, device=device)  # torch.as_tensor would wait for the device
        t = t.to(device).expand(batch)
        times = timestep_embedding(t, self.conv_in.out_channels)
        sizes = timestep_embedding(time_ids.flatten(), self.config.addition_time_embed_dim)
        sizes = sizes.view(batch, -1)  # (B, 6 · 256)
        pooled, sizes = pooled.to(dtype), sizes.to(dtype)
        added = torch.cat([pooled, sizes], dim=-1)  # pooled first
        return self.time_embedding(times.to(dtype)) + self.add_embedding(added)

    def run(self, layer: nn.Module, *inputs: Tensor) -> Tensor:
        """layer(*inputs); with checkpointing, its activations are recomputed when needed."""
        if self.checkpointing and torch.is_grad_enabled():
            # No layer draws random numbers, so their state need not be kept.
            return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
        return layer(*inputs)
