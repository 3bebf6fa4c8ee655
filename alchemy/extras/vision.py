"""The vision transformers of likeness, DINO ViT-S/16 (Caron et al. 2021) and CLIP ViT-B/32 (Radford
et al. 2021): patches and a CLS token go through the layers of CLIP's text encoder, without the
causal mask. CLIP adds a LayerNorm before and a projection after them; DINO has a bias in its patch
embedding. Module attributes are CLIP's tensor names; see `dino_name`.
"""

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..clip import Layer

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
    projection_dim: int | None = 512  # None: DINO, without projection and pre_layrnorm

    @classmethod
    def from_config(cls, config: dict) -> "VisionConfig":
        """The config.json of a CLIP model, of its vision half alone, or of a ViT such as DINO."""
        if config.get("model_type") == "vit":
            config = config | {"projection_dim": None}
        elif "vision_config" in config:
            # The whole model's projection; the half's own value is not used.
            config = config["vision_config"] | {"projection_dim": config.get("projection_dim", 512)}
        chosen = {field.name: config[field.name] for field in fields(cls) if field.name in config}
        return cls(**chosen)


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
    """Normalised pixels (B, 3, H, W) to DINO's CLS token (B, D) or CLIP's embedding (B, P)."""

    def __init__(self, config: VisionConfig = VisionConfig()):
        super().__init__()
        self.config = config
        dim = config.hidden_size
        norm = {"normalized_shape": dim, "eps": config.layer_norm_eps}
        model = self.vision_model = nn.Module()
        model.embeddings = Embeddings(config)
        if config.projection_dim:
            model.pre_layrnorm = nn.LayerNorm(**norm)  # the official name is misspelt
        model.encoder = nn.Module()
        layers = [Layer(config, causal=False) for _ in range(config.num_hidden_layers)]
        model.encoder.layers = nn.ModuleList(layers)
        model.post_layernorm = nn.LayerNorm(**norm)
        if config.projection_dim:
            self.visual_projection = nn.Linear(dim, config.projection_dim, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        model = self.vision_model
        x = model.embeddings(pixels)
        if self.config.projection_dim:
            x = model.pre_layrnorm(x)
        for layer in model.encoder.layers:
            x = layer(x)
        cls = model.post_layernorm(x[:, 0])
        return self.visual_projection(cls) if self.config.projection_dim else cls
