"""What a checkpoint is, where it is not SDXL base or a fine-tune of it."""

import re

from .layout import EXTRAS, PREFIX

FAMILIES = {  # by what stands in some tensor's name
    r"lora[_.]": "a LoRA (give it with --lora)",
    r"^cond_stage_model\.": "Stable Diffusion 1 or 2",
    r"joint_blocks\.": "Stable Diffusion 3",
    r"double_blocks\.|single_transformer_blocks\.": "Flux",
    r"^conditioner\.embedders\.0\.model\.": "the SDXL refiner",
}


def check_family(path, tensors):
    """Raise ValueError that names what a single file is, where it is not SDXL base or a fine-tune of it."""
    for mark, family in FAMILIES.items():
        if any(re.search(mark, k) for k in tensors):
            raise ValueError(f"{path}: this is {family}, not an SDXL base checkpoint")
    first = "model.diffusion_model.input_blocks.0.0.weight"
    if first not in tensors:
        raise ValueError(
            f"{path}: not an SDXL checkpoint, it has no {first}; its first tensors are {', '.join(list(tensors)[:3])}"
        )
    shape = tensors[first].get_slice(first).get_shape()
    if shape[1:2] != [4]:
        raise ValueError(
            f"{path}: this is an inpainting or editing model ({first} is {shape}), not an SDXL base checkpoint"
        )
    unknown = [
        k for k in tensors if not k.startswith(tuple(PREFIX.values())) and not EXTRAS.search(k)
    ]
    if unknown:
        raise ValueError(
            f"{path}: {len(unknown)} tensors of no known network: {', '.join(unknown[:3])}"
        )


def check_folder(root, configs, pipeline):
    """The same for a folder, by its configurations; pipeline: what class its model_index.json names, if any."""
    unet, family = configs["unet"], None
    if not unet:
        family = (
            "a LoRA (give its file with --lora)"
            if list(root.glob("*lora*.safetensors"))
            else pipeline and f"made for {pipeline}"
        )
    elif unet.get("in_channels", 4) != 4:
        family = f"an inpainting or editing model ({unet['in_channels']} input channels)"
    elif unet.get("addition_embed_type") != "text_time":
        family = (
            "Stable Diffusion 1 or 2" if "cross_attention_dim" in unet else "another kind of model"
        )
    elif not configs["text_encoder"]:
        family = "the SDXL refiner"
    if family:
        raise ValueError(f"{root}: this is {family}, not an SDXL base checkpoint")
    for name in (name for name in configs if not configs[name]):
        raise ValueError(f"{root}: not a checkpoint folder, it has no {name}/config.json")
