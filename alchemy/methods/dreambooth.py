"""DreamBooth (Ruiz et al. 2023): all weights of the UNet are trained, and, with --text-encoders,
those of both text encoders."""

import torch
from torch import Tensor

from ..sdxl import SDXL

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


def train_whole(sdxl: SDXL, names: tuple[str, ...]) -> dict[str, Tensor]:
    """{name: parameter} of these networks, which are read again in float32 for training."""
    parameters = {}
    for name in names:
        sdxl.free(name)
        network = sdxl.read(name, torch.float32).requires_grad_(True)
        sdxl.loaded[name] = network
        for key, parameter in network.named_parameters():
            parameters[f"{name}.{key}"] = parameter
    return parameters
