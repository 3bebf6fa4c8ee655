"""Alchemy: SDXL personalization (Image-Alchemy, arXiv 2505.10743) from scratch, in PyTorch.

A tour; each name has its own help():

    import alchemy
    sdxl = alchemy.load("weights/mini")             # a folder, a .safetensors file or a Hub id

    image = alchemy.text_to_image(sdxl, "a photo of a flower on grass", seed=0)
    image = alchemy.image_to_image(sdxl, "a watercolor of a flower", image, strength=0.6)
    mask = alchemy.segment(sdxl, image, "flower")   # (H,W) in [0,1], from the model's attention

    for step, loss in alchemy.train_lora(sdxl, ["1.jpg", "2.jpg", "3.jpg"], "flower", "sks"):
        print(step, loss)                           # then save_lora(sdxl, "sunflower.safetensors")

    alchemy.load_lora(sdxl, "weights/example.safetensors")      # also: add_lora, save_lora
    made = alchemy.insert(sdxl, "a photo of a flower on grass", "flower", "sks")
    made.result.save("sunflower.png")

The denoising loop is a generator of Steps, for whoever wants to look inside or change it:

    cond, uncond = sdxl.encode_prompt(["a flower"]), sdxl.encode_prompt([None])
    noise = alchemy.noise((1, 4, 32, 32), seeds=[0])
    for step in alchemy.denoise(sdxl, noise, cond, uncond, sampler="euler", steps=30):
        print(step.t, step.x_0.std())
    images = sdxl.vae.decode(step.x_prev)           # (1,3,128,128) in [-1,1]

Read the code in this order: schedule, samplers, sampling; tokenizer, clip, blocks, vae; lora,
attention, unet, sdxl; pipeline; dataset, training; segmentation, insertion.

torch is imported when a name is first used. If `import alchemy` has no attribute `load`, Python
found a clone whose folder is called "alchemy" from the outside: start Python inside the clone, or
write `from alchemy import alchemy`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names once more, for editors
    from .extras.inspect.page import inspect as inspect
    from .formats.checkpoint import load as load
    from .formats.lora import load_lora as load_lora
    from .formats.lora import save_lora as save_lora
    from .insertion import Insertion as Insertion
    from .insertion import insert as insert
    from .lora import add_lora as add_lora
    from .lora import lora_scale as lora_scale
    from .lora import set_lora_scale as set_lora_scale
    from .methods.subject import train_lora as train_lora
    from .pipeline import image_to_image as image_to_image
    from .pipeline import text_to_image as text_to_image
    from .samplers import Sampler as Sampler
    from .sampling import Step as Step
    from .sampling import denoise as denoise
    from .sampling import generators as generators
    from .sampling import keep_background as keep_background
    from .sampling import noise as noise
    from .sdxl import SDXL as SDXL
    from .sdxl import Conditioning as Conditioning
    from .segmentation import segment as segment

# {name: module}. A module is never named as a function: importing it would hide the function.
EXPORTS = {
    "load": "formats.checkpoint",
    "SDXL": "sdxl",
    "Conditioning": "sdxl",
    "noise": "sampling",
    "generators": "sampling",
    "denoise": "sampling",
    "Step": "sampling",
    "Sampler": "samplers",
    "keep_background": "sampling",
    "text_to_image": "pipeline",
    "image_to_image": "pipeline",
    "segment": "segmentation",
    "insert": "insertion",
    "Insertion": "insertion",
    "add_lora": "lora",
    "set_lora_scale": "lora",
    "lora_scale": "lora",
    "load_lora": "formats.lora",
    "save_lora": "formats.lora",
    "train_lora": "methods.subject",
    "inspect": "extras.inspect.page",
}
__all__ = list(EXPORTS)


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name not in EXPORTS:
        raise AttributeError(f"module 'alchemy' has no attribute {name!r}")
    value = getattr(import_module(f".{EXPORTS[name]}", __name__), name)
    globals()[name] = value
    return value
