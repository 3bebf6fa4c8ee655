"""DreamBooth (Ruiz et al. 2023): all weights of the UNet learn the subject, and, if wanted, those of both text encoders; held to their
class by class pictures (prior.py)."""

import torch

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


def whole(sdxl, names):
    """{name: parameter} of the networks of these names, float32 and to be trained; read anew, since the checkpoint's dtype may be half."""
    for name in names:
        sdxl.free(name)
        sdxl.loaded[name] = sdxl.read(name, torch.float32).requires_grad_(True)
    return {f"{name}.{key}": p for name in names for key, p in sdxl.loaded[name].named_parameters()}
