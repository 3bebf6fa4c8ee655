"""What train.py logs about photos and token before it begins, and --check, which stops there."""

import json

import numpy as np
import pytest
import torch
from helpers.running import call, contents, good, photos, picture, refused
from PIL import Image

import alchemy
from alchemy import dataset, images
from alchemy.extras.inspect import preflight
from alchemy.extras.inspect.sheets import LINE
from alchemy.methods import masks


@pytest.fixture
def sdxl(tiny):
    return alchemy.load(tiny, "cpu")


def test_tiny_images_copies_and_long_captions_are_named(sdxl, tmp_path):
    rows = (
        ("a", (40, 60), 0, "a dog"),
        ("b", (20, 60), 1, "a dog"),
        ("c", (40, 60), 0, "very " * 80 + "green"),
        ("d", (32, 32), 2, "a dog"),
    )
    examples = []
    for name, size, seed, caption in rows:
        picture(*size, seed).save(tmp_path / f"{name}.png")
        examples.append((tmp_path / f"{name}.png", caption))
    lines, page = preflight.look(sdxl, examples, (32, 32))
    assert len(lines) == 3 and page.width > 4 * 256
    assert lines[0].startswith("b.png is small, 60x20") and "1.6 times" in lines[0]
    assert lines[1].startswith("c.png is the same") and lines[1].endswith("as a.png")
    assert lines[2].startswith("c.png: the caption is too long") and "green" in lines[2]


@pytest.mark.parametrize(
    "height, width, size, inside, outside",
    [
        (100, 200, (32, 32), (50, 51), (50, 48)),
        (200, 100, (32, 64), (76, 50), (70, 50)),
        (96, 160, (96, 160), (1, 80), None),
    ],
)
def test_the_frame_is_around_the_middle_crop(height, width, size, inside, outside):
    framed = np.asarray(preflight.frame_crop(Image.new("RGB", (width, height)), size))
    assert tuple(framed[inside]) == LINE
    assert outside is None or tuple(framed[outside]) == (0, 0, 0)


@pytest.fixture
def cells(monkeypatch):
    """The (label, image) that the sheet would show."""
    shown = []

    def sheet(rows):
        for row in rows:
            shown.extend(row)

    monkeypatch.setattr(preflight, "sheet", sheet)
    return shown


@pytest.mark.parametrize(
    "height, width, words",
    [(40, 80, ["crop moves sideways"]), (80, 40, ["crop moves up and down"]), (40, 41, [])],
)
def test_the_label_says_how_the_crop_moves(sdxl, tmp_path, cells, height, width, words):
    picture(height, width).save(tmp_path / "a.png")
    preflight.look(sdxl, [(tmp_path / "a.png", "a dog")], (32, 32))
    assert [label for label, _ in cells] == [", ".join([f"a.png {width}x{height}", *words])]


def test_what_a_mask_excludes_is_dark_on_the_sheet(sdxl, tmp_path, cells):
    Image.new("RGB", (64, 64), (200, 100, 40)).save(tmp_path / "a.png")
    mask = Image.fromarray(np.repeat([[255] * 32 + [0] * 32], 64, 0).astype(np.uint8))
    preflight.look(sdxl, [(tmp_path / "a.png", "a dog")], (32, 32), False, lambda path: mask)
    image = cells[0][1]
    assert image.getpixel((10, 32)) == (200, 100, 40) and image.getpixel((50, 32)) == (50, 25, 10)


def test_the_sheet_shows_60_reduced_images_and_the_rest_is_checked_too(sdxl, tmp_path, cells):
    Image.new("RGB", (1024, 768)).save(tmp_path / "large.png")
    picture(40, 40).save(tmp_path / "small.png")
    large, small = (tmp_path / f"{name}.png" for name in ("large", "small"))
    examples = [(large, "a dog"), *[(small, "a dog")] * 64, (large, "very " * 80)]
    lines, _ = preflight.look(sdxl, examples, (32, 32))
    assert len(cells) == 60 and cells[0][1].size == (512, 384)
    assert lines[-1].startswith("large.png: the caption is too long")


