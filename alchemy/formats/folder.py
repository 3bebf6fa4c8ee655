"""Write a whole checkpoint as a folder in the Hub layout, which alchemy.load and diffusers read."""

import shutil
import tempfile
from pathlib import Path

import torch
from torch import nn

from .. import lora
from ..files import TEMPORARY, save_json, save_tensors
from .checkpoint import BUILD

VOCABULARY = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


def save_checkpoint(
    sdxl, folder: str | Path, metadata: dict | None = None, dtype: torch.dtype | None = None
) -> list[Path]:
    """Write all networks of sdxl to a new folder, whole or not at all; return the weight files.

    dtype: of the written weights (default: that of sdxl). metadata goes into each file's header.
    Adapters of sdxl are merged for good. Configurations and vocabularies are those it was loaded
    with. Raises ValueError if there are none (a single file alone), and if the folder is not empty.
    """
    target = Path(folder)
    if not sdxl.read.json_files["unet/config.json"]:
        raise ValueError(
            f"{sdxl.source}: a single file brings no configurations; "
            "name a folder that has them with --config, or write a .safetensors file"
        )
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target} exists already; name another")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=target.parent) as temporary:
        new = Path(temporary) / target.name
        write_settings(sdxl, new)
        paths = []
        for name in BUILD:
            stem = "model" if name.startswith("text") else "diffusion_pytorch_model"
            path = new / name / f"{stem}.safetensors"
            merge_for_good(sdxl.network(name))
            state = sdxl.network(name).state_dict()
            tensors = {key: tensor.to(dtype or sdxl.dtype) for key, tensor in state.items()}
            save_tensors(tensors, path, {"format": "pt"} | (metadata or {}))
            paths.append(target / path.relative_to(new))
        new.replace(target)
    return paths


def write_settings(sdxl, folder: Path) -> None:
    """The sub-folders, configurations and vocabularies of a checkpoint folder."""
    for name in ("scheduler", "tokenizer", "tokenizer_2", *BUILD):
        (folder / name).mkdir(parents=True)
    for path, content in sdxl.read.json_files.items():
        if content:
            save_json(content, folder / path)
    for tokenizer in ("tokenizer", "tokenizer_2"):
        for file in VOCABULARY:
            source = sdxl.read.vocabulary / tokenizer / file
            if source.exists():
                shutil.copyfile(source, folder / tokenizer / file)


def merge_for_good(network: nn.Module) -> None:
    """Add the adapters of a network to its weights and drop them.

    The base weights, kept for un-merging, are dropped too: they are the network's size once more.
    """
    for layer in lora.layers(network).values():
        layer.merge()
        layer.base_weight = None
        layer.lora = nn.ModuleDict()
