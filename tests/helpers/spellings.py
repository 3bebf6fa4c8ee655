"""The same LoRA in every spelling, over every layer of a tiny checkpoint that can hold an adapter: what the tests of LoRA files share."""

import json

import pytest
import torch

import alchemy
from alchemy import lora
from helpers.checkpoints import UNET, unet_modules

RANK, ALPHA = 2, 3.0
HEADER = {
    "lora_adapter_metadata": json.dumps(
        {f"{network}.lora_alpha": ALPHA for network in ("unet", "text_encoder", "text_encoder_2")}
    )
}


@pytest.fixture
def fresh(tiny):
    return lambda: alchemy.load(tiny, "cpu")


@pytest.fixture
def pairs(fresh):
    """{our layer: (down, up)} over every layer of the UNet and the text encoders that can hold an adapter: linear ones and convolutions."""
    made, sdxl = torch.Generator().manual_seed(1), fresh()
    assert sdxl.unet and sdxl.text_encoders
    shapes = {name: m.weight.shape for name, m in lora.layers(sdxl).items()}
    return {
        name: (
            torch.randn(RANK, *c[1:], generator=made),
            torch.randn(c[0], RANK, *(1 for _ in c[2:]), generator=made),
        )
        for name, c in shapes.items()
    }


def adapters(model):
    """The names of the adapters on a model."""
    return {name for layer in lora.layers(model).values() for name in layer.lora}


def adapter(sdxl, name):
    """{layer: (down, up, alpha, scale)} of the adapter of that name."""
    return {
        layer: (a.down, a.up, a.alpha, a.scale)
        for layer, m in lora.layers(sdxl).items()
        if name in m.lora
        for a in [m.lora[name]]
    }


def equal(ours, pairs, alpha=ALPHA, scale=1.0):
    assert ours.keys() == pairs.keys()
    for layer, (down, up, *rest) in ours.items():
        assert down.dtype == up.dtype == torch.float32
        assert (
            torch.equal(down, pairs[layer][0])
            and torch.equal(up, pairs[layer][1])
            and rest == [alpha, scale]
        ), layer


def underscored(name, unet=lambda layer: layer):
    """kohya's name of a layer; unet: what the UNet's layers are called first."""
    network, _, layer = name.partition(".")
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}[
        network
    ]
    return prefix + (unet(layer) if network == "unet" else layer).replace(".", "_")


def ldm(layer):
    """The UNet's layer by the blocks of the single file, walked from the other side: see checkpoints.unet_modules."""
    module = max((m for m in unet_modules(UNET) if f"{layer}.".startswith(m + ".")), key=len)
    return unet_modules(UNET)[module] + layer.removeprefix(module)


def written(pairs, stem, down, up, alpha=True):
    """The pairs as a file holds them; diffusers has another ending for text encoders."""
    tensors = {}
    for layer, (a, b) in pairs.items():
        if (down, up) == (".lora.down.weight", ".lora.up.weight") and layer.startswith("text"):
            ends = (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")
        else:
            ends = (down, up)
        tensors |= {stem(layer) + ends[0]: a, stem(layer) + ends[1]: b} | (
            {stem(layer) + ".alpha": torch.tensor(ALPHA)} if alpha else {}
        )
    return {k: t.clone() for k, t in tensors.items()}


COMFYUI_PREFIXES = {
    "unet": "diffusion_model.",
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.clip_g.transformer.",
}
ONETRAINER_PREFIXES = {"unet": "", "text_encoder": "clip_l.", "text_encoder_2": "clip_g."}


def prefixed(prefixes):
    """The names of ComfyUI and OneTrainer: a prefix per network, the UNet's original blocks."""

    def stem(name):
        network, _, layer = name.partition(".")
        return prefixes[network] + (ldm(layer) if network == "unet" else layer)

    return stem


def lycoris(name):
    return underscored(name).replace("lora_unet_", "lycoris_")


# ComfyUI: comfy/lora.py, model_lora_keys_unet and model_lora_keys_clip. OneTrainer:
# modules/util/convert/lora. LyCORIS: lycoris/wrapper.py, prefix "lycoris".
SPELLINGS = {
    "ComfyUI": (prefixed(COMFYUI_PREFIXES), ".lora_down.weight", ".lora_up.weight"),
    "ComfyUI, without .weight": (prefixed(COMFYUI_PREFIXES), ".lora_A", ".lora_B"),
    "OneTrainer": (prefixed(ONETRAINER_PREFIXES), ".lora_down.weight", ".lora_up.weight"),
    "LyCORIS": (lycoris, ".lora_down.weight", ".lora_up.weight"),
    "kohya, the single file's blocks": (
        lambda n: underscored(n, ldm),
        ".lora_down.weight",
        ".lora_up.weight",
    ),
    "kohya, diffusers' blocks": (underscored, ".lora_down.weight", ".lora_up.weight"),
    "diffusers": (str, ".lora.down.weight", ".lora.up.weight"),
    "PEFT in diffusers": (str, ".lora_A.weight", ".lora_B.weight"),
    "PEFT": (lambda n: "base_model.model." + n, ".lora_A.weight", ".lora_B.weight"),
    "PEFT with the adapter's name": (
        lambda n: "base_model.model." + n,
        ".lora_A.default.weight",
        ".lora_B.default.weight",
    ),
}
