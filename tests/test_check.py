"""What train.py says of pictures, captions and token before it begins, and --check, which stops there."""
import json

import numpy as np
import pytest
from PIL import Image

import alchemy
from alchemy import images
from alchemy.report import preflight
from alchemy.report.sheets import LINE
from checkpoints import vocabulary_read_once  # noqa: F401
from running import call, contents, good, photos, picture, quick, taught, tiny  # noqa: F401


@pytest.fixture
def sdxl(tiny):
    return alchemy.load(tiny, "cpu")


def test_tiny_pictures_copies_and_long_captions_are_named_and_good_ones_not(sdxl, tmp_path):
    for name, size, seed in (("a", (40, 60), 0), ("b", (20, 60), 1), ("c", (40, 60), 0), ("d", (32, 32), 2)):
        picture(*size, seed).save(tmp_path / f"{name}.png")
    captions = {"a": "a dog", "b": "a dog", "c": "very " * 80 + "green", "d": "a dog"}
    lines, page = preflight.look(sdxl, [(tmp_path / f"{name}.png", text) for name, text in captions.items()], (32, 32))
    assert len(lines) == 3 and page.width > 4 * 256
    assert lines[0].startswith("b.png is tiny, 60x20") and "1.6 times" in lines[0]
    assert lines[1] == "c.png is the same picture as a.png" and lines[2].startswith("c.png: its caption is too long") and "green" in lines[2]


@pytest.mark.parametrize("height, width, size, inside, outside", [
    (100, 200, (32, 32), (50, 51), (50, 48)), (200, 100, (32, 64), (76, 50), (70, 50)), (96, 160, (96, 160), (1, 80), None)])
def test_the_frame_is_around_the_middle_crop(height, width, size, inside, outside):
    framed = np.asarray(preflight.cropped(Image.new("RGB", (width, height)), size))
    assert tuple(framed[inside]) == LINE
    assert outside is None or tuple(framed[outside]) == (0, 0, 0)


def test_the_rare_token_has_as_many_pieces_as_its_tokenizer_says(sdxl):
    assert preflight.pieces(sdxl, "sks") == [1, 1] and preflight.pieces(sdxl, "xyzzyqwrt")[0] > 3


def test_check_stops_before_training_and_leaves_a_finished_run_as_it_is(taught):
    run = good(taught("--check", "--out", "run"))
    assert sorted(contents("run")) == ["check.png"] and "pieces in the two tokenizers" in run.err and "a step takes" in run.err
    assert images.read("run/check.png").width > 3 * 256
    good(taught("--out", "run"))
    before = contents("run")
    good(taught("--check", "--out", "run"))
    assert {**contents("run"), "check.png": 0} == {**before, "check.png": 0}


def test_a_token_of_many_pieces_is_remarked_on_before_training(taught):
    assert "a short rare word" in good(taught("--token", "xyzzyqwrt", "--out", "run")).err
    assert "a short rare word" not in good(taught("--out", "other")).err


def test_check_looks_at_captions_in_their_buckets(tiny, tmp_path):
    (tmp_path / "set").mkdir()
    rows = []
    for k in range(8):
        picture(24 + 8 * k, 40, k).save(tmp_path / "set" / f"{k}.png")
        rows.append(json.dumps({"file_name": f"{k}.png", "text": f"picture {k}"}))
    (tmp_path / "set/metadata.jsonl").write_text("\n".join(rows))
    run = good(call("train.py", "set", "--captions", "--weights", tiny, "--check", "--out", "run"))
    assert "8 pictures with 8 captions" in run.err and "pieces" not in run.err and sorted(contents("run")) == ["check.png"]
