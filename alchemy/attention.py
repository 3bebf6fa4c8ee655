"""Self-attention of the positions of an image (attn1), cross-attention to the prompt (attn2).

softmax(q kᵀ / √d) v            Vaswani et al. 2017, eq. 1
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .lora import LoRALinear


class Attention(nn.Module):
    """Multi-head attention from x (B, N, C) to a context (B, M, D), or to x itself."""

    def __init__(self, dim: int, heads: int, context_dim: int | None = None):
        super().__init__()
        self.heads = heads
        self.callbacks: tuple[tuple[Callable, slice], ...] = ()  # see record_attention
        self.to_q = LoRALinear(dim, dim, bias=False)
        self.to_k = LoRALinear(context_dim or dim, dim, bias=False)
        self.to_v = LoRALinear(context_dim or dim, dim, bias=False)
        self.to_out = nn.ModuleList([LoRALinear(dim, dim)])  # a list, so that the key is to_out.0

    def project_kv(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, each (B, M, C), of a context (B, M, D)."""
        return self.to_k(context), self.to_v(context)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, d)

    def forward(self, x: Tensor, kv: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x (B, N, C) -> (B, N, C). kv: project_kv of a context; without it, of x."""
        k, v = kv or self.project_kv(x)
        q = self.split_heads(self.to_q(x))
        k = self.split_heads(k)
        v = self.split_heads(v)
        for callback, rows in self.callbacks:
            scaled_q = q[rows].float() * q.shape[-1] ** -0.5
            scores = scaled_q @ k[rows].float().transpose(-1, -2)
            callback(torch.softmax(scores, dim=-1))  # (B, heads, N, M)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](x.transpose(1, 2).flatten(2))


@contextmanager
def record_attention(
    unet: nn.Module,
    names: Iterable[str],
    callback: Callable[[str, Tensor], None],
    last_only: bool = False,
) -> Iterator[None]:
    """Inside, each forward of the named attention layers calls callback(name, probabilities).

    names: keys of `attentions(unet)`; probabilities are (B, heads, N, M) float32. The output of
    the layers does not change by a bit. Contexts nest. Raises ValueError for an unknown name.
    last_only: compute them only for the last of the batch, the conditional half under guidance.
    """
    known = attentions(unet)
    chosen = {}
    for name in names:
        if name not in known:
            first = ", ".join(list(known)[:3])
            raise ValueError(f"no attention layer {name!r}; there are {first}, ...")
        chosen[name] = known[name]
    rows = slice(-1, None) if last_only else slice(None)
    try:
        for name, layer in chosen.items():
            layer.callbacks += ((partial(callback, name), rows),)
        yield
    finally:
        for layer in chosen.values():
            layer.callbacks = layer.callbacks[:-1]


def attentions(unet: nn.Module) -> dict[str, Attention]:
    """{dotted name: attention layer} in the order in which the UNet runs them."""
    ordered = {}
    for part in ("down_blocks", "mid_block", "up_blocks"):
        for name, module in unet.get_submodule(part).named_modules(prefix=part):
            if isinstance(module, Attention):
                ordered[name] = module
    return ordered


class GEGLU(nn.Module):
    """h · gelu(gate); the gate is the second half, the GELU exact (erf). Shazeer 2020, eq. 5."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.proj = LoRALinear(dim, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        h, gate = self.proj(x).chunk(2, dim=-1)
        return h * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.ModuleList()
        self.net.append(GEGLU(dim, 4 * dim))
        self.net.append(nn.Identity())  # a dropout in the official list, inactive
        self.net.append(LoRALinear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    def __init__(self, dim: int, heads: int, context_dim: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, heads, context_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, kv: tuple[Tensor, Tensor]) -> Tensor:
        """x (B, N, C), keys and values (B, M, C) of the prompt -> (B, N, C)."""
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), kv)
        return x + self.ff(self.norm3(x))


class Transformer2D(nn.Module):
    """Transformer blocks over the H · W positions of a feature map (B, C, H, W)."""

    def __init__(self, channels: int, heads: int, depth: int, context_dim: int, groups: int):
        super().__init__()
        # eps is 1e-6 here and 1e-5 in the resnets of the same network.
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = LoRALinear(channels, channels)
        blocks = [TransformerBlock(channels, heads, context_dim) for _ in range(depth)]
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = LoRALinear(channels, channels)

    def forward(self, x: Tensor, context: Tensor, run: Callable) -> Tensor:
        """x (B, C, H, W), context (B, M, D) -> (B, C, H, W). run: see UNet.run."""
        h = self.norm(x).flatten(2).transpose(1, 2)  # (B, H·W, C)
        h = self.proj_in(h)
        for block in self.transformer_blocks:
            h = run(block, h, block.attn2.project_kv(context))
        h = self.proj_out(h).transpose(1, 2)  # (B, C, H·W)
        return x + h.unflatten(2, x.shape[-2:])
