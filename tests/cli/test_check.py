"""What train.py says of pictures, captions and token before it begins, and --check, which stops there."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import alchemy
from alchemy import dataset, images
from alchemy.command import fitting
from alchemy.methods import masks
from alchemy.extras.inspect import preflight
from alchemy.extras.inspect.sheets import LINE
from alchemy.extras import memory
from helpers.checkpoints import vocabulary_read_once  # noqa: F401
from helpers.running import call, contents, good, photos, picture, quick, taught, tiny  # noqa: F401


@pytest.fixture
def sdxl(tiny):
    return alchemy.load(tiny, "cpu")


def test_tiny_pictures_copies_and_long_captions_are_named_and_good_ones_not(sdxl, tmp_path):
    for name, size, seed in (
        ("a", (40, 60), 0),
        ("b", (20, 60), 1),
        ("c", (40, 60), 0),
        ("d", (32, 32), 2),
    ):
        picture(*size, seed).save(tmp_path / f"{name}.png")
    captions = {"a": "a dog", "b": "a dog", "c": "very " * 80 + "green", "d": "a dog"}
    lines, page = preflight.look(
        sdxl, [(tmp_path / f"{name}.png", text) for name, text in captions.items()], (32, 32)
    )
    assert len(lines) == 3 and page.width > 4 * 256
    assert lines[0].startswith("b.png is small, 60x20") and "1.6 times" in lines[0]
    assert (
        lines[1] == "c.png is the same image as a.png"
        and lines[2].startswith("c.png: the caption is too long")
        and "green" in lines[2]
    )


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


def test_the_rare_token_has_as_many_pieces_as_its_tokenizer_says(sdxl):
    assert preflight.pieces(sdxl, "sks") == [1, 1] and preflight.pieces(sdxl, "xyzzyqwrt")[0] > 3


@pytest.mark.parametrize(
    "height, width, words",
    [(40, 80, ["crop moves sideways"]), (80, 40, ["crop moves up and down"]), (40, 41, [])],
)
def test_the_label_says_where_the_crop_moves(sdxl, tmp_path, monkeypatch, height, width, words):
    labels = []
    monkeypatch.setattr(
        preflight, "sheet", lambda rows: labels.extend(label for row in rows for label, _ in row)
    )
    picture(height, width).save(tmp_path / "a.png")
    preflight.look(sdxl, [(tmp_path / "a.png", "a dog")], (32, 32))
    assert labels == [", ".join([f"a.png {width}x{height}", *words])]


def test_what_a_mask_leaves_out_is_dark_on_the_sheet(sdxl, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(
        preflight, "sheet", lambda rows: shown.extend(p for row in rows for _, p in row)
    )
    Image.new("RGB", (64, 64), (200, 100, 40)).save(tmp_path / "a.png")
    mask = Image.fromarray(np.repeat([[255] * 32 + [0] * 32], 64, 0).astype(np.uint8))
    preflight.look(sdxl, [(tmp_path / "a.png", "a dog")], (32, 32), False, lambda path: mask)
    assert [shown[0].getpixel(place) for place in ((10, 32), (50, 32))] == [
        (200, 100, 40),
        (50, 25, 10),
    ]


def test_check_segments_the_first_photo_for_its_sheet(taught, monkeypatch):
    asked = []
    monkeypatch.setattr(
        masks,
        "mask_of",
        lambda how, path, sdxl, word: (
            asked.append((how, path.name, word)) or Image.new("L", images.read(path).size, 255)
        ),
    )
    good(taught("--check", "--mask", "segment", "--out", "run"))
    assert asked == [("segment", "0.png", "dog")] * 2  # for the sheet, and to be encoded


@pytest.mark.parametrize("method", ["lora", "full", "textual-inversion"])
def test_check_foresees_the_memory_of_weights_what_learns_and_activations(taught, sdxl, method):
    flags = (
        "--method",
        method,
        *{"full": ("--prior-weight", 0), "textual-inversion": ("--token", "<foreseen>")}.get(
            method, ()
        ),
    )
    run = good(taught("--check", "--out", "run", *flags))
    wanted = memory.Run(
        (32, 32),
        torch.float32,
        {"lora": 8}.get(method, 4),
        method,
        sdxl.defaults["rank"],
        previews=False,
    )
    assert fitting.told(memory.training(sdxl, wanted)) in run.err.splitlines()


def test_check_stops_before_training_and_leaves_a_finished_run_as_it_is(taught):
    run = good(taught("--check", "--out", "run"))
    assert (
        sorted(contents("run")) == ["check.png"]
        and "pieces in the two tokenizers" in run.err
        and "a step takes" in run.err
    )
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
    assert (
        "8 pictures with 8 captions" in run.err
        and "pieces" not in run.err
        and sorted(contents("run")) == ["check.png"]
    )


def test_a_caption_that_is_too_long_is_said_once_and_with_its_picture(tiny, tmp_path):
    (tmp_path / "set").mkdir()
    picture(32, 32).save(tmp_path / "set/a.png")
    (tmp_path / "set/a.txt").write_text("very " * 75 + "green 2024")
    run = good(
        call(
            "train.py",
            "set",
            "--captions",
            "--weights",
            tiny,
            "--rank",
            2,
            "--steps",
            1,
            "--preview-every",
            0,
            "--out",
            "run",
        )
    )
    assert (
        run.err.count("lost") == 1
        and "a.png: the caption is too long, this is cut off: 'green 2024'" in run.err
    )


def test_check_draws_no_class_picture_encodes_one_photo_and_looks_first(taught, monkeypatch):
    seen, encode, look = [], dataset.encode, preflight.look
    monkeypatch.setattr(dataset, "encode", lambda *args: seen.append("encoded") or encode(*args))
    monkeypatch.setattr(preflight, "look", lambda *args: seen.append("looked") or look(*args))
    for flags in (("--class-pictures", 3), ("--method", "full")):
        run = good(taught("--check", *flags, "--out", "run"))
        assert (
            sorted(contents("run")) == ["check.png"]
            and "a step takes" in run.err
            and [p.name for p in run.wrote] == ["check.png"]
        )
    assert seen == ["looked", "encoded"] * 2


def test_the_step_that_is_timed_comes_after_one_that_made_the_moments(taught, monkeypatch):
    steps, whole = [], torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self, *args: steps.append(len(self.state)) or whole(self, *args),
    )
    good(taught("--check", "--out", "run"))
    assert len(steps) == 2 and steps[0] == 0 < steps[1]


def test_a_new_words_rows_are_not_counted_as_pieces(tiny, tmp_path):
    photos(tmp_path / "photos")
    run = good(
        call(
            "train.py",
            "photos",
            "--init-word",
            "dog",
            "--method",
            "textual-inversion",
            "--vectors",
            9,
            "--weights",
            tiny,
            "--check",
            "--out",
            "run",
        )
    )
    assert "pieces" not in run.err and "a step takes" in run.err


def test_the_sheet_shows_60_reduced_and_the_rest_is_looked_at_too(sdxl, tmp_path, monkeypatch):
    kept, frame = [], preflight.frame_crop
    monkeypatch.setattr(
        preflight,
        "frame_crop",
        lambda picture, size: kept.append(picture.size) or frame(picture, size),
    )
    Image.new("RGB", (1024, 768)).save(tmp_path / "large.png")
    picture(40, 40).save(tmp_path / "small.png")
    lines, page = preflight.look(
        sdxl,
        [
            (tmp_path / "large.png", "a dog"),
            *[(tmp_path / "small.png", "a dog")] * 64,
            (tmp_path / "large.png", "very " * 80),
        ],
        (32, 32),
    )
    assert (
        len(kept) == 60
        and kept[0] == (512, 384)
        and lines[-1].startswith("large.png: the caption is too long")
    )
