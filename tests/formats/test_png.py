"""The metadata in PNG files."""

import json

import numpy as np
import pytest
from helpers.planted import noise_picture
from PIL import Image, PngImagePlugin

from alchemy import images
from alchemy.formats.png import a1111_parameters, read_metadata, save


def pixels(picture):
    return np.asarray(picture).tolist()


FACTS = {
    "prompt": "a photo of a “dog”, 犬, \x07 & <b>",
    "seed": 0,
    "lora": [["a.safetensors", 0.8]],
    "guidance": 5.0,
    "size": None,
}


def test_facts_return_from_a_png_with_the_pixels_to_the_bit(tmp_path):
    picture = noise_picture(20, 30)
    save(picture, tmp_path / "a.png", FACTS)
    assert read_metadata(tmp_path / "a.png") == FACTS and pixels(
        images.read(tmp_path / "a.png")
    ) == pixels(picture)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_a_picture_without_facts_is_an_error_that_names_it(tmp_path):
    names = ("bare.png", "bare.jpg", "other.png")
    for name in names:
        info = PngImagePlugin.PngInfo()
        info.add_text("alchemy", "{not json")
        options = {"pnginfo": info} if name == "other.png" else {}
        noise_picture(4, 4).save(tmp_path / name, **options)
        with pytest.raises(ValueError, match=f"{name}: has no facts of how it was made"):
            read_metadata(tmp_path / name)
    with pytest.raises(ValueError, match="none.png: no such file"):
        read_metadata(tmp_path / "none.png")
    assert json.loads(json.dumps(FACTS)) == FACTS


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
    with Image.open(tmp_path / "a.png") as image:
        assert image.info["parameters"] == text
    assert read_metadata(tmp_path / "a.png") == metadata
    save(noise_picture(4, 4), tmp_path / "b.png", {"prompt": "a sheet"})
    with Image.open(tmp_path / "b.png") as image:
        assert "parameters" not in image.info
