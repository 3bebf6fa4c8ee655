"""Damaged settings, image metadata and lists of images: success or one line, in bounded time."""

import json
import random
from pathlib import Path

import pytest
from helpers.fuzzing import CASES, outcome, seeds, spoil_json, spoiled
from helpers.running import MAIN, picture

import insert
import sample
import train
from alchemy import cli
from alchemy.extras import image_sets
from alchemy.files import save_json
from alchemy.formats import png
from alchemy.methods import captions

SETTINGS = {
    "steps": 4,
    "size": [64, 32],
    "guidance": 2.5,
    "eta": None,
    "seed": 3,
    "sampler": "ddim",
    "spacing": "trailing",
    "negative_prompt": "ugly",
    "lora": [["a.safetensors", 0.5], ["b.safetensors", 1.0]],
    "embedding": ["c.safetensors"],
    "fp8_base": None,
    "compile": False,
    "weights": "folder",
}
PARSERS = {"train.py": train.parser, "sample.py": sample.parser, "insert.py": insert.parser}


@pytest.mark.parametrize("script", MAIN)
def test_damaged_settings_are_read_or_refused(script, tmp_path):
    path, done = tmp_path / "settings.json", 0
    p = PARSERS[script]()
    for seed, content in spoiled(json.dumps(SETTINGS).encode(), spoil_json):
        path.write_bytes(content)

        def read():
            values = cli.read_settings(path, p)
            args = PARSERS[script]().parse_over([], values)
            json.dumps(cli.settings(args))

        done += outcome(read, f"{script}, seed {seed}")
    assert 0 < done < CASES


def test_damaged_image_metadata_is_taken_by_like_or_refused(tmp_path):
    done = 0
    metadata = SETTINGS | {"script": "sample.py", "prompt": "a dog", "strength": 0.5}
    metadata |= {"weights": cli.MINI, "lora": None, "embedding": None}
    for seed, content in spoiled(json.dumps(metadata).encode(), spoil_json):
        write_chunk(content.decode("utf-8", "replace"), "like.png")

        def read():
            args = sample.parse(["--like", "like.png"])
            assert isinstance(args.prompt, str) and 0 <= args.seed < 2**63
            assert args.lora is None and args.weights == cli.MINI

        done += outcome(read, f"seed {seed}")
    assert 0 < done < CASES


def write_chunk(text, path):
    """A PNG whose metadata is any text."""
    from PIL import PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_itxt("alchemy", text)
    picture(8, 8).save(path, pnginfo=info)


def test_damaged_image_files_are_read_or_refused(tmp_path):
    png.save(picture(16, 16), tmp_path / "whole.png", {"script": "sample.py", "prompt": "a"})
    content = (tmp_path / "whole.png").read_bytes()
    done = 0
    for seed in seeds():
        rng = random.Random(seed)
        data = bytearray(content)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        Path("damaged.png").write_bytes(data)
        done += outcome(lambda: sample.parse(["--like", "damaged.png"]), f"seed {seed}")
    assert done < CASES


def test_damaged_lists_of_images_are_read_or_refused(tmp_path):
    for name in ("0.png", "1.png"):
        picture(8, 8).save(tmp_path / name)
    jobs = [image_sets.Job("a", i, tmp_path / f"{i}.png") for i in range(2)]
    row = {"file_name": "0.png", "text": "a dog", "width": 8}
    done = 0
    for seed, content in spoiled(json.dumps(row).encode(), spoil_json):
        other = json.dumps(row | {"file_name": "1.png"}).encode()
        (tmp_path / "metadata.jsonl").write_bytes(content + b"\n" + other)
        outcome(lambda: image_sets.check_list(tmp_path, jobs), f"the list of a set, seed {seed}")
        done += outcome(lambda: captions.read(tmp_path), f"the list of captions, seed {seed}")
    assert 0 < done < CASES


def test_settings_written_by_a_run_are_read_back(tmp_path):
    args = sample.parse(["a", "--size", "64x32", "--lora", "a:0.5", "--eta", "0.5", "--merge"])
    args.lora = [("a", 0.5)]
    save_json(cli.settings(args), tmp_path / "settings.json")
    again = sample.parse(["--config", str(tmp_path / "settings.json")])
    assert vars(again) == vars(args) | {"config": str(tmp_path / "settings.json")}
