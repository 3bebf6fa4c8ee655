"""LoRA files by the names that other tools use.

Reading looks each name up in a table of all spellings of our own layers; nothing is parsed, and what is not in the table is refused.
Written by default are kohya's names with `.alpha`, the one spelling that diffusers, ComfyUI, kohya's scripts and A1111 all read.
"""
import json
from itertools import count

import torch

from .. import lora
from . import layout
from .checkpoint import open_safetensors
from ..files import save_tensors

FACTS = "alchemy."  # our own keys in the header begin so
# The ends of a pair's names: down and up, in the dialects of kohya, diffusers, PEFT, and PEFT with an adapter's name.
PAIRS = ((".lora_down.weight", ".lora_up.weight"), (".lora.down.weight", ".lora.up.weight"),
         (".lora_A.weight", ".lora_B.weight"), (".lora_A.default.weight", ".lora_B.default.weight"))


def kohya(name, unet):
    """down_blocks.1.attentions.0.… to lora_unet_input_blocks_4_1_…: the single-file layout's name, dots as underscores."""
    return "lora_unet_" + layout.single_file_name("unet", name, unet.config).replace(".", "_")


def spellings(unet):
    """{what a file calls the layer: our name} over every linear layer that can hold an adapter."""
    table = {}
    for name in lora.layers(unet):
        for spelling in (kohya(name, unet), "lora_unet_" + name.replace(".", "_"), "unet." + name, "base_model.model.unet." + name):
            table[spelling] = name
    return table


def told_alpha(header, path):
    """What diffusers says of alpha in the header, since its names have no place for it: a function of (layer, rank)."""
    try:
        told = {key.removeprefix("unet."): value for key, value in json.loads(header.get("lora_adapter_metadata", "{}")).items()}
    except (ValueError, AttributeError):
        raise ValueError(f"{path}: lora_adapter_metadata in its header is not a JSON object") from None

    def alpha(layer, rank):
        own = [a for end, a in (told.get("alpha_pattern") or {}).items() if f".{layer}".endswith(f".{end}")]
        return (own or [told.get("lora_alpha", rank)])[0] * (rank ** 0.5 if told.get("use_rslora") else 1)  # without a word: alpha is rank
    return alpha


def read_pairs(file, table):
    """{our layer: (down, up, alpha or None)} of an open file, by the table of spellings, and the keys that are no part of one."""
    keys, found = set(file.keys()), {}
    for key in sorted(keys):
        for down, up in PAIRS:
            stem = key.removesuffix(down)
            if key.endswith(down) and stem + up in keys and stem in table and table[stem] not in found:
                pair, alpha = (file.get_tensor(key).float(), file.get_tensor(stem + up).float()), None
                if stem + ".alpha" in keys and not file.get_slice(stem + ".alpha").get_shape():
                    alpha = float(file.get_tensor(stem + ".alpha"))
                    keys -= {stem + ".alpha"}
                found[table[stem]] = (*pair, alpha)
                keys -= {key, stem + up}
    return found, keys


def load_lora(sdxl, path, scale=1.0, name=None):
    """Put the LoRA of a file on sdxl.unet as the adapter `name` (the next free number, if None), beside any others; returns the name.

    Raises ValueError where a key matches no layer, or a shape does not fit: then nothing has been added.
    """
    file = open_safetensors(path)
    (found, rest), layers = read_pairs(file, spellings(sdxl.unet)), lora.layers(sdxl.unet)
    for layer, (down, up, _) in found.items():
        if down.ndim != 2 or up.ndim != 2 or len(down) != up.shape[1]:
            raise ValueError(f"{path}: {layer} has down {tuple(down.shape)} and up {tuple(up.shape)}, which are no pair; the file is damaged, or no plain LoRA")
        ours, theirs = tuple(layers[layer].weight.shape), (up.shape[0], down.shape[1])
        if ours != theirs:
            raise ValueError(f"{path}: made for another base: {layer} is {ours} in {sdxl.source}, {theirs} in the file; give its base with --weights")
    if rest or not found:
        which = f"{len(rest)} of its {len(file.keys())} keys match no layer of {sdxl.source}: {', '.join(sorted(rest)[:3])}" if rest else "it is empty"
        raise ValueError(f"{path}: {which}; read are LoRAs of the UNet's linear layers, whole or not at all")
    told, name = told_alpha(file.metadata() or {}, path), name or next(n for n in map(str, count()) if n not in lora.names(sdxl.unet))
    for layer, (down, up, alpha) in found.items():
        lora.put(layers[layer], name, down, up, told(layer, len(down)) if alpha is None else alpha, scale)
    return name


def save_lora(sdxl, path, name="default", format="kohya", facts=None):
    """Write the adapter `name` of sdxl.unet, float32. format: "kohya", or "diffusers", whose names have no place for alpha: there
    alpha/rank is multiplied into up. facts: a dict for the header."""
    if format not in ("kohya", "diffusers"):
        raise ValueError(f"format is {format!r}; known are kohya, diffusers")
    tensors, adapters = {}, {n: m.lora[name] for n, m in lora.layers(sdxl.unet).items() if name in m.lora}
    if not adapters:
        raise ValueError(f"there is no adapter {name!r} to save")
    for layer, adapter in adapters.items():
        rank = len(adapter.down)
        if format == "kohya":
            stem = kohya(layer, sdxl.unet)
            tensors |= {stem + ".lora_down.weight": adapter.down, stem + ".lora_up.weight": adapter.up, stem + ".alpha": torch.tensor(adapter.alpha)}
        else:
            tensors |= {f"unet.{layer}.lora.down.weight": adapter.down, f"unet.{layer}.lora.up.weight": adapter.up * (adapter.alpha / rank)}
    header = {FACTS + k: v for k, v in (facts or {}).items()} | {FACTS + "rank": rank, FACTS + "alpha": adapter.alpha, "format": "pt",
              # What kohya's tools and A1111 show of a LoRA:
              "ss_network_dim": str(rank), "ss_network_alpha": str(adapter.alpha), "ss_base_model_version": "sdxl_base_v1-0"}
    save_tensors(tensors, path, header)
