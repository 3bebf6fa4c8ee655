"""LoRA, a low-rank update beside a frozen weight (Hu et al. 2021, eq. 3).

    y = W x + scale · (alpha / rank) · up(down(x))

LoRALinear is an nn.Linear and LoRAConv2d an nn.Conv2d whose weight keeps its name, so a checkpoint
loads the same with and without adapters. Without adapters they are the plain layers.
A `model` below is a network, or an SDXL for all of its networks in memory.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arguments import checked

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # trained by default, in attn1 and attn2


class Adapter(nn.Module):
    """down (rank, in) and up (out, rank); of a convolution (rank, in, k, k) and (out, rank, 1, 1).

    Both stay float32 whatever the base is: a bf16 weight above 0.03 does not move at lr 1e-4.
    """

    def __init__(self, down: Tensor, up: Tensor, alpha: float, scale: float = 1.0):
        super().__init__()
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(up)
        self.alpha = float(alpha)
        self.scale = scale
        self.cast: tuple[Tensor, Tensor] | None = None  # down and up, set by cast_adapters

    @property
    def scaling(self) -> float:
        return self.scale * self.alpha / len(self.down)

    def delta(self) -> Tensor:
        """The update of the weight, (out, in) or (out, in, k, k), in the adapter's own dtype."""
        product = self.up.flatten(1) @ self.down.flatten(1)
        return self.scaling * product.view(len(self.up), *self.down.shape[1:])

    def apply_to(self, y: Tensor, x: Tensor, layer: nn.Module) -> Tensor:
        """y + scaling · up(down(x)) for input x and output y of `layer`, in the dtype of x."""
        down, up = self.cast or (self.down, self.up)
        down, up = down.to(x.dtype), up.to(x.dtype)
        if down.ndim == 4:
            hidden = F.conv2d(x, down, stride=layer.stride, padding=layer.padding)
            return y + self.scaling * F.conv2d(hidden, up)
        hidden = F.linear(x.flatten(0, -2), down)  # (N, rank)
        rows = y.flatten(0, -2)
        out = torch.addmm(rows, hidden, up.t(), alpha=self.scaling)
        return out.view(y.shape)


class LoRALayer:
    """A layer with named adapters. They are summed; an adapter with scale 0 is skipped."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.lora = nn.ModuleDict()
        self.base_weight: Tensor | None = None  # the weight before merging, on the CPU

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.base_weight is not None:
            return y
        for adapter in self.lora.values():
            if adapter.scale:
                y = adapter.apply_to(y, x, self)
        return y

    @torch.no_grad()
    def merge(self) -> None:
        """Add every adapter, at its scale, to the weight."""
        self.unmerge()
        active = [adapter for adapter in self.lora.values() if adapter.scale]
        if active:
            # A copy is kept, because subtracting the update again would round.
            self.base_weight = self.weight.detach().to("cpu", copy=True)
            update = sum(adapter.delta() for adapter in active)
            # Added in the wider of the two dtypes, then rounded once.
            self.weight.copy_(self.weight + update)

    @torch.no_grad()
    def unmerge(self) -> None:
        if self.base_weight is not None:
            self.weight.copy_(self.base_weight)
            self.base_weight = None


class LoRALinear(LoRALayer, nn.Linear):
    """y = W x + b, plus its adapters."""


class LoRAConv2d(LoRALayer, nn.Conv2d):
    """A convolution, plus its adapters."""


def layers(model: Any) -> dict[str, LoRALayer]:
    """{dotted name: layer that can hold adapters} of a model, in its order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALayer)}


def attention_layers(unet: nn.Module) -> dict[str, LoRALayer]:
    """The attention projections among the layers."""
    attention = {}
    for name, layer in layers(unet).items():
        if name.endswith(ATTENTION) and (".attn1." in name or ".attn2." in name):
            attention[name] = layer
    return attention


def adapters_of(found: Iterable[LoRALayer], name: str | None = None) -> list[Adapter]:
    """All adapters of these layers, or those called `name`."""
    chosen = []
    for layer in found:
        for key, adapter in layer.lora.items():
            if name is None or key == name:
                chosen.append(adapter)
    return chosen


def adapters(model: Any, name: str | None = None) -> list[Adapter]:
    """All adapters of a model, or those called `name`."""
    return adapters_of(layers(model).values(), name)


