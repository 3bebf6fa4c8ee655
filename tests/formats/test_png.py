"""The metadata in PNG files."""

import numpy as np
import pytest
from helpers.checkpoints import refused
from helpers.planted import noise_picture
from PIL import Image, PngImagePlugin

from alchemy import images
from alchemy.formats.png import a1111_parameters, read_metadata, save

METADATA = {
    "prompt": "a photo of a “dog”, 犬, \x07 & <b>",
    "seed": 0,
    "lora": [["a.safetensors", 0.8]],
    "guidance": 5.0,
    "size": None,
}


def test_metadata_returns_from_a_png_with_the_pixels_to_the_bit(tmp_path):
    image = noise_picture(20, 30)
    save(image, tmp_path / "a.png", METADATA)
    assert read_metadata(tmp_path / "a.png") == METADATA
    assert np.array_equal(images.read(tmp_path / "a.png"), image)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("name", ["bare.png", "bare.jpg", "damaged.png", "missing.png"])
def test_an_image_without_metadata_is_an_error_that_names_it(tmp_path, name):
    info = PngImagePlugin.PngInfo()
    info.add_text("alchemy", "{not json")
    if name != "missing.png":
        options = {"pnginfo": info} if name == "damaged.png" else {}
        noise_picture(4, 4).save(tmp_path / name, **options)
    words = "no such file" if name == "missing.png" else "has no metadata"
    refused(lambda: read_metadata(tmp_path / name), f"{name}: {words}")


def test_the_parameters_chunk_is_as_a1111_writes_it(tmp_path):
    metadata = {
        "prompt": "a photo of a sks dog",
        "negative_prompt": "blurry",
        "steps": 30,
        "sampler": "euler_ancestral",
        "guidance": 5.0,
        "seed": 7,
        "size": [768, 1024],
        "image": "start.png",
        "strength": 0.6,
    }
    text = (
        "a photo of a sks dog\nNegative prompt: blurry\nSteps: 30, Sampler: Euler a, "
        "CFG scale: 5.0, Seed: 7, Size: 1024x768, Denoising strength: 0.6, Version: Alchemy"
    )
    assert a1111_parameters(metadata) == text
    save(noise_picture(4, 4), tmp_path / "a.png", metadata)
    assert read_metadata(tmp_path / "a.png") == metadata
    save(noise_picture(4, 4), tmp_path / "b.png", {"prompt": "a sheet"})
    for name, expected in (("a.png", text), ("b.png", None)):
        with Image.open(tmp_path / name) as image:
            assert image.info.get("parameters") == expected
