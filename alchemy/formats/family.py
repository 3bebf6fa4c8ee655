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
            raise other_family(path, family)
    if FIRST not in tensors:
        raise ValueError(
            f"{path}: not an SDXL checkpoint, it has no {FIRST}; "
            f"its first tensors are {first_names(tensors)}"
        )
    shape = tensors[FIRST].get_slice(FIRST).get_shape()
    if shape[1:2] != [4]:
        raise other_family(path, f"an inpainting or editing model ({FIRST} is {shape})")
    prefixes = tuple(PREFIX.values())
    unknown = [key for key in tensors if not (key.startswith(prefixes) or EXTRAS.search(key))]
    if unknown:
        raise ValueError(
            f"{path}: {len(unknown)} tensors of no known network: {first_names(unknown)}"
        )


def check_folder(root: Path, json_files: dict[str, dict]) -> None:
    """The same for a folder. json_files: {path in the folder: its JSON object, {} if missing}."""
    unet, pipeline = (
        json_files["unet/config.json"],
        json_files["model_index.json"].get("_class_name"),
    )
    if not unet and list(root.glob("*lora*.safetensors")):
        raise other_family(root, "a LoRA (give its file with --lora)")
    if not unet and pipeline:
        raise other_family(root, f"made for {pipeline}")
    channels = unet.get("in_channels", 4)
    # What is no number of channels is left to configs.check_config.
    if type(channels) is int and channels != 4 and 1 <= channels <= 1024:
        raise other_family(root, f"an inpainting or editing model ({channels} input channels)")
    if unet and unet.get("addition_embed_type") != "text_time":
        is_old = "cross_attention_dim" in unet
        raise other_family(root, "Stable Diffusion 1 or 2" if is_old else "of another kind")
    if unet and not json_files["text_encoder/config.json"]:
        raise other_family(root, "the SDXL refiner")
    for name in PREFIX:
        if not json_files[f"{name}/config.json"]:
            raise ValueError(f"{root}: not a checkpoint folder, it has no {name}/config.json")


def other_family(path: Path, family: str) -> ValueError:
    return ValueError(f"{path}: this is {family}, not an SDXL base checkpoint")
