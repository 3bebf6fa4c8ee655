"""LoRA files by the names that other tools use.

Reading looks each name up in a table of all spellings of our own layers; nothing is parsed, and what is not in the table is refused.
Written by default are kohya's names with `.alpha`, the one spelling that diffusers, ComfyUI, kohya's scripts and A1111 all read.
"""
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


def load_lora(sdxl, path, scale=1.0, name=None):
    """Put the LoRA of a file on sdxl.unet as the adapter `name` (the file's own name, if None), beside any others; returns the name.

    Raises ValueError where a key matches no layer, or a shape does not fit: then nothing has been added.
    """
    file = open_safetensors(path)
    header, keys, table = file.metadata() or {}, set(file.keys()), spellings(sdxl.unet)
    layers, found = lora.layers(sdxl.unet), {}
    for key in sorted(keys):
        for down, up in PAIRS:
            stem = key.removesuffix(down)
            if stem != key and stem in table and stem + up in keys:
                found[table[stem]] = [file.get_tensor(key).float(), file.get_tensor(stem + up).float(), None]
                keys -= {key, stem + up}
                if stem + ".alpha" in keys:
                    keys -= {stem + ".alpha"}
                    found[table[stem]][2] = float(file.get_tensor(stem + ".alpha"))
    if keys or not found:
        raise ValueError(f"{path}: {len(keys)} of its keys match no layer of {sdxl.source}: {', '.join(sorted(keys)[:3]) or 'it is empty'}")
    for layer, (down, up, _) in found.items():
        shape = tuple(layers[layer].weight.shape)
        if (up.shape[0], down.shape[1]) != shape or len(down) != up.shape[1]:
            raise ValueError(f"{path}: made for another base: {layer} is {shape} in {sdxl.source}, {(up.shape[0], down.shape[1])} in the file")
    name = name or str(header.get(FACTS + "name") or len(lora.names(sdxl.unet)))
    for layer, (down, up, alpha) in found.items():
        lora.put(layers[layer], name, down, up, len(down) if alpha is None else alpha, scale)  # without alpha: alpha is rank
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
