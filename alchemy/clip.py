"""The two CLIP text encoders (Radford et al. 2021): token ids (B,77) to what attn2 looks at.

SDXL concatenates the hidden states before each encoder's last layer, without the final LayerNorm, to the context (B,77,768+1280);
the second encoder's end-of-text state, through all layers, LayerNorm and projection, is the pooled vector (B,1280).
"""

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn

from .lora import LoRALinear

EOS = 49407


@dataclass(frozen=True)
class TextConfig:
    """The sizes, by the names of the official config.json; the defaults are SDXL's first encoder."""

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
    def from_config(cls, config):
        chosen = {f.name: config[f.name] for f in fields(cls) if config.get(f.name) is not None}
        if chosen.get("hidden_act", "gelu") not in ACTIVATIONS:
            raise ValueError(
                f"text encoder config.json: hidden_act is {chosen['hidden_act']!r}; known are {', '.join(ACTIVATIONS)}"
            )
        return cls(**chosen)


# The first encoder was trained with the sigmoid approximation, the second with the exact (erf) gelu.
ACTIVATIONS = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu}


class SelfAttention(nn.Module):
    """Causal in text: a token sees itself and the tokens before it, padding too. (Images: not.)"""

    def __init__(self, dim, heads, causal=True):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            LoRALinear(dim, dim) for _ in range(4)
        )

    def forward(self, x):
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        x = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)  # (B, heads, N, d)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.fc1, self.fc2 = (
            LoRALinear(cfg.hidden_size, cfg.intermediate_size),
            LoRALinear(cfg.intermediate_size, cfg.hidden_size),
        )
        self.act = ACTIVATIONS[cfg.hidden_act]

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self, cfg, causal=True):
        super().__init__()
        self.layer_norm1, self.layer_norm2 = (
            nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps) for _ in range(2)
        )
        self.self_attn = SelfAttention(cfg.hidden_size, cfg.num_attention_heads, causal)
        self.mlp = MLP(cfg)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.token_embedding = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.position_embedding = nn.Embedding(cfg.max_position_embeddings, cfg.hidden_size)

    def forward(self, ids):
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class TextModel(nn.Module):
    """`encoder.layers`, so named because the official keys are."""

    def __init__(self, cfg):
        super().__init__()
        self.embeddings = Embeddings(cfg)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList([Layer(cfg) for _ in range(cfg.num_hidden_layers)])
        self.final_layer_norm = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)


class TextEncoder(nn.Module):
    def __init__(self, config=TextConfig(), projection=False):
        """projection: whether it is the second encoder, which has a text_projection and gives the pooled vector."""
        super().__init__()
        self.config = config
        self.text_model = TextModel(config)
        if projection:
            self.text_projection = LoRALinear(config.hidden_size, config.projection_dim, bias=False)
        self.projection = projection

    def forward(self, ids):
        """ids (B,77) -> the penultimate hidden states (B,77,D), and the pooled vector (B,P), or None of the first encoder."""
        model = self.text_model
        x = model.embeddings(ids)
        for layer in model.encoder.layers[:-1]:
            x = layer(x)
        if not self.projection:
            return x, None
        last = model.final_layer_norm(model.encoder.layers[-1](x))
        end = (
            (ids == EOS).int().argmax(dim=1)
        )  # the first: padding may be EOS too, and learned tokens have higher ids
        return x, self.text_projection(last[torch.arange(len(ids), device=ids.device), end])
