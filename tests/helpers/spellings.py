"""The same LoRA in the names of every tool, over every layer of a tiny checkpoint."""

import json

import pytest
import torch

import alchemy
from alchemy import lora
from helpers.checkpoints import UNET, unet_modules
from helpers.tool_names import single_file_name

RANK, ALPHA = 2, 3.0
NETWORKS = ("unet", "text_encoder", "text_encoder_2")
HEADER = {"lora_adapter_metadata": json.dumps({f"{name}.lora_alpha": ALPHA for name in NETWORKS})}


@pytest.fixture
def fresh(tiny):
    """fresh(): the tiny checkpoint, newly loaded."""
    return lambda: alchemy.load(tiny, "cpu")


@pytest.fixture
def pairs(fresh):
    """{layer: (down, up)} over every linear layer and convolution of UNet and text encoders."""
    generator, sdxl = torch.Generator().manual_seed(1), fresh()
    assert sdxl.unet and sdxl.text_encoders
    pairs = {}
    for name, layer in lora.layers(sdxl).items():
        out, *rest = layer.weight.shape
        down = torch.randn(RANK, *rest, generator=generator)
        up = torch.randn(out, RANK, *[1] * len(rest[1:]), generator=generator)
        pairs[name] = down, up
    return pairs


def unet_only(pairs):
    return {layer: pair for layer, pair in pairs.items() if layer.startswith("unet.")}


def adapters(model):
    """The names of the adapters on a model."""
    return set().union(*(layer.lora for layer in lora.layers(model).values()))


def adapter(sdxl, name):
    """{layer: (down, up, alpha, scale)} of the adapter of that name."""
    found = {}
    for layer, module in lora.layers(sdxl).items():
        if name in module.lora:
            a = module.lora[name]
            found[layer] = a.down, a.up, a.alpha, a.scale
    return found


def equal(ours, pairs, alpha=ALPHA, scale=1.0):
    """An adapter (see `adapter`) is bit-equal to the pairs, in float32."""
    assert ours.keys() == pairs.keys()
    for layer, (down, up, *rest) in ours.items():
        assert down.dtype == up.dtype == torch.float32
        same_down, same_up = torch.equal(down, pairs[layer][0]), torch.equal(up, pairs[layer][1])
        assert same_down and same_up and rest == [alpha, scale], layer


KOHYA_PREFIXES = {
    "unet": "lora_unet_",
    "text_encoder": "lora_te1_",
    "text_encoder_2": "lora_te2_",
}
COMFYUI_PREFIXES = {
    "unet": "diffusion_model.",
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.clip_g.transformer.",
}
ONETRAINER_PREFIXES = {"unet": "", "text_encoder": "clip_l.", "text_encoder_2": "clip_g."}


def stem(name, prefixes, original_blocks=True, separator="."):
    """A tool's name of a layer: a prefix per network, and the UNet's blocks in either layout."""
    network, _, layer = name.partition(".")
    if network == "unet" and original_blocks:
        layer = single_file_name(layer, unet_modules(UNET))
    return prefixes[network] + layer.replace(".", separator)


def kohya(name):
    return stem(name, KOHYA_PREFIXES, separator="_")


def kohya_diffusers(name):
    return stem(name, KOHYA_PREFIXES, original_blocks=False, separator="_")


def comfyui(name):
    return stem(name, COMFYUI_PREFIXES)


def onetrainer(name):
    return stem(name, ONETRAINER_PREFIXES)


def lycoris(name):
    return kohya_diffusers(name).replace("lora_unet_", "lycoris_")


def peft(name):
    return "base_model.model." + name


DOWN_UP = (".lora_down.weight", ".lora_up.weight")
# ComfyUI: comfy/lora.py, model_lora_keys_unet and model_lora_keys_clip. OneTrainer:
# modules/util/convert/lora. LyCORIS: lycoris/wrapper.py, prefix "lycoris".
SPELLINGS = {
    "ComfyUI": (comfyui, *DOWN_UP),
    "ComfyUI, without .weight": (comfyui, ".lora_A", ".lora_B"),
    "OneTrainer": (onetrainer, *DOWN_UP),
    "LyCORIS": (lycoris, *DOWN_UP),
    "kohya, the single file's blocks": (kohya, *DOWN_UP),
    "kohya, diffusers' blocks": (kohya_diffusers, *DOWN_UP),
    "diffusers": (str, ".lora.down.weight", ".lora.up.weight"),
    "PEFT in diffusers": (str, ".lora_A.weight", ".lora_B.weight"),
    "PEFT": (peft, ".lora_A.weight", ".lora_B.weight"),
    "PEFT with the adapter's name": (peft, ".lora_A.default.weight", ".lora_B.default.weight"),
}


def written(pairs, name_of, down, up, alpha=True):
    """The pairs as a file holds them; diffusers has another ending for text encoders."""
    tensors = {}
    for layer, (a, b) in pairs.items():
        ends = down, up
        if down == ".lora.down.weight" and layer.startswith("text"):
            ends = ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"
        tensors[name_of(layer) + ends[0]] = a.clone()
        tensors[name_of(layer) + ends[1]] = b.clone()
        if alpha:
            tensors[name_of(layer) + ".alpha"] = torch.tensor(ALPHA)
    return tensors
