"""The official checkpoint's names, and what other tools' LoRA files call its layers.

sdxl_base_manifest.json.xz holds the configurations of stabilityai/stable-diffusion-xl-base-1.0,
and every tensor's name and shape, in its folders and in sd_xl_base_1.0.safetensors. A tool's names
of the layers follow from it by the rule that the tool publishes:

    kohya        sd-scripts, networks/lora.py: "lora_unet" or "lora_te1", "lora_te2" and the module
                 names, joined by "_"; the UNet of library/sdxl_original_unet.py has the single
                 file's names. A1111 (extensions-builtin/Lora/networks.py) and ComfyUI
                 (comfy/lora.py) read them.
    legacy       OneTrainer's default, modules/util/convert/lora/convert_lora_util.py: the same
                 with diffusers' module names. A1111 (convert_diffusers_name_to_compvis) and
                 ComfyUI (unet_to_diffusers) read them too.
    omi          OneTrainer, modules/util/convert/lora/convert_sdxl_lora.py: "unet.", "clip_l.",
                 "clip_g." and the single file's names of the UNet.
    internal     OneTrainer's backups: "lora_unet." and diffusers' names with dots.
    comfyui      comfy/lora.py, model_lora_keys_unet and model_lora_keys_clip: the names of
                 ComfyUI's own weights.
    simpletuner  comfy/lora.py: "lycoris_" and diffusers' names; of the UNet alone.
"""

import json
import lzma
from functools import lru_cache
from pathlib import Path

from helpers.checkpoints import unet_modules

MANIFEST = Path(__file__).resolve().parents[1] / "formats" / "sdxl_base_manifest.json.xz"
TOOLS = ("kohya", "legacy", "omi", "internal", "comfyui", "simpletuner")
PREFIXES = {  # kohya and legacy, omi, comfyui
    "unet": ("lora_unet", "unet", "diffusion_model"),
    "text_encoder": ("lora_te1", "clip_l", "text_encoders.clip_l.transformer"),
    "text_encoder_2": ("lora_te2", "clip_g", "text_encoders.clip_g.transformer"),
}


@lru_cache
def manifest():
    """{"configs": {network: config}, "folder_layout": {network: {name: shape}},
    "single_file_layout": {name: shape}}"""
    return json.loads(lzma.decompress(MANIFEST.read_bytes()))


def layers_of(network):
    """The linear layers and convolutions of a network, in diffusers' names."""
    for key, shape in manifest()["folder_layout"][network].items():
        if key.endswith(".weight") and len(shape) in (2, 4) and ".embeddings." not in key:
            yield key.removesuffix(".weight")


def single_file_name(name, modules):
    """The single file's name of the UNet's layer; modules: see checkpoints.unet_modules."""
    module = max((m for m in modules if f"{name}.".startswith(m + ".")), key=len)
    return modules[module] + name.removeprefix(module)


def rows():
    """[{"layer": our name of a layer, tool: its name, if it has one}] of SDXL base."""
    found, modules = [], unet_modules(manifest()["configs"]["unet"])
    for network, (kohya, omi, comfyui) in PREFIXES.items():
        for name in layers_of(network):
            inner = single_file_name(name, modules) if network == "unet" else name
            underscored = name.replace(".", "_")
            row = {
                "layer": f"{network}.{name}",
                "kohya": f"{kohya}_{inner.replace('.', '_')}",
                "legacy": f"{kohya}_{underscored}",
                "omi": f"{omi}.{inner}",
                "internal": f"{kohya}.{name}",
                "comfyui": f"{comfyui}.{inner}",
            }
            if network == "unet":
                row["simpletuner"] = f"lycoris_{underscored}"
            found.append(row)
    return found
