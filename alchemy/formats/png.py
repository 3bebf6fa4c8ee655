"""PNG files that hold the settings they were made with, ours and as A1111 writes them."""

import json
from collections.abc import Callable
from pathlib import Path

from PIL import Image, PngImagePlugin

from .. import images
from ..files import encodable, replace
from .text import parse_json_object, shorten

SAMPLERS = {  # A1111's names
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "dpmpp_2m": "DPM++ 2M",
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "lcm": "LCM",
}


def save(
    image: Image.Image, path: str | Path, metadata: dict, write: Callable = replace
) -> Path | None:
    """Write a PNG with metadata as JSON in its text chunk "alchemy".

    An image of sample.py also gets A1111's chunk "parameters", which its "PNG Info" and image
    sites show. write: files.replace or files.create; its result is returned.
    """
    info = PngImagePlugin.PngInfo()
    info.add_itxt("alchemy", encodable(json.dumps(metadata, ensure_ascii=False)))
    parameters = a1111_parameters(metadata)
    if parameters:
        info.add_text("parameters", encodable(parameters))
    return write(path, lambda new: image.save(new, "PNG", pnginfo=info))


def a1111_parameters(metadata: dict) -> str | None:
    """The settings in A1111's text form; None if it is not an image with a prompt and a seed."""
    if not all(metadata.get(name) is not None for name in ("prompt", "seed", "steps", "sampler")):
        return None
    lines = [metadata["prompt"]]
    if metadata.get("negative_prompt"):
        lines.append(f"Negative prompt: {metadata['negative_prompt']}")
    settings = {
        "Steps": metadata["steps"],
        "Sampler": SAMPLERS.get(metadata["sampler"], metadata["sampler"]),
        "CFG scale": metadata.get("guidance"),
        "Seed": metadata["seed"],
    }
    if metadata.get("size"):
        height, width = metadata["size"]
        settings["Size"] = f"{width}x{height}"
    if metadata.get("image"):  # Img2Img
        settings["Denoising strength"] = metadata.get("strength")
    settings["Version"] = "Alchemy"
    shown = [f"{name}: {value}" for name, value in settings.items() if value is not None]
    return "\n".join([*lines, ", ".join(shown)])


def check(path: str | Path, expected: dict) -> None:
    """Raise ValueError, naming the first difference, if a PNG was made with other settings.

    expected: some of its metadata.
    """
    found = read_metadata(path)
    for name, value in json.loads(json.dumps(expected)).items():
        if found.get(name) != value:
            theirs, ours = shorten(repr(found.get(name))), shorten(repr(value))
            raise ValueError(
                f"{path} was made with other settings ({name} {theirs}, not {ours}): "
                "name another folder"
            )


def read_metadata(path: str | Path) -> dict:
    """The metadata in a PNG's text chunk "alchemy". Raises ValueError if it has none."""
    images.read(path)
    with Image.open(path) as image:
        image.load()  # the chunk may stand behind the pixels
        text = image.info.get("alchemy")
    try:
        return parse_json_object(text)
    except (TypeError, ValueError):
        raise ValueError(
            f"{path}: has no metadata of how it was made (only PNG files written here have)"
        ) from None