def add_adapter(
    layer: LoRALayer,
    name: str,
    down: Tensor,
    up: Tensor,
    alpha: float,
    scale: float = 1.0,
) -> None:
    """Give one layer the adapter `name`, replacing one of that name.

    Raises ValueError if the shapes do not match the layer, or while adapters are merged.
    """
    product_shape = (len(up), *down.shape[1:])
    up_shape = (len(up), len(down), *[1] * (down.ndim - 2))
    if product_shape != layer.weight.shape or up_shape != up.shape:
        raise ValueError(
            f"its down {tuple(down.shape)} and up {tuple(up.shape)} do not fit "
            f"the weight {tuple(layer.weight.shape)}"
        )
    if layer.base_weight is not None:
        raise ValueError("adapters are merged; unmerge before another one is added")
    device = layer.weight.device
    adapter = Adapter(down.to(device), up.to(device), alpha, scale)
    layer.lora[name] = adapter


@checked
def add_lora(
    sdxl: Any,
    rank: int = 16,
    alpha: float | None = None,
    name: str = "default",
    seed: int = 0,
) -> list[nn.Parameter]:
    """Add a new adapter to the UNet's attention projections; return its parameters, float32.

    down is uniform within ±1/√in (as in the authors' code), up is zero, so nothing changes before
    the first training step. alpha: None is `rank`, which makes alpha / rank 1.
    """
    alpha = rank if alpha is None else alpha
    generator = torch.Generator().manual_seed(seed)
    parameters = []
    for layer in attention_layers(sdxl.unet).values():
        bound = layer.in_features**-0.5
        unit = torch.rand(rank, layer.in_features, generator=generator)
        down = (unit * 2 - 1) * bound
        up = torch.zeros(layer.out_features, rank)
        add_adapter(layer, name, down, up, alpha)
        parameters += layer.lora[name].parameters()
    return parameters


def merge(model: Any) -> None:
    """Add all adapters of a model to its weights, which makes them free; see `unmerge`."""
    for layer in layers(model).values():
        layer.merge()


def unmerge(model: Any) -> None:
    """Restore every bit of the weights before `merge`."""
    for layer in layers(model).values():
        layer.unmerge()


def scalable_adapters(model: Any, name: str | None = None) -> list[Adapter]:
    """adapters(model, name). Raises ValueError while they are merged."""
    found = layers(model).values()  # once: in SDXL's UNet this takes milliseconds
    if any(layer.base_weight is not None for layer in found):
        raise ValueError("adapters are merged; unmerge before their scale is changed")
    return adapters_of(found, name)


@checked
def set_lora_scale(model: Any, scale: float, name: str | None = None) -> None:
    """Set the scale of all adapters of a model, or of those called `name`.

    Raises ValueError while adapters are merged, or if there is no adapter of that name.
    """
    chosen = scalable_adapters(model, name)
    if name is not None and not chosen:
        raise ValueError(f"no LoRA is called {name!r}")
    for adapter in chosen:
        adapter.scale = scale


@checked
@contextmanager
def lora_scale(model: Any, scale: float) -> Iterator[None]:
    """Inside, every adapter of the model has this scale; 0 is the unmodified model."""
    before = [(adapter, adapter.scale) for adapter in scalable_adapters(model)]
    for adapter, _ in before:
        adapter.scale = scale
    try:
        yield
    finally:
        for adapter, old in before:
            adapter.scale = old


class CastTogether(torch.autograd.Function):
    """float32 tensors to another dtype, and their gradients back, in one kernel per 64 tensors.

    Cast one by one, the adapters of SDXL's attention take 1,120 kernels each way.
    """

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
        torch._foreach_copy_(copies, list(tensors))
        return tuple(copies)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [grad for grad in grads if grad is not None]
        copies = [torch.empty_like(grad, dtype=torch.float32) for grad in given]
        if given:
            torch._foreach_copy_(copies, given)
        remaining = iter(copies)
        return None, *(grad if grad is None else next(remaining) for grad in grads)


@contextmanager
def cast_adapters(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """Inside, adapters compute with copies in `dtype`, that of the network, made once on entry.

    model: or a list of its adapters, which saves the time to look for them.
    For one training step (forward and backward, also with checkpointing) or for all steps of a
    sampling; without it, every layer casts down and up at every call. Gradients reach the float32
    parameters. A change of the parameters inside has no effect until the next entry.
    """
    found = model if isinstance(model, list) else adapters(model)
    cast = [adapter for adapter in found if adapter.down.dtype != dtype]
    if cast:
        downs = [adapter.down for adapter in cast]
        ups = [adapter.up for adapter in cast]
        copies = CastTogether.apply(dtype, *downs, *ups)
        for n, adapter in enumerate(cast):
            adapter.cast = copies[n], copies[len(cast) + n]
    try:
        yield
    finally:
        for adapter in cast:
            adapter.cast = None
