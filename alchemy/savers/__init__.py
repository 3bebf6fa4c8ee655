"""What makes the UNet smaller or quicker and leaves alone what it computes: exactly, or with an error that is measured (README, Fast and small)."""
from dataclasses import replace

from .fp8 import store_fp8
from .memo import once
from .regional import compiled

__all__ = ["compiled", "once", "prepare", "store_fp8"]


def prepare(sdxl, fp8=False, compile=False):
    """From now on the UNet of sdxl is stored in fp8, or compiled, or both; one that is freed and read again too.

    A layer goes into fp8 as soon as it is read, so that the whole is never in memory. Raises ValueError where the compiler is missing.
    """
    def ready(module):
        for saver in (*([store_fp8] if fp8 else []), *([compiled] if compile else [])):
            saver(module)
    sdxl.read = replace(sdxl.read, ready=ready)
    if "unet" in sdxl.loaded:
        ready(sdxl.unet)
