"""The two CLIP text encoders (Radford et al. 2021): token ids (B, 77) to the UNet's conditioning.

SDXL takes the hidden states before each encoder's last layer, without the final LayerNorm, and
concatenates them to the context (B, 77, 768 + 1280). The second encoder's state at the first EOS,
after all layers, the final LayerNorm and the projection, is the pooled vector (B, 1280).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import known_values
from .lora import LoRALinear

EOS = 49407


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


# The first encoder was trained with the sigmoid approximation, the second with the exact GELU.
ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


@dataclass(frozen=True)
class TextConfig:
    """The sizes, by the names of the official config.json; defaults: SDXL's first encoder."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 768

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "TextConfig":
        """The values of a config.json. Raises ValueError for an unknown activation."""
        chosen = cls(**known_values(cls, config))
        if chosen.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"text encoder config.json: hidden_act is {chosen.hidden_act!r}; "
                f"known are {', '.join(ACTIVATIONS)}"
            )
        return chosen


class SelfAttention(nn.Module):
    """Multi-head self-attention; causal in text (padding included), not in images."""

    def __init__(self, dim: int, heads: int, causal: bool = True):
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.q_proj = LoRALinear(dim, dim)
        self.k_proj = LoRALinear(dim, dim)
        self.v_proj = LoRALinear(dim, dim)
        self.out_proj = LoRALinear(dim, dim)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, d)

    def forward(self, x: Tensor) -> Tensor:
        q = self.split_heads(self.q_proj(x))
        k = self.split_heads(self.k_proj(x))
        v = self.split_heads(self.v_proj(x))
        x = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(x.transpose(1, 2).flatten(2))  # (B, N, C)


class MLP(nn.Module):
    def __init__(self, cfg: TextConfig):
        super().__init__()
        self.fc1 = LoRALinear(cfg.hidden_size, cfg.intermediate_size)
        self.fc2 = LoRALinear(cfg.intermediate_size, cfg.hidden_size)
        self.activation = ACTIVATIONS[cfg.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self, cfg: TextConfig, causal: bool = True):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)
        self.self_attn = SelfAttention(cfg.hidden_size, cfg.num_attention_heads, causal)
        self.layer_norm2 = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)
        self.mlp = MLP(cfg)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nn.Module):
    def __init__(self, cfg: TextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.position_embedding = nn.Embedding(cfg.max_position_embeddings, cfg.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class TextModel(nn.Module):
    """Holds the parts under their official names (`encoder.layers`); TextEncoder runs them."""

    def __init__(self, cfg: TextConfig):
        super().__init__()
        self.embeddings = Embeddings(cfg)
        self.encoder = nn.Module()
        layers = [Layer(cfg) for _ in range(cfg.num_hidden_layers)]
        self.encoder.layers = nn.ModuleList(layers)
        self.final_layer_norm = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)


class TextEncoder(nn.Module):
    """One of SDXL's text encoders; with `projection` the second, which has a pooled output."""

    def __init__(self, config: TextConfig = TextConfig(), projection: bool = False):  # noqa: B008
        super().__init__()
        self.config = config
        self.projection = projection
        self.text_model = TextModel(config)
        if projection:
            self.text_projection = LoRALinear(config.hidden_size, config.projection_dim, bias=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """ids (B, 77) -> penultimate hidden states (B, 77, D), pooled (B, P) or None."""
        model = self.text_model
        x = model.embeddings(ids)  # (B, 77, D)
        for layer in model.encoder.layers[:-1]:
            x = layer(x)
        if not self.projection:
            return x, None

        # The final LayerNorm is for the pooled vector only.
        last = model.final_layer_norm(model.encoder.layers[-1](x))
        # The first EOS: the padding may be EOS too, and added tokens have higher ids than EOS.
        end = (ids == EOS).int().argmax(dim=1)
        rows = torch.arange(len(ids), device=ids.device)
        return x, self.text_projection(last[rows, end])
