"""LoRA, a low-rank correction beside a frozen weight: y = W x + scale · (alpha/rank) · up(down(x)).   Hu et al. 2021, eq. 3

LoRALinear is an nn.Linear, LoRAConv2d an nn.Conv2d, whose weight keeps its name, so a checkpoint loads the same with and without
adapters. They are used wherever an adapter may be asked for; without one, they are the plain layer.

Where a function here takes a model, it takes a network, or an SDXL for all its networks in memory.
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

ATTENTION = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
)  # what train.py teaches: the projections of attn1 and attn2


class Adapter(nn.Module):
    """down (rank, in) and up (out, rank), of a convolution (rank, in, k, k) and (out, rank, 1, 1).

    float32 whatever the base is: in bf16 a weight above 0.03 would not move at lr 1e-4."""

    def __init__(self, down, up, alpha, scale=1.0):
        super().__init__()
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)
        self.alpha, self.scale = float(alpha), scale

    @property
    def factor(self):
        return self.scale * self.alpha / len(self.down)

    def delta(self):
        """The change of the weight (out, in) or (out, in, k, k), in the adapter's own dtype."""
        return self.factor * (self.up.flatten(1) @ self.down.flatten(1)).view(
            len(self.up), *self.down.shape[1:]
        )

    def add_to(self, y, x, layer):
        """y + factor · up(down(x)) for x and y of that layer, the products in the dtype of x."""
        if self.down.ndim == 4:
            hidden = F.conv2d(x, self.down.to(x.dtype), stride=layer.stride, padding=layer.padding)
            return y + self.factor * F.conv2d(hidden, self.up.to(x.dtype))
        hidden = F.linear(x.flatten(0, -2), self.down.to(x.dtype))  # (N, rank)
        return torch.addmm(
            y.flatten(0, -2), hidden, self.up.t().to(x.dtype), alpha=self.factor
        ).view(y.shape)


class LoRALayer:
    """A layer with named adapters beside its weight; several add up, one at scale 0 costs nothing and changes no bit."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.lora = nn.ModuleDict()
        self.base_weight = None  # the weight before merging

    def forward(self, x):
        y = super().forward(x)
        if self.base_weight is None:
            for adapter in self.lora.values():
                if adapter.scale:
                    y = adapter.add_to(y, x, self)
        return y

    @torch.no_grad()
    def merge(self):
        """Add every adapter at its scale to the weight. The original waits on the CPU, since subtracting again would round."""
        self.unmerge()
        if any(a.scale for a in self.lora.values()):
            self.base_weight = self.weight.detach().to("cpu", copy=True)
            change = sum(a.delta() for a in self.lora.values() if a.scale)
            self.weight.copy_(
                self.weight + change
            )  # added in the finer of the two dtypes, then rounded

    @torch.no_grad()
    def unmerge(self):
        if self.base_weight is not None:
            self.weight.copy_(self.base_weight)
            self.base_weight = None


class LoRALinear(LoRALayer, nn.Linear):
    """y = W x + b, and what its adapters add."""


class LoRAConv2d(LoRALayer, nn.Conv2d):
    """A convolution, and what its adapters add."""


def layers(model):
    """{dotted name: layer that can hold adapters} of a model, in its order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALayer)}


def attention_layers(unet):
    """Those of the layers that are attention's projections."""
    return {
        name: m
        for name, m in layers(unet).items()
        if name.endswith(ATTENTION) and (".attn1." in name or ".attn2." in name)
    }


def add_adapter(layer, name, down, up, alpha, scale=1.0):
    """Give one layer the adapter `name` (in place of one of that name). Raises ValueError where the shapes do not fit."""
    if (len(up), *down.shape[1:]) != layer.weight.shape or up.shape[1:] != (
        len(down),
        *(1 for _ in down.shape[2:]),
    ):
        raise ValueError(
            f"its down {tuple(down.shape)} and up {tuple(up.shape)} do not fit the weight {tuple(layer.weight.shape)}"
        )
    if layer.base_weight is not None:
        raise ValueError("adapters are merged; unmerge before another one is added")
    layer.lora[name] = Adapter(
        down.to(layer.weight.device), up.to(layer.weight.device), alpha, scale
    )


def add_lora(sdxl, rank=16, alpha=None, name="default", seed=0):
    """Put a fresh adapter on the UNet's attention projections; returns its parameters, float32, for the optimizer.

    down is uniform within ±1/√in (as the authors' code has it), up is zero: before the first step nothing has changed.
    alpha: None is rank, so that alpha/rank is 1.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}; it must be at least 1")
    generator, parameters = torch.Generator().manual_seed(seed), []
    for layer in attention_layers(sdxl.unet).values():
        down = (
            torch.rand(rank, layer.in_features, generator=generator) * 2 - 1
        ) / layer.in_features**0.5
        add_adapter(
            layer,
            name,
            down,
            torch.zeros(layer.out_features, rank),
            rank if alpha is None else alpha,
        )
        parameters += layer.lora[name].parameters()
    return parameters


def merge(model):
    """Fold all adapters of a model into its weights, for speed; unmerge(model) restores every bit."""
    for layer in layers(model).values():
        layer.merge()


def unmerge(model):
    for layer in layers(model).values():
        layer.unmerge()


@contextmanager
def lora_scale(model, scale):
    """Inside, every adapter of the model has this scale (0: the unmodified model); the old scales come back afterwards."""
    if any(layer.base_weight is not None for layer in layers(model).values()):
        raise ValueError("adapters are merged; unmerge before their scale is changed")
    adapters = [a for layer in layers(model).values() for a in layer.lora.values()]
    before = [a.scale for a in adapters]
    try:
        for a in adapters:
            a.scale = scale
        yield
    finally:
        for a, old in zip(adapters, before):
            a.scale = old
