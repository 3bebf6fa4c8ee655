"""Pictures with captions of their own, and masks that say what of a photo is learned."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import alchemy
from alchemy import dataset
from alchemy.methods import captions, masks
from alchemy.sdxl import Conditioning
from alchemy.training import tell
from helpers.checkpoints import refused, vocabulary_read_once  # noqa: F401
from helpers.planted import Planted
from helpers.running import call, contents, good, lora_file, photos, picture, quick, tiny  # noqa: F401
from helpers.running import refused as run_refused
from test_resume import stopped  # noqa: F401


def written(folder, sizes=((40, 40), (24, 48), (48, 24), (40, 40)), table=True):
    """A folder of pictures of (H,W) with captions, in metadata.jsonl or in .txt files."""
    folder.mkdir()
    for k, (height, width) in enumerate(sizes):
        picture(height, width, k).save(folder / f"{k}.png")
        if not table:
            (folder / f"{k}.txt").write_text(f"a picture\n of {k}\n")
    if table:
        lines = [
            json.dumps({"file_name": f"{k}.png", "text": f"a picture of {k}"})
            for k in range(len(sizes))
        ]
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n\n")
    return folder


@pytest.mark.parametrize("table", [True, False])
def test_captions_are_read_from_either_place(tmp_path, table):
    folder = written(tmp_path / "a", table=table)
    assert captions.read(folder) == [(folder / f"{k}.png", f"a picture of {k}") for k in range(4)]


@pytest.mark.parametrize(
    "line, words",
    [
        ("[" * 100000, ["line 2", "not like"]),
        ('{"file_name": "1.png", "text": " "}', ["line 2", "1.png is empty"]),
        ('{"file_name": "0.png", "text": "again"}', ["0.png stands in it twice"]),
        ("{", ["line 2", "not like"]),
        ('{"file_name": "0.png"}', ["line 2", "not like"]),
        ('["0.png", "a dog"]', ["line 2", "not like"]),
        ('{"file_name": "none.png", "text": "a dog"}', ["line 2", "none.png: no such file"]),
        ('{"file_name": "0.png", "text": 3}', ["line 2", "not a string"]),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path, line, words):
    folder = written(tmp_path / "a")
    first = (folder / "metadata.jsonl").read_text().splitlines()[0]
    (folder / "metadata.jsonl").write_text(f"{first}\n{line}\n")
    refused(lambda: captions.read(folder), "metadata.jsonl", *words)


def test_a_line_ends_where_json_lines_has_it_end(tmp_path):
    folder = written(tmp_path / "a", sizes=((40, 40),))
    (folder / "metadata.jsonl").write_bytes(
        '{"file_name": "0.png", "text": "one\u2028two"}\r\n'.encode()
    )
    assert captions.read(folder) == [(folder / "0.png", "one\u2028two")]


@pytest.mark.parametrize("table", [True, False])
def test_a_file_that_is_not_utf_8_is_named(tmp_path, table):
    folder = written(tmp_path / "a", table=table)
    name = "metadata.jsonl" if table else "2.txt"
    (folder / name).write_bytes("k\xe4se".encode("latin-1"))
    refused(lambda: captions.read(folder), folder / name, "UTF-8", "byte 1")


def test_pictures_that_the_table_does_not_list_are_counted(tiny, tmp_path):
    folder = written(tmp_path / "a")
    assert captions.unlisted(folder, captions.read(folder)) == []
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    (folder / "metadata.jsonl").write_text("\n".join(lines[1:3]))
    assert captions.unlisted(folder, captions.read(folder)) == ["0.png", "3.png"]
    run = good(
        call(
            "train.py",
            folder,
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
        "2 pictures of " in run.err
        and "left out (0.png, 3.png)" in run.err
        and "2 pictures with 2 captions" in run.err
    )


def test_a_lora_of_captions_names_no_subject_in_its_header(tiny, tmp_path):
    good(
        call(
            "train.py",
            written(tmp_path / "a"),
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
    with safe_open("run/lora.safetensors", "pt") as file:
        facts = {
            key.removeprefix("alchemy.") for key in file.metadata() if key.startswith("alchemy.")
        }
    assert facts == {"base", "steps", "seed", "name", "targets", "rank", "alpha"}


def test_what_the_unet_is_told_waits_on_the_cpu_and_goes_where_the_batch_is():
    told = {"a": Conditioning(torch.ones(1, 77, 3), torch.ones(1, 2), torch.zeros(1, 6))}
    on_meta = dataset.Batch(
        *(torch.zeros(2, 4, 8, 8, device="meta"),) * 3,
        torch.zeros(2),
        torch.zeros(2, 6, device="meta"),
        ["a", "a"],
    )
    assert [(part.device.type, len(part)) for part in tell(on_meta, told, on_meta.prompts)] == [
        ("meta", 2)
    ] * 3


def test_pictures_without_a_caption_are_counted_and_named(tmp_path):
    folder = written(tmp_path / "a", table=False)
    (folder / "1.txt").unlink()
    (folder / "3.txt").write_text(" \n")
    refused(lambda: captions.read(folder), "2 of 4", "1.png, 3.png", "metadata.jsonl")


@pytest.mark.parametrize(
    "size, cell, area, expected",
    [
        ((500, 500), 64, 1024**2, (1024, 1024)),
        ((1080, 1920), 64, 1024**2, (768, 1344)),
        ((1920, 1080), 64, 1024**2, (1344, 768)),
        ((600, 400), 32, 128**2, (160, 96)),
        ((500, 500), 32, 128 * 96, (96, 96)),
        ((10, 1000), 64, 1024**2, (512, 2048)),
        ((1000, 10), 64, 1024**2, (2048, 512)),
    ],
)
def test_a_picture_goes_to_the_bucket_of_the_nearest_aspect_ratio(size, cell, area, expected):
    assert captions.bucket(size, area, cell) == expected
    every = [
        (h, w)
        for h in range(cell, area // cell + 1, cell)
        for w in range(cell, area // cell + 1, cell)
        if h * w <= area
        and h <= 4 * w <= 16 * h
        and (h + cell) * w > area < h * (w + cell) + cell * h
    ]
    away = [abs(math.log(h / w) - math.log(size[0] / size[1])) for h, w in every]
    assert abs(math.log(expected[0] / expected[1]) - math.log(size[0] / size[1])) <= min(away) + 0.1


def buckets(sdxl, folder):
    made = {}
    for path, text in captions.read(folder):
        size = captions.bucket(Image.open(path).size[::-1], 32 * 32, 8)
        made.setdefault(size, []).append(dataset.encode(sdxl, path, size, text))
    return made


def test_a_batch_is_of_one_bucket_with_true_sizes_and_drops_its_share_of_captions(tiny, tmp_path):
    sdxl = alchemy.load(tiny, "cpu")
    made = buckets(sdxl, written(tmp_path / "a"))
    assert {size: len(those) for size, those in made.items()} == {
        (32, 32): 2,
        (16, 40): 1,
        (40, 16): 1,
    } or len(made) == 3
    draw, seen, dropped = captions.stream(sdxl, made, 5, 2, dropout=0.25), {}, 0
    for step in range(300):
        batch = draw(step, 0)
        (size,) = {tuple(ids[4:].int().tolist()) for ids in batch.time_ids}
        assert batch.x_0.shape == (2, 4, size[0] // 4, size[1] // 4)
        seen[size] = seen.get(size, 0) + 1
        dropped += batch.prompts.count(None)
        originals = {p.base_weight for p in made[size]}
        assert {tuple(ids[:2].int().tolist()) for ids in batch.time_ids} <= originals
    assert {size: round(4 * count / 300) for size, count in seen.items()} == {
        size: len(those) for size, those in made.items()
    }
    assert dropped == pytest.approx(150, abs=40)
    again = captions.stream(sdxl, made, 5, 2, dropout=0.25)(7, 0)
    assert torch.equal(again.eps, draw(7, 0).eps) and again.prompts == draw(7, 0).prompts


def test_train_learns_from_captions_and_resumes_to_the_same_bits(tiny, tmp_path, stopped):
    folder = written(tmp_path / "a")
    flags = (
        "train.py",
        folder,
        "--captions",
        "--weights",
        tiny,
        "--rank",
        2,
        "--steps",
        4,
        "--preview-every",
        0,
    )
    run = good(call(*flags, "--out", "whole"))
    assert "4 pictures with 4 captions" in run.err
    assert stopped((*flags, "--out", "half"), step=2).status == 143
    good(call("train.py", folder, "--out", "half", "--resume"))
    whole, half = load_file("whole/lora.safetensors"), load_file("half/lora.safetensors")
    assert all(torch.equal(whole[key], half[key]) for key in whole) and whole.keys() == half.keys()


def test_captions_and_a_class_do_not_go_together(tiny, tmp_path):
    folder = written(tmp_path / "a")
    for flags, word in (
        (("--class-word", "dog"), "--class-word"),
        (("--class-pictures", 3), "--class-pictures"),
        (("--mask", "segment"), "--mask segment"),
    ):
        run_refused(
            call("train.py", folder, "--captions", "--weights", tiny, "--out", "x", *flags),
            "--captions" if "mask" in word else "no part in this run",
            word,
        )
    run_refused(call("train.py", "--captions", "--weights", tiny), "needs the folder")


# Masks


def left_half(height, width):
    pixels = np.zeros((height, width), np.uint8)
    pixels[:, : width // 2] = 255
    return Image.fromarray(pixels)


def test_a_mask_of_a_folder_or_of_the_alpha_channel_is_found_and_turned_as_the_photo(tmp_path):
    photo, mask = picture(40, 24), left_half(40, 24)
    (tmp_path / "masks").mkdir()
    photo.save(tmp_path / "a.png")
    mask.save(tmp_path / "masks" / "a.webp", lossless=True)
    assert (
        masks.mask_of(tmp_path / "masks", tmp_path / "a.png", None, None).tobytes()
        == mask.tobytes()
    )
    photo.putalpha(mask)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    photo.save(tmp_path / "b.png", exif=exif)
    turned = masks.mask_of("alpha", tmp_path / "b.png", None, None)
    assert turned.size == (40, 24) and turned.tobytes() == mask.rotate(-90, expand=True).tobytes()


def test_a_mask_that_is_missing_empty_or_of_another_size_is_refused(tmp_path):
    (tmp_path / "masks").mkdir()
    picture(40, 24).save(tmp_path / "a.png")
    refused(
        lambda: masks.mask_of("alpha", tmp_path / "a.png", None, None), "a.png", "no alpha channel"
    )
    refused(
        lambda: masks.mask_of(tmp_path / "masks", tmp_path / "a.png", None, None),
        "no mask of a.png",
    )
    left_half(24, 40).save(tmp_path / "masks" / "a.png")
    refused(
        lambda: masks.mask_of(tmp_path / "masks", tmp_path / "a.png", None, None), "40x24", "24x40"
    )
    Image.new("L", (24, 40)).save(tmp_path / "masks" / "a.png")
    refused(lambda: masks.mask_of(tmp_path / "masks", tmp_path / "a.png", None, None), "empty")


def test_check_looks_at_every_mask(tiny, tmp_path):
    folder = photos(tmp_path / "photos")
    (tmp_path / "masks").mkdir()
    for path in sorted(folder.iterdir())[:2]:
        left_half(*Image.open(path).size[::-1]).save(tmp_path / "masks" / path.name)
    run_refused(
        call(
            "train.py",
            folder,
            "--class-word",
            "dog",
            "--weights",
            tiny,
            "--mask",
            "masks",
            "--check",
            "--out",
            "run",
        ),
        "no mask of 2.png",
    )


def test_segmentation_gives_the_mask_where_the_word_is_seen(tmp_path):
    seen = np.zeros((64, 64), np.float32)
    seen[16:48, 16:48] = 1
    photo = picture(64, 64)
    photo.save(tmp_path / "a.png")
    mask = np.asarray(
        masks.mask_of(
            "segment",
            tmp_path / "a.png",
            Planted({"dog": None}, {"dog": torch.from_numpy(seen)}),
            "dog",
        )
    )
    assert mask[24:40, 24:40].min() == 255 and mask[:8].max() == 0 and mask[:, 56:].max() == 0


def test_a_samples_weight_is_the_masks_share_of_each_latent_cut_as_the_sample(tiny, tmp_path):
    sdxl = alchemy.load(tiny, "cpu")
    picture(40, 64).save(tmp_path / "a.png")
    photo = dataset.encode(
        sdxl, tmp_path / "a.png", (32, 32), "a dog", mirror=True, mask=left_half(40, 64)
    )
    assert [weight.shape for *_, weight in photo.latents] == [
        (1, 8, 12),
        (1, 8, 12),
    ]  # 32 x 51, of which 48 are whole latents
    assert torch.equal(photo.latents[0][2], photo.latents[0][2][:, :1].expand(1, 8, 12))
    assert photo.latents[0][2][0, 0].tolist() == pytest.approx(
        [1, 1, 1, 1, 1, 1, 0.4, 0, 0, 0, 0, 0], abs=0.1
    )
    for step in range(20):
        drawn = dataset.batch([photo], (32, 32), 4, 1000, 0, step, range(1), "cpu")
        left = int(drawn.time_ids[0, 3]) // 4
        assert any(
            torch.equal(drawn.weight[0], weight[:, :, left : left + 8])
            for *_, weight in photo.latents
        )


def test_train_with_masks_learns_something_else(tiny, tmp_path):
    folder = photos(tmp_path / "photos")
    for path in folder.iterdir():
        left_half(*Image.open(path).size[::-1]).save(tmp_path / path.name)
    flags = (
        "train.py",
        folder,
        "--class-word",
        "dog",
        "--weights",
        tiny,
        "--rank",
        2,
        "--steps",
        2,
        "--preview-every",
        0,
    )
    good(call(*flags, "--out", "all"))
    good(call(*flags, "--out", "masked", "--mask", tmp_path))
    one, other = load_file("all/lora.safetensors"), load_file("masked/lora.safetensors")
    assert one.keys() == other.keys() and any(not torch.equal(one[k], other[k]) for k in one)
    assert contents("masked").keys() == contents("all").keys()
