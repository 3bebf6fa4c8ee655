"""insert.py: what it writes, what it leaves alone, and what it tells."""

import json

import numpy as np
import pytest
from PIL import Image

import alchemy
from alchemy import insertion
from alchemy.formats import png
from helpers.checkpoints import vocabulary_read_once  # noqa: F401
from helpers.running import (
    SCENE,
    call,
    contents,
    good,
    lora_file,
    picture,
    pictures,
    pixels,
    quick,
    same,
    tiny,
)  # noqa: F401

NAMES = [
    "crop.png",
    "drawn.png",
    "facts.json",
    "feathered.png",
    "mask.png",
    "result.png",
    "scene.png",
    "sheet.png",
    "soft_mask.png",
]


@pytest.fixture
def inserted(tiny, lora_file):
    return lambda *argv: good(
        call(
            "insert.py",
            argv[0],
            "--class-word",
            "dog",
            "--weights",
            tiny,
            "--lora",
            lora_file,
            *argv[1:],
        )
    )


def test_insert_writes_every_intermediate_and_the_facts(inserted, tmp_path):
    run = inserted(SCENE, "--steps", 8, "--seed", 2, "--strength", 0.5)
    assert sorted(contents("out/insert")) == NAMES and sorted(p.name for p in run.wrote) == NAMES
    facts = json.loads(contents("out/insert")["facts.json"])
    assert (facts["seed"], facts["strength"], facts["sampler"], facts["steps"]) == (
        2,
        0.5,
        "euler",
        8,
    )
    assert (
        facts["first_timestep"] == 376
        and "stage 2 ran 4 of 8 steps, first t 376" in run.err
        and "stage 1: 8/8" in run.err
    )
    assert (
        facts["prompt"] == SCENE
        and facts["token"] == "sks"
        and facts["size"] == [32, 32]
        and len(facts["box"]) == 4
    )
    assert png.facts_of("out/insert/result.png") == facts
    feathered, scene, result = (
        pixels(f"out/insert/{name}.png") for name in ("feathered", "scene", "result")
    )
    assert (scene == result)[feathered == 0].all() and not same(scene, result)
    assert {
        pixels(f"out/insert/{name}.png").shape
        for name in ("scene", "soft_mask", "mask", "feathered", "result")
    } == {(32, 32, 3)}
    assert set(np.unique(pixels("out/insert/mask.png"))) <= {0, 255}


def test_the_scene_is_drawn_without_the_lora_as_sample_draws_it(inserted, pictures):
    inserted(SCENE, "--steps", 8, "--seed", 2)
    (scene,) = pictures(SCENE, "--steps", 8, "--seed", 2)
    assert same(pixels("out/insert/scene.png"), scene)


def test_a_second_run_takes_the_next_free_name_and_a_png_is_the_results(inserted, tmp_path):
    (tmp_path / "out/insert").mkdir(parents=True)
    picture(8, 8).save("out/insert/scene.png")  # somebody's own
    before = contents("out/insert")
    picture(32, 32).save("own.png")
    mask = np.zeros((32, 32), dtype=np.uint8)
    mask[8:24, 8:24] = 255
    Image.fromarray(mask).save("mask.png")
    own = [SCENE, "--image", "own.png", "--mask", "mask.png", "--steps", 2]
    inserted(*own)
    inserted(*own)
    assert (
        contents("out/insert") == before
        and sorted(contents("out/insert-1")) == sorted(contents("out/insert-2")) == NAMES
    )
    for _ in range(2):
        run = inserted(*own, "--out", "new/park.png")
    assert run.wrote[0].as_posix() == "new/park-1.png"
    rest = sorted(set(NAMES) - {"result.png"})
    assert sorted(contents("new")) == sorted(
        ["park.png", "park-1.png", *(f"{f}/{name}" for f in ("park", "park-1") for name in rest)]
    )
    assert same(pixels("new/park.png"), pixels("out/insert-1/result.png"))


def test_into_a_picture_of_ones_own_of_any_size_nothing_outside_the_mask_changes(
    inserted, tmp_path
):
    start, mask = picture(50, 83), np.zeros((50, 83), dtype=np.uint8)
    mask[12:31, 40:63] = 255
    start.save("own.png")
    Image.fromarray(mask).save("mask.png")
    run = inserted(SCENE, "--image", "own.png", "--mask", "mask.png", "--steps", 4)
    result, kept = pixels("out/insert/result.png"), pixels("out/insert/scene.png")
    assert (
        same(kept, np.asarray(start))
        and (result == kept)[mask == 0].all()
        and not same(result, kept)
    )
    assert "stage 1" not in run.err and json.loads(contents("out/insert")["facts.json"])[
        "size"
    ] == [50, 83]


def test_a_zero_is_a_value_and_not_a_missing_flag(inserted, monkeypatch):
    seen = {}
    whole = insertion.insert
    monkeypatch.setattr(
        alchemy,
        "insert",
        lambda *args, **options: (
            seen.update(options) or whole(*args, **options | {"threshold": 0.4})
        ),
        raising=False,
    )
    picture(32, 32).save("own.png")
    inserted(
        SCENE, "--image", "own.png", "--steps", 2, "--threshold", 0, "--dilate", 0, "--guidance", 0
    )
    facts = json.loads(contents("out/insert")["facts.json"])
    assert (
        [seen[k] for k in ("threshold", "dilate", "guidance")]
        == [facts[k] for k in ("threshold", "dilate", "guidance")]
        == [0, 0, 0]
    )
