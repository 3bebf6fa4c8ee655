"""What makes the UNet smaller or quicker and leaves alone what it computes: exactly, or with an error that is measured (README, Fast and small)."""

from dataclasses import replace

import torch

from .fp8 import store_fp8
from .prompt_cache import once
from .compile import compiled

__all__ = ["compiled", "once", "prepare", "store_fp8"]


def missing_for_fp8(device, compile=False):
    """Why the device cannot store weights in fp8, and what to do, or None."""
    if device.type == "mps":
        return "--fp8-base has no part on mps, where torch has no floats of 8 bits: leave it out"
    # Triton knows no e4m3 on older cards (pytorch issue 167082); without it, torch itself converts.
    if compile and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        return "--fp8-base and --compile go together on cards of compute capability 8.9 and newer (RTX 40, L4, H100): leave out one of them"
    return None


def prepare(sdxl, fp8=False, compile=False):
    """From now on the UNet of sdxl is stored in fp8, or compiled, or both; one that is freed and read again too.

    A layer goes into fp8 as soon as it is read, so that the whole is never in memory. Raises ValueError where the device cannot do it.
    """
    if lacking := fp8 and missing_for_fp8(sdxl.device, compile):
        raise ValueError(lacking)

    def ready(module):
        for saver in (*([store_fp8] if fp8 else []), *([compiled] if compile else [])):
            saver(module)

    sdxl.read = replace(sdxl.read, ready=ready)
    if "unet" in sdxl.loaded:
        ready(sdxl.unet)
