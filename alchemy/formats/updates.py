"""From the tensors of one layer in a LoRA file to its adapter: LoRA, LoCon, LoHa, LoKr, full.

LoRA (Hu et al. 2021)        ΔW = up · down
LoCon with Tucker            ΔW = up · mid · down, mid (rank, rank, k, k), down a 1 x 1 convolution
LoHa (LyCORIS)               ΔW = (w1_a · w1_b) ⊙ (w2_a · w2_b)
LoKr (LyCORIS)               ΔW = w1 ⊗ w2, either a product of two factors or whole
full (.diff)                 ΔW itself

All but the last are multiplied by alpha / rank.
"""

from collections.abc import Callable
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import lora

# The end of a key: the part of a layer's update that it holds. Longer endings come first.
PARTS = {
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".down.weight": "down",
    ".up.weight": "up",
    ".lora_A": "down",
    ".lora_B": "up",
    ".hada_w1_a": "w1_a",
    ".hada_w1_b": "w1_b",
    ".hada_w2_a": "w2_a",
    ".hada_w2_b": "w2_b",
    ".hada_t1": "t1",
    ".hada_t2": "t2",
    ".lokr_w1": "w1",
    ".lokr_w2": "w2",
    ".lokr_w1_a": "kron_w1_a",
    ".lokr_w1_b": "kron_w1_b",
    ".lokr_w2_a": "kron_w2_a",
    ".lokr_w2_b": "kron_w2_b",
    ".lokr_t2": "kron_t2",
    ".diff": "diff",
    ".alpha": "alpha",
}


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
    tensors = dict(tensors)
    alpha = tensors.pop("alpha", None)
    if alpha is not None and alpha.numel() != 1:
        raise ValueError(f"{layer} has an alpha of {alpha.numel()} values; the file is damaged")
    alpha = None if alpha is None else float(alpha)
    parts = set(tensors)
    mismatch = ValueError(
        f"{layer} has {describe(tensors)}, which do not belong together; the file is damaged"
    )
    if parts == {"down", "up"} or parts == {"down", "up", "mid"}:
        down, up = low_rank(tensors, shape, mismatch)
        check_shape(layer, (len(up), *down.shape[1:]), shape, base)
        alpha = alpha_of(layer, len(down)) if alpha is None else alpha
        if abs(alpha) == float("inf") or alpha != alpha:
            raise ValueError(f"{layer} has an alpha that is not finite; the file is damaged")
        return lora.Adapter(down, up, alpha)
    if parts == {"diff"}:
        update = tensors["diff"]
        check_shape(layer, tuple(update.shape), shape, base)
        return FullAdapter(update)
    if parts in ({"w1_a", "w1_b", "w2_a", "w2_b"}, {"w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"}):
        update, rank = hadamard(layer, tensors, shape, base, mismatch)
    elif any(part.startswith(("kron", "w1", "w2")) for part in parts):
        update, rank = kronecker(layer, tensors, shape, base, mismatch)
    else:
        raise ValueError(f"{layer} has {describe(tensors)}, but not the other part")
    factor = 1.0 if alpha is None or rank is None else alpha / rank
    return FullAdapter(factor * update)


def describe(tensors: dict[str, Tensor]) -> str:
    return " and ".join(f"{part} {tuple(tensor.shape)}" for part, tensor in tensors.items())


def check_shape(layer: str, theirs: tuple, ours: tuple, base: str) -> None:
    if theirs != ours:
        raise ValueError(
            f"made for another base: {layer} is {ours} in {base}, {theirs} in the file; "
            "give its base with --weights"
        )


def low_rank(tensors: dict[str, Tensor], shape: tuple, mismatch: ValueError) -> tuple:
    """(down, up) of a LoRA; Tucker's mid is multiplied into down, which keeps the rank."""
    down, up = tensors["down"], tensors["up"]
    if "mid" in tensors:
        mid = tensors["mid"]
        fits = mid.ndim == down.ndim == 4 and mid.shape[1] == len(down)
        if not fits or down.shape[1:] != (shape[1], 1, 1) or mid.shape[2:] != shape[2:]:
            raise mismatch
        down = torch.einsum("r s k l, s i -> r i k l", mid, down.flatten(1))
    kernel = down.shape[2:]
    if down.ndim not in (2, 4) or not len(down):
        raise mismatch
    if up.shape[1:] != (len(down), *[1] * len(kernel)):
        raise mismatch
    return down, up


def rebuild_tucker(core: Tensor, left: Tensor, right: Tensor, mismatch: ValueError) -> Tensor:
    """core (r, s, k, k), left (r, out), right (s, in) to (out, in, k, k)."""
    if core.ndim != 4 or left.ndim != 2 or right.ndim != 2:
        raise mismatch
    if core.shape[:2] != (len(left), len(right)):
        raise mismatch
    return torch.einsum("r s k l, r o, s i -> o i k l", core, left, right)


def hadamard(layer: str, t: dict[str, Tensor], shape: tuple, base: str, mismatch: ValueError):
    """(the update of a LoHa, its rank)."""
    factors = []
    for n in "12":
        a, b, core = t[f"w{n}_a"], t[f"w{n}_b"], t.get(f"t{n}")
        if a.ndim != 2 or b.ndim != 2 or not len(b):
            raise mismatch
        if core is None:
            # Sizes are compared before the product is made: a small file may claim a huge one.
            check_shape(layer, (len(a), b.shape[1]), (shape[0], prod(shape[1:])), base)
            if a.shape[1] != len(b):
                raise mismatch
            factors.append((a @ b).view(shape))
        else:
            check_shape(layer, (a.shape[1], b.shape[1], *core.shape[2:]), shape, base)
            factors.append(rebuild_tucker(core, a, b, mismatch))
    return factors[0] * factors[1], len(t["w1_b"])


def kronecker(layer: str, t: dict[str, Tensor], shape: tuple, base: str, mismatch: ValueError):
    """(the update of a LoKr, the rank that alpha refers to, None if both factors are whole)."""
    factors, rank = [], None
    for n in "12":
        whole, a, b = t.get(f"w{n}"), t.get(f"kron_w{n}_a"), t.get(f"kron_w{n}_b")
        if whole is not None:
            factors.append(whole)
            continue
        if a is None or b is None or a.ndim != 2 or b.ndim != 2:
            raise mismatch
        rank = len(b)  # of the second factor, if both are products
        core = t.get("kron_t2") if n == "2" else None
        width = b.shape[1]
        height = len(a) if core is None else a.shape[1]
        if height > shape[0] or width > prod(shape[1:]) or not rank:
            raise mismatch
        if core is not None:
            factors.append(rebuild_tucker(core, a, b, mismatch))
        elif a.shape[1] == rank:
            factors.append(a @ b)
        else:
            raise mismatch
    w1, w2 = factors
    if w1.ndim != 2 or w2.ndim not in (2, 4):
        raise mismatch
    # A convolution's second factor may be flat; the product has the same order of elements.
    size = (len(w1) * len(w2), w1.shape[1] * prod(w2.shape[1:]))
    check_shape(layer, size, (shape[0], prod(shape[1:])), base)
    w1 = w1.view(*w1.shape, *[1] * (w2.ndim - 2))
    return torch.kron(w1, w2.contiguous()).reshape(shape), rank
