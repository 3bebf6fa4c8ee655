"""From the tensors of one layer in a LoRA file to its adapter: LoRA, LoCon, LoHa, LoKr, full.

LoRA (Hu et al. 2021)        ΔW = up · down
LoCon with Tucker            ΔW = up · mid · down, mid (rank, rank, k, k), down a 1 x 1 convolution
LoHa (LyCORIS)               ΔW = (w1_a · w1_b) ⊙ (w2_a · w2_b)
LoKr (LyCORIS)               ΔW = w1 ⊗ w2, either a product of two factors or whole
full (.diff)                 ΔW itself

All but the last are multiplied by alpha / rank.
"""

import re
from collections.abc import Callable
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import lora

# The end of a key, which names the part of a layer's update that the tensor is.
PART = re.compile(
    r"\.(?:(?:lora_linear_layer\.|lora[._])?(down|up|mid)\.weight"  # kohya, diffusers
    r"|lora_([AB])(?:\.default)?(?:\.weight)?"  # peft
    r"|(alpha|diff|hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2))$"  # LyCORIS
)


class FullAdapter(lora.Adapter):
    """An update of the whole weight, (out, in) or (out, in, k, k), for a layer's `lora`."""

    def __init__(self, update: Tensor):
        super().__init__(update, update.new_zeros(len(update), 0), alpha=len(update))

    def delta(self) -> Tensor:
        return self.scale * self.down

    def apply_to(self, y: Tensor, x: Tensor, layer: nn.Module) -> Tensor:
        update = self.down.to(x.dtype)
        if update.ndim == 4:
            change = F.conv2d(x, update, stride=layer.stride, padding=layer.padding)
        else:
            change = F.linear(x, update)
        return y + self.scale * change


def split_key(key: str) -> tuple[str, str] | None:
    """(the name of the layer, the part of its update) of a key; None for any other key."""
    match = PART.search(key)
    if match is None:
        return None
    part = match[1] or match[2] or match[3]
    return key[: match.start()], {"A": "down", "B": "up"}.get(part, part)


def build_adapter(
    layer: str,
    tensors: dict[str, Tensor],
    shape: tuple[int, ...],
    alpha_of: Callable[[str, int], float],
    base: str,
) -> lora.Adapter:
    """The adapter of a layer whose weight has this shape.

    tensors: {part: float32 tensor}. alpha_of(layer, rank): alpha where the tensors do not hold it.
    base: the checkpoint, for messages. Raises ValueError if parts are missing or do not fit.
    """
    described = " and ".join(f"{part} {tuple(t.shape)}" for part, t in tensors.items())
    damaged = ValueError(f"{layer} has {described}, which are not one update; the file is damaged")
    if not all(tensor.numel() for tensor in tensors.values()):
        raise damaged
    parts = dict(tensors)
    alpha = parts.pop("alpha", None)
    is_low_rank = "down" in parts
    try:
        if is_low_rank:
            down, up = low_rank(parts, shape)
            theirs, ours = (len(up), *down.shape[1:]), tuple(shape)
        else:
            update, rank = full_rank(parts, prod(shape))
            theirs, ours = tuple(update.shape), (shape[0], prod(shape[1:]))
        alpha = alpha if alpha is None else alpha.item()
    except (LookupError, TypeError, ValueError, RuntimeError):
        raise damaged from None
    if parts:
        raise damaged
    if theirs != ours:
        raise ValueError(
            f"made for another base: {layer} is {ours} in {base}, {theirs} in the file; "
            "give its base with --weights"
        )
    if is_low_rank:
        return lora.Adapter(down, up, alpha_of(layer, len(down)) if alpha is None else alpha)
    scaling = 1.0 if alpha is None or rank is None else alpha / rank
    return FullAdapter(scaling * update.view(shape))


def low_rank(parts: dict[str, Tensor], shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(down, up) of a LoRA, taken out of its parts; Tucker's mid is multiplied into down."""
    down, up, mid = parts.pop("down"), parts.pop("up"), parts.pop("mid", None)
    if mid is not None:
        if down.shape[1:] != (shape[1], 1, 1):
            raise ValueError("down of a Tucker decomposition is a 1 x 1 convolution")
        down = torch.einsum("r s k l, s i -> r i k l", mid, down.flatten(1))
    if down.ndim not in (2, 4) or up.shape[1:] != (len(down), *[1] * (down.ndim - 2)):
        raise ValueError("up does not fit down")
    return down, up


def full_rank(parts: dict[str, Tensor], size: int) -> tuple[Tensor, int | None]:
    """(ΔW before alpha / rank, flat: (out, in · k · k); the rank, None if there is no such factor).

    The parts are taken out of the dict. size: the number of elements that ΔW may have.
    """
    if "diff" in parts:
        return parts.pop("diff").flatten(1), None
    if "hada_w1_b" in parts:
        rank = len(parts["hada_w1_b"])
        w1, w2 = factor(parts, "hada_w1", size), factor(parts, "hada_w2", size)
        if w1.shape != w2.shape:
            raise ValueError("the factors differ in shape")
        return w1 * w2, rank
    # If both factors are products, alpha refers to the rank of the second.
    ranks = [len(parts[part]) for part in ("lokr_w2_b", "lokr_w1_b") if part in parts]
    w1, w2 = factor(parts, "lokr_w1", size), factor(parts, "lokr_w2", size)
    if w1.numel() * w2.numel() > size:
        raise ValueError("larger than the weight")
    return torch.kron(w1, w2), ranks[0] if ranks else None


def factor(parts: dict[str, Tensor], name: str, size: int) -> Tensor:
    """A factor of ΔW, flat, taken out of the parts: whole, a · b, or Tucker's core times both."""
    if name in parts:
        return parts.pop(name).flatten(1)
    a, b = parts.pop(f"{name}_a"), parts.pop(f"{name}_b")
    core = parts.pop(name.replace("_w", "_t"), None)
    out = len(a) if core is None else a.shape[1] * prod(core.shape[2:])
    # Compared before the product is made: a small file may claim a huge update.
    if a.ndim != 2 or b.ndim != 2 or out * b.shape[1] > size:
        raise ValueError("larger than the weight")
    if core is None:
        return a @ b
    return torch.einsum("r s k l, r o, s i -> o i k l", core, a, b).flatten(1)
