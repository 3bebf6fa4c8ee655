"""insert.py: what it writes, what it leaves alone, and how it names the subject."""

import json

import numpy as np
import pytest
from helpers.running import (
    SCENE,
    call,
    contents,
    good,
    picture,
    pixels,
    refused,
    same,
)
from PIL import Image
from safetensors.torch import load_file, save_file

import alchemy
from alchemy import insertion
from alchemy.formats import png

NAMES = ["crop.png", "feathered.png", "generated.png", "mask.png", "metadata.json"]
NAMES += ["result.png", "scene.png", "sheet.png", "soft_mask.png"]
OWN = (SCENE, "--image", "own.png", "--mask", "mask.png", "--steps", 2)


@pytest.fixture
def insert(inserted):
    return lambda *argv: good(inserted(*argv))


@pytest.fixture
def own(tmp_path):
    """An image of one's own, 50 x 83, with a mask: files, and the mask."""
    mask = np.zeros((50, 83), dtype=np.uint8)
    mask[12:31, 40:63] = 255
    picture(50, 83).save("own.png")
    Image.fromarray(mask).save("mask.png")
    return mask


def image(name):
    return pixels(f"out/insert/{name}.png")


def test_every_intermediate_is_written_and_the_background_is_unchanged(insert):
    run = insert("--steps", 8, "--seed", 2, "--strength", 0.5)
    assert sorted(contents("out/insert")) == NAMES
    written, opened = run.out.splitlines()
    assert sorted(p.split("/")[-1] for p in written.split()[1:]) == NAMES
    assert opened == "open out/insert/sheet.png"
    assert "stage 1: 8/8" in run.err and "stage 2: 4 of 8 steps, first t 376" in run.err

    metadata = json.loads(contents("out/insert")["metadata.json"])
    expected = {"seed": 2, "strength": 0.5, "sampler": "euler", "steps": 8, "token": "sks"}
    expected |= {"first_timestep": 376, "prompt": SCENE, "size": [32, 32]}
    assert expected.items() <= metadata.items() and len(metadata["box"]) == 4
    assert png.read_metadata("out/insert/result.png") == metadata

    outside = image("feathered") == 0
    assert (image("scene") == image("result"))[outside].all()
    assert not same(image("scene"), image("result"))
    for name in ("scene", "soft_mask", "mask", "feathered", "result"):
        assert image(name).shape == (32, 32, 3)
    assert set(np.unique(image("mask"))) <= {0, 255}


def test_the_scene_is_that_of_sample_without_the_lora(insert, pictures):
    insert("--steps", 8, "--seed", 2)
    (scene,) = pictures(SCENE, "--steps", 8, "--seed", 2)
    assert same(image("scene"), scene)


def test_a_further_run_takes_the_next_free_name(inserted, own, tmp_path):
    (tmp_path / "out/insert").mkdir(parents=True)
    picture(8, 8).save("out/insert/scene.png")  # somebody's own
    before = contents("out/insert")
    for _ in range(2):
        good(inserted(*OWN[1:]))
    assert contents("out/insert") == before
    assert sorted(contents("out/insert-1")) == sorted(contents("out/insert-2")) == NAMES
    for _ in range(2):
        run = good(inserted(*OWN[1:], "--out", "new/park.png"))
    assert run.out.split()[1] == "new/park-1.png"
    rest = sorted(set(NAMES) - {"result.png"})
    assert sorted(contents("new/park")) == sorted(contents("new/park-1")) == rest
    assert len(contents("new")) == 2 + 2 * len(rest)
    assert same(pixels("new/park.png"), pixels("out/insert-1/result.png"))


def test_an_image_of_any_size_keeps_every_bit_outside_the_mask(insert, own):
    run = insert(*OWN[1:])
    assert same(image("scene"), pixels("own.png"))
    assert (image("result") == image("scene"))[own == 0].all()
    assert not same(image("result"), image("scene"))
    assert "stage 1" not in run.err
    assert json.loads(contents("out/insert")["metadata.json"])["size"] == [50, 83]


def test_a_mask_of_another_size_is_refused(inserted, own):
    picture(8, 8).save("mask.png")
    refused(inserted(*OWN[1:]), "the mask is 8x8, the image 83x50")


def test_zero_is_a_value_of_threshold_dilate_and_guidance(insert, own, monkeypatch):
    seen, whole = {}, insertion.insert

    def record(*args, **options):
        seen.update(options)
        return whole(*args, **options | {"threshold": 0.4})

    monkeypatch.setattr(alchemy, "insert", record, raising=False)
    zero = ("threshold", "dilate", "guidance")
    flags = "--threshold 0 --dilate 0 --guidance 0".split()
    insert("--image", "own.png", "--steps", 2, *flags)
    metadata = json.loads(contents("out/insert")["metadata.json"])
    assert [seen[k] for k in zero] == [metadata[k] for k in zero] == [0, 0, 0]


@pytest.fixture
def trained(lora_file, tmp_path):
    """A LoRA whose header says that it was trained with "zwx" and "cat"."""
    header = {"alchemy.token": "zwx", "alchemy.class_word": "cat"}
    save_file(load_file(lora_file), tmp_path / "trained.safetensors", header)
    return "trained.safetensors"


@pytest.mark.parametrize(
    "prompt, flags, expected, said",
    [
        ("a cat in a park", [], ("cat", "zwx", "a cat in a park"), None),
        ("a dog here", ["--class-word", "dog"], ("dog", "zwx", "a dog here"), "'dog', but"),
        ("a cat", ["--token", "sks"], ("cat", "sks", "a cat"), "trained with 'zwx'"),
        ("a cat", ["--token", "zwx Cat"], ("cat", "zwx", "a cat"), "--token is 'zwx'"),
        ("a ZWX cat", [], ("cat", "zwx", "a cat"), "without the token: 'a cat'"),
    ],
)
def test_token_and_class_word_come_from_the_lora(tiny, own, trained, prompt, flags, expected, said):
    files = ["--weights", tiny, "--lora", trained, *OWN[1:]]
    run = good(call("insert.py", prompt, *flags, *files))
    metadata = json.loads(contents("out/insert")["metadata.json"])
    assert (metadata["class_word"], metadata["token"], metadata["prompt"]) == expected
    assert said in run.err if said else "warning" not in run.err


def test_the_token_is_that_of_the_only_embedding(tiny, own, tmp_path):
    rows = {name: 0.1 * alchemy.noise((1, 4, 1, width), [0])[0, :1, 0] for name, width in ROWS}
    save_file(rows, tmp_path / "mine.safetensors", {"alchemy.token": "<mine>"})
    flags = ["insert.py", *OWN, "--class-word", "dog", "--weights", tiny]
    flags += ["--embedding", "mine.safetensors"]
    for token, name in ((None, "out/insert"), ("<mine>", "same"), ("sks", "other")):
        run = good(call(*flags, "--out", name, *(("--token", token) if token else ())))
        assert json.loads(contents(name)["metadata.json"])["token"] == (token or "<mine>")
        assert ("is in no prompt" in run.err) == (token == "sks")
    assert same(image("generated"), pixels("same/generated.png"))
    assert not same(image("generated"), pixels("other/generated.png"))


ROWS = (("clip_l", 8), ("clip_g", 12))  # widths of the tiny checkpoint's text encoders
