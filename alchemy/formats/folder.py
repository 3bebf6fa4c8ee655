"""A whole checkpoint as a folder in the Hub layout, which alchemy.load and diffusers read."""

import shutil
from pathlib import Path

import torch

from .. import lora
from ..files import save_json, save_tensors
from .checkpoint import BUILD

VOCABULARY = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


def save_checkpoint(sdxl, folder, facts=None, dtype=None):
    """Write all networks of sdxl, in dtype (None: its own), to a new folder, whole or not at all; the paths. Adapters go into the weights,
    for good.

    Configurations and vocabularies are those that sdxl was loaded with. Raises ValueError where there are none (of a single file alone),
    and where the folder is there and not empty.
    """
    wanted, new = Path(folder), Path(folder).with_name(f".{Path(folder).name}.new")
    if not sdxl.read.written["unet/config.json"]:
        raise ValueError(
            f"{sdxl.source}: a single file brings no configurations; name a folder that has them with --config"
        )
    if wanted.exists() and any(wanted.iterdir()):
        raise ValueError(f"{wanted} is there already; name another")
    shutil.rmtree(new, ignore_errors=True)  # of an interrupted attempt
    try:
        for place in ("scheduler", "tokenizer", "tokenizer_2", *BUILD):
            (new / place).mkdir(parents=True)
        for place, content in sdxl.read.written.items():
            if content:
                save_json(content, new / place)
        for place in (
            f"{name}/{file}" for name in ("tokenizer", "tokenizer_2") for file in VOCABULARY
        ):
            if (sdxl.read.vocabulary / place).exists():
                shutil.copyfile(sdxl.read.vocabulary / place, new / place)
        paths = [
            write_network(sdxl, name, new / name, dtype or sdxl.dtype, facts) for name in BUILD
        ]
        new.replace(wanted)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return [wanted / path.relative_to(new) for path in paths]


def write_network(sdxl, name, folder, dtype, facts):
    network, path = (
        sdxl.network(name),
        folder
        / (
            "model.safetensors"
            if name.startswith("text")
            else "diffusion_pytorch_model.safetensors"
        ),
    )
    for layer in lora.layers(network).values():
        layer.merge()
        layer.base_weight, layer.lora = (
            None,
            torch.nn.ModuleDict(),
        )  # kept for un-merging, all originals would be the network once more
    save_tensors(
        {key: tensor.to(dtype) for key, tensor in network.state_dict().items()},
        path,
        {"format": "pt"} | (facts or {}),
    )
    return path
