"""Attention over the places of a picture, to each other (attn1) and to the words of the prompt (attn2).

softmax(q kᵀ / √d) v            Vaswani et al. 2017, eq. 1
"""

from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from .lora import LoRALinear


class Attention(nn.Module):
    """x (B, N, C) looks at what it is told (B, M, C) of, or at itself. Each of `watch` is given the probabilities (B, heads, N, M)."""

    def __init__(self, dim, heads, context_dim=None):
        super().__init__()
        self.heads, self.watch = heads, ()
        self.to_q = LoRALinear(dim, dim, bias=False)
        self.to_k = LoRALinear(context_dim or dim, dim, bias=False)
        self.to_v = LoRALinear(context_dim or dim, dim, bias=False)
        self.to_out = nn.ModuleList([LoRALinear(dim, dim)])  # a list, so that the key is to_out.0

    def told(self, context):
        """Keys and values (B, M, C) of the context (B, M, D)."""
        return self.to_k(context), self.to_v(context)

    def forward(self, x, told=None):
        q, (k, v) = self.to_q(x), told or self.told(x)
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v)
        )  # (B, heads, N or M, d)
        for see in self.watch:
            see(
                torch.softmax(
                    (q.float() * q.shape[-1] ** -0.5) @ k.float().transpose(-1, -2), dim=-1
                )
            )
        x = F.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](x.transpose(1, 2).flatten(2))  # (B, N, C)


@contextmanager
def record_attention(unet, names, see):
    """Inside, each forward of the attention layers in names calls see(name, probabilities (B, heads, N, M) float32).

    names end in attn1 or attn2 (see `attentions`). What the layers compute does not change by a bit. One watch within another: both see.
    """
    known = attentions(unet)
    for name in names:
        if name not in known:
            raise ValueError(
                f"no attention layer {name!r}; there are {', '.join(list(known)[:3])}, ..."
            )
    try:
        for name in names:
            known[name].watch += (partial(see, name),)
        yield
    finally:
        for name in names:
            known[name].watch = known[name].watch[:-1]


def attentions(unet):
    """{dotted name: Attention} in the order in which the UNet runs them."""
    order = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
    found = [(name, m) for name, m in unet.named_modules() if isinstance(m, Attention)]
    return dict(sorted(found, key=lambda item: order[item[0].split(".")[0]]))


class GEGLU(nn.Module):
    """h · gelu(gate); the gate is the second half, with the exact (erf) gelu. Shazeer 2020, eq. 5."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.proj = LoRALinear(dim, 2 * hidden)

    def forward(self, x):
        h, gate = self.proj(x).chunk(2, dim=-1)
        return h * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, dim):
        super().__init__()
        # The middle of the official list is a dropout, which has no weights: the keys are net.0 and net.2.
        self.net = nn.ModuleList([GEGLU(dim, 4 * dim), nn.Identity(), LoRALinear(4 * dim, dim)])

    def forward(self, x):
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    def __init__(self, dim, heads, context_dim):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.attn1 = Attention(dim, heads)
        self.attn2 = Attention(dim, heads, context_dim)
        self.ff = FeedForward(dim)

    def forward(self, x, told):
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), told)
        return x + self.ff(self.norm3(x))


class Transformer2D(nn.Module):
    """Transformer blocks over the places of a picture (B, C, H, W), which become a sequence of H · W tokens and a picture again."""

    def __init__(self, channels, heads, depth, context_dim, groups):
        super().__init__()
        self.norm = nn.GroupNorm(
            groups, channels, eps=1e-6
        )  # 1e-6 here, 1e-5 in the resnets beside it
        self.proj_in = LoRALinear(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            [TransformerBlock(channels, heads, context_dim) for _ in range(depth)]
        )
        self.proj_out = LoRALinear(channels, channels)

    def forward(self, x, context):
        residual, shape = x, x.shape[-2:]
        x = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))  # (B, H·W, C)
        for block in self.transformer_blocks:
            x = block(x, block.attn2.told(context))
        return residual + self.proj_out(x).transpose(1, 2).unflatten(2, shape)
