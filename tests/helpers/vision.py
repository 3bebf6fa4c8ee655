"""DINO and CLIP as checkpoint folders of random weights: the vision halves of tests/reference."""

import json

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from alchemy.clip import TextConfig, TextEncoder

CLIP_TEXT = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 999,  # not used: the projection of the whole model is
}


def save_dino(folder, stored, **changes):
    """stored: the reference "dino"; changes: of its config.json."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(stored.header["config"] | changes))
    save_file(stored.group("weights/"), folder / "model.safetensors")
    return folder


def save_clip(folder, stored):
    """stored: the reference "clip_vision"; the text half is random."""
    folder.mkdir(exist_ok=True)
    config = {"model_type": "clip", "projection_dim": 10, "text_config": CLIP_TEXT}
    config["vision_config"] = stored.header["config"] | {"projection_dim": 999}
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    text = TextEncoder(TextConfig.from_config(CLIP_TEXT | {"projection_dim": 10}), projection=True)
    weights = stored.group("weights/") | text.state_dict() | {"logit_scale": torch.tensor(4.6)}
    positions = "vision_model.embeddings.position_ids"  # the Hub's file has them
    save_file(weights | {positions: torch.arange(10)[None]}, folder / "model.safetensors")
    return folder


def by_colour(pictures):
    """An encoder of which a test can say what it gives: the mean colour, of length 1."""
    means = [torch.tensor(p.resize((1, 1), Image.BOX).getpixel((0, 0))) for p in pictures]
    return F.normalize(torch.stack(means).float(), dim=-1)
