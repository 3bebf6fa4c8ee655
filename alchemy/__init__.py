"""Alchemy: SDXL personalization from scratch. The names below are the public surface; torch is imported when one is first used."""

from importlib import import_module

# A module is never named as the function it holds: importing the one would hide the other.
HOME = {
    "load": "formats.checkpoint",
    "SDXL": "sdxl",
    "Conditioning": "sdxl",
    "noise": "sampling",
    "generators": "sampling",
    "denoise": "sampling",
    "Step": "sampling",
    "keep_background": "sampling",
    "text_to_image": "pipeline",
    "image_to_image": "pipeline",
    "inspect": "extras.inspect.page",
    "segment": "segmentation",
    "insert": "insertion",
    "add_lora": "lora",
    "load_lora": "formats.lora",
    "save_lora": "formats.lora",
}
__all__ = list(HOME)


def __dir__():
    return __all__


def __getattr__(name):
    if name not in HOME:
        raise AttributeError(f"module 'alchemy' has no attribute {name!r}")
    value = getattr(import_module(f".{HOME[name]}", __name__), name)
    globals()[name] = value
    return value
