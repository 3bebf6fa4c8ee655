"""Recognize checkpoints that are not SDXL base or a fine-tune of it, and name them."""

import re
from pathlib import Path

from .layout import EXTRAS, PREFIX
from .tensors import first_names

FAMILIES = {  # by a pattern in some tensor's name
    r"lora[_.]": "a LoRA (give it with --lora)",
    r"^cond_stage_model\.": "Stable Diffusion 1 or 2",
    r"joint_blocks\.": "Stable Diffusion 3",
    r"double_blocks\.|single_transformer_blocks\.": "Flux",
    r"^conditioner\.embedders\.0\.model\.": "the SDXL refiner",
}
FIRST = PREFIX["unet"] + "input_blocks.0.0.weight"


def check_family(path: Path, tensors: dict) -> None:
    """Raise ValueError, naming the family, for a single file that is not SDXL base.

    tensors: {name: open file}, see tensors.names_in.
    """
    for pattern, family in FAMILIES.items():
        if any(re.search(pattern, key) for key in tensors):
            raise ValueError(f"{path}: this is {family}, not an SDXL base checkpoint")
    if FIRST not in tensors:
        raise ValueError(
            f"{path}: not an SDXL checkpoint, it has no {FIRST}; "
            f"its first tensors are {first_names(tensors)}"
        )
    shape = tensors[FIRST].get_slice(FIRST).get_shape()
    if shape[1:2] != [4]:
        raise ValueError(
            f"{path}: this is an inpainting or editing model ({FIRST} is {shape}), "
            "not an SDXL base checkpoint"
        )
    unknown = []
    for key in tensors:
        if not key.startswith(tuple(PREFIX.values())) and not EXTRAS.search(key):
            unknown.append(key)
    if unknown:
        raise ValueError(
            f"{path}: {len(unknown)} tensors of no known network: {first_names(unknown)}"
        )


def check_folder(root: Path, configs: dict[str, dict], pipeline: str | None) -> None:
    """The same for a folder. configs: {network: its config.json, {} if missing}.

    pipeline: the class that model_index.json names, if any.
    """
    family = folder_family(root, configs, pipeline)
    if family:
        raise ValueError(f"{root}: this is {family}, not an SDXL base checkpoint")
    for name, config in configs.items():
        if not config:
            raise ValueError(f"{root}: not a checkpoint folder, it has no {name}/config.json")


def folder_family(root: Path, configs: dict[str, dict], pipeline: str | None) -> str | None:
    unet = configs["unet"]
    if not unet:
        if list(root.glob("*lora*.safetensors")):
            return "a LoRA (give its file with --lora)"
        return f"made for {pipeline}" if pipeline else None
    if unet.get("in_channels", 4) != 4:
        return f"an inpainting or editing model ({unet['in_channels']} input channels)"
    if unet.get("addition_embed_type") != "text_time":
        return "Stable Diffusion 1 or 2" if "cross_attention_dim" in unet else "of another kind"
    return None if configs["text_encoder"] else "the SDXL refiner"
