"""The two vision transformers that likeness is measured with: DINO ViT-S/16 and CLIP ViT-B/32.

Both are one class (Dosovitskiy et al. 2021): patches and a CLS token through pre-norm blocks. CLIP
(Radford et al. 2021) adds a LayerNorm before the blocks and a projection after them; DINO (Caron
et al. 2021) has a bias in its patch embedding and the exact GELU. Module attributes carry the
tensor names of CLIP's file; `dino_name` gives the names in DINO's.
"""

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..clip import ACTIVATIONS

DINO_NAMES = (
    ("vision_model.embeddings.class_embedding", "embeddings.cls_token"),
    ("vision_model.embeddings.patch_embedding", "embeddings.patch_embeddings.projection"),
    ("vision_model.embeddings.position_embedding.weight", "embeddings.position_embeddings"),
    ("vision_model.encoder.layers", "encoder.layer"),
    ("vision_model.post_layernorm", "layernorm"),
    ("layer_norm1", "layernorm_before"),
    ("layer_norm2", "layernorm_after"),
    ("self_attn.q_proj", "attention.attention.query"),
    ("self_attn.k_proj", "attention.attention.key"),
    ("self_attn.v_proj", "attention.attention.value"),
    ("self_attn.out_proj", "attention.output.dense"),
    ("mlp.fc1", "intermediate.dense"),
    ("mlp.fc2", "output.dense"),
)


def dino_name(name: str) -> str:
    """The name in a DINO file (facebook/dino-vits16) of the tensor `name` of VisionTransformer."""
    for ours, theirs in DINO_NAMES:
        name = name.replace(ours, theirs)
    return name


@dataclass(frozen=True)
class VisionConfig:
    """Sizes, by the names in config.json; the defaults are those of CLIP ViT-B/32."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int | None = (
        512  # None is DINO: no projection and no LayerNorm before the blocks
    )

    @classmethod
    def from_config(cls, config: dict) -> "VisionConfig":
        """The config.json of a CLIP model, of its vision half alone, or of a ViT such as DINO."""
        if config.get("model_type") == "vit":
            defaults = dict(patch_size=16, hidden_act="gelu", layer_norm_eps=1e-12)
            config = defaults | config | {"projection_dim": None}
        elif "vision_config" in config:
            # The projection of the whole model; the half's own value is a default that is not used.
            config = config["vision_config"] | {"projection_dim": config.get("projection_dim", 512)}
        chosen = {field.name: config[field.name] for field in fields(cls) if field.name in config}
        return cls(**chosen)


class SelfAttention(nn.Module):
    """Every token sees every token."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        dim = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, d)
        k = self.k_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(x.transpose(1, 2).flatten(2))  # (B, N, D)


class Block(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.act = ACTIVATIONS[config.hidden_act]
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = SelfAttention(config)
        self.mlp = nn.Module()
        self.mlp.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.mlp.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp.fc2(self.act(self.mlp.fc1(self.layer_norm2(x))))


class Embeddings(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        dim, patch = config.hidden_size, config.patch_size
        self.side = config.image_size // patch
        self.class_embedding = nn.Parameter(torch.zeros(dim))
        self.patch_embedding = nn.Conv2d(3, dim, patch, patch, bias=config.projection_dim is None)
        self.position_embedding = nn.Embedding(self.side**2 + 1, dim)

    def positions(self, height: int, width: int) -> Tensor:
        """(1 + height * width, D), interpolated where the grid is not the trained one."""
        weight = self.position_embedding.weight
        if (height, width) == (self.side, self.side):
            return weight
        grid = weight[1:].T.unflatten(1, (self.side, self.side))[None]  # (1, D, side, side)
        grid = F.interpolate(grid, (height, width), mode="bicubic", align_corners=False)
        return torch.cat([weight[:1], grid[0].flatten(1).T])

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels)  # (B, D, h, w)
        cls = self.class_embedding.expand(len(pixels), 1, -1)
        x = torch.cat([cls, patches.flatten(2).transpose(1, 2)], dim=1)  # (B, 1 + h * w, D)
        return x + self.positions(*patches.shape[-2:])


class VisionTransformer(nn.Module):
    """Normalised pixels (B, 3, H, W) to features: CLS (B, D), or image embedding (B, P) of CLIP.

    H and W are multiples of the patch size.
    """

    def __init__(self, config: VisionConfig = VisionConfig()):
        super().__init__()
        self.config = config
        norm = dict(normalized_shape=config.hidden_size, eps=config.layer_norm_eps)
        model = self.vision_model = nn.Module()
        model.embeddings = Embeddings(config)
        if config.projection_dim:
            model.pre_layrnorm = nn.LayerNorm(**norm)  # the official name is misspelt
        model.encoder = nn.Module()
        model.encoder.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        model.post_layernorm = nn.LayerNorm(**norm)
        if config.projection_dim:
            self.visual_projection = nn.Linear(
                config.hidden_size, config.projection_dim, bias=False
            )

    def forward(self, pixels: Tensor) -> Tensor:
        model = self.vision_model
        x = model.embeddings(pixels)
        if self.config.projection_dim:
            x = model.pre_layrnorm(x)
        for block in model.encoder.layers:
            x = block(x)
        cls = model.post_layernorm(x[:, 0])
        return self.visual_projection(cls) if self.config.projection_dim else cls
