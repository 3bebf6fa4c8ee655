"""The files of tests/reference, and our networks with their weights."""

import json
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import safe_open

from alchemy.formats.checkpoint import BUILD, CONFIGS

FOLDER = Path(__file__).resolve().parents[1] / "reference"
KINDS = {
    "text_1": "text_encoder",
    "text_2": "text_encoder_2",
    "vae": "vae",
    "vae_8": "vae",
    "unet_a": "unet",
    "unet_b": "unet",
}


class Reference(dict):
    """The tensors of a reference file by name; `header` holds its metadata, JSON decoded."""

    def group(self, prefix):
        """The tensors below a prefix, named without it."""
        names = [key for key in self if key.startswith(prefix)]
        return {key.removeprefix(prefix): self[key] for key in names}


@lru_cache
def read_reference(name):
    """The tensors of tests/reference/NAME.safetensors."""
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        tensors = Reference({key: file.get_tensor(key) for key in file.keys()})
        tensors.header = dict(file.metadata())
    for key, value in tensors.header.items():
        if value[0] in "{[":
            tensors.header[key] = json.loads(value)
    return tensors


def build_network(name, dtype=torch.float64):
    """Our network of a reference's configuration and weights, a new one at each call."""
    kind, stored = KINDS[name], read_reference(name)
    with torch.device("meta"):
        net = BUILD[kind](CONFIGS[kind].from_config(stored.header["config"]))
    # transformers 5 saves the first encoder without this prefix.
    prefix = "text_model." if name == "text_1" else ""
    weights = {}
    for key, value in stored.group("weights/").items():
        weights[prefix + key] = value.to(dtype, copy=True)
    net.load_state_dict(weights, strict=True, assign=True)
    return net.eval().requires_grad_(False)