def test_check_segments_the_first_photo_for_its_sheet(taught, monkeypatch):
    asked = []

    def mask_of(how, path, sdxl, word):
        asked.append((how, path.name, word))
        return Image.new("L", images.read(path).size, 255)

    monkeypatch.setattr(masks, "mask_of", mask_of)
    good(taught("--check", "--mask", "segment", "--out", "run"))
    assert asked == [("segment", "0.png", "dog")] * 2  # for the sheet, and to be encoded


def test_check_stops_before_training_and_leaves_a_finished_run_alone(taught):
    run = good(taught("--check", "--out", "run"))
    assert sorted(contents("run")) == ["check.png"]
    assert "tokens in the two tokenizers" in run.err and "a step takes" in run.err
    assert images.read("run/check.png").width > 3 * 256
    good(taught("--out", "run"))
    before = contents("run")
    good(taught("--check", "--out", "run"))
    assert contents("run") | {"check.png": 0} == before | {"check.png": 0}


def test_check_replaces_its_own_sheet_alone(taught, tmp_path):
    (tmp_path / "run").mkdir()
    picture(8, 8).save(tmp_path / "run" / "check.png")
    before = contents("run")
    refused(taught("--check", "--out", "run"), "check.png was not written by --check")
    assert contents("run") == before
    good(taught("--check", "--out", "run", "--overwrite"))
    good(taught("--check", "--out", "run"))


def test_a_token_of_many_tokens_gets_a_remark(taught, tiny, tmp_path):
    assert "a short rare word" in good(taught("--token", "xyzzyqwrt", "--out", "run")).err
    assert "a short rare word" not in good(taught("--out", "other")).err
    flags = ("--init-word", "dog", "--method", "textual-inversion", "--vectors", 9)
    run = good(taught(*flags, "--check", "--out", "word"))
    assert "tokens in the two" not in run.err and "a step takes" in run.err


def test_check_looks_at_captions_in_their_buckets(tiny, tmp_path):
    (tmp_path / "set").mkdir()
    rows = []
    for k in range(8):
        picture(24 + 8 * k, 40, k).save(tmp_path / "set" / f"{k}.png")
        rows.append(json.dumps({"file_name": f"{k}.png", "text": f"picture {k}"}))
    (tmp_path / "set/metadata.jsonl").write_text("\n".join(rows))
    run = good(call("train.py", "set", "--captions", "--weights", tiny, "--check", "--out", "run"))
    assert "8 images with " in run.err and sorted(contents("run")) == ["check.png"]


def test_a_caption_that_is_too_long_is_reported_once(tiny, tmp_path):
    (tmp_path / "set").mkdir()
    picture(32, 32).save(tmp_path / "set/a.png")
    (tmp_path / "set/a.txt").write_text("very " * 75 + "green 2024")
    flags = ("--captions", "--weights", tiny, "--rank", 2, "--steps", 1, "--preview-every", 0)
    run = good(call("train.py", "set", *flags, "--out", "run"))
    assert run.err.count("cut off") == 1
    assert "a.png: the caption is too long; this is cut off: 'green 2024'" in run.err


def test_check_generates_no_class_image_and_encodes_one_photo(taught, monkeypatch):
    seen, encode, look = [], dataset.encode_image, preflight.look

    def encoding(*args):
        seen.append("encoded")
        return encode(*args)

    def looking(*args):
        seen.append("looked")
        return look(*args)

    monkeypatch.setattr(dataset, "encode_image", encoding)
    monkeypatch.setattr(preflight, "look", looking)
    for flags in (("--class-images", 3), ("--method", "full")):
        run = good(taught("--check", *flags, "--out", "run"))
        assert sorted(contents("run")) == ["check.png"] and "a step takes" in run.err
        assert [path.name for path in run.wrote] == ["check.png"]
    assert seen == ["looked", "encoded"] * 2


def test_the_timed_step_follows_one_that_made_the_moments(taught, monkeypatch):
    steps, step = [], torch.optim.AdamW.step

    def stepping(self, *args):
        steps.append(len(self.state))
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", stepping)
    good(taught("--check", "--out", "run"))
    assert len(steps) == 2 and steps[0] == 0 < steps[1]
