"""Images with captions, in buckets of their shapes, and masks of the photos."""

import math

import numpy as np
import pytest
import torch
from helpers.checkpoints import refused
from helpers.planted import Planted
from helpers.running import call, contents, good, photos, picture
from helpers.running import refused as run_refused
from helpers.training import captioned, left_half, same_tensors
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import alchemy
from alchemy import dataset, training
from alchemy.methods import captions, masks
from alchemy.sdxl import Conditioning
from alchemy.training import gather_conditioning


@pytest.mark.parametrize("table", [True, False])
def test_captions_are_read_from_a_table_or_from_text_files(tmp_path, table):
    folder = captioned(tmp_path / "a", table=table)
    assert captions.read(folder) == [(folder / f"{k}.png", f"a picture of {k}") for k in range(4)]


def test_kohyas_folders_give_repeats_and_prompts(tmp_path):
    for name, count in (("2_sks dog", 2), ("1_dog", 1)):
        photos(tmp_path / "set" / name, count)
    (tmp_path / "set/2_sks dog/1.caption").write_text("a dog asleep\n")
    found = [(path.name, text) for path, text in captions.read(tmp_path / "set")]
    assert found == [
        ("0.png", "dog"),
        *[("0.png", "sks dog")] * 2,
        *[("1.png", "a dog asleep")] * 2,
    ]


@pytest.mark.parametrize(
    "line, words",
    [
        ("[" * 100000, ["line 2", "not like"]),
        ('{"file_name": "1.png", "text": " "}', ["line 2", "1.png is empty"]),
        ('{"file_name": "0.png", "text": "again"}', ["0.png is in it twice"]),
        ("{", ["line 2", "not like"]),
        ('{"file_name": "0.png"}', ["line 2", "not like"]),
        ('["0.png", "a dog"]', ["line 2", "not like"]),
        ('{"file_name": "none.png", "text": "a dog"}', ["line 2", "none.png: no such file"]),
        ('{"file_name": "../a/1.png", "text": "a dog"}', ["line 2", "outside the folder"]),
        ('{"file_name": "/1.png", "text": "a dog"}', ["line 2", "outside the folder"]),
        ('{"file_name": "%s.png", "text": "a dog"}' % ("a" * 999), ["line 2", "aa: no such file"]),
        ('{"file_name": "0.png", "text": 3}', ["line 2", "not a string"]),
    ],
)
def test_a_bad_line_of_the_table_is_named_by_its_number(tmp_path, line, words):
    folder = captioned(tmp_path / "a")
    first = (folder / "metadata.jsonl").read_text().splitlines()[0]
    (folder / "metadata.jsonl").write_text(f"{first}\n{line}\n")
    refused(lambda: captions.read(folder), "metadata.jsonl", *words)


def test_a_line_of_the_table_ends_at_a_line_feed_alone(tmp_path):
    folder = captioned(tmp_path / "a", sizes=((40, 40),))
    row = '{"file_name": "0.png", "text": "one\u2028two"}\r\n'
    (folder / "metadata.jsonl").write_bytes(row.encode())
    assert captions.read(folder) == [(folder / "0.png", "one\u2028two")]


@pytest.mark.parametrize("table", [True, False])
def test_a_caption_file_that_is_not_utf_8_is_named(tmp_path, table):
    folder = captioned(tmp_path / "a", table=table)
    name = "metadata.jsonl" if table else "2.txt"
    (folder / name).write_bytes("k\xe4se".encode("latin-1"))
    refused(lambda: captions.read(folder), folder / name, "UTF-8", "byte 1")


def test_an_image_whose_name_is_as_long_as_can_be_needs_no_caption_of_its_own(tmp_path):
    folder = photos(tmp_path / "1_dog", 1)
    path = (folder / "0.png").rename(folder / ("a" * 251 + ".png"))
    assert captions.read(tmp_path) == [(path, "dog")]


def test_images_without_a_caption_are_named(tmp_path):
    folder = captioned(tmp_path / "a", table=False)
    (folder / "1.txt").unlink()
    (folder / "3.txt").write_text(" \n")
    refused(lambda: captions.read(folder), "2 of 4", "1.png, 3.png", "metadata.jsonl")
    folder = captioned(tmp_path / "b")
    assert captions.unlisted(folder, captions.read(folder)) == []
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    (folder / "metadata.jsonl").write_text("\n".join(lines[1:3]))
    assert captions.unlisted(folder, captions.read(folder)) == ["0.png", "3.png"]


def test_conditioning_moves_from_the_cpu_to_the_device_of_the_batch():
    prompts = {"a": Conditioning(torch.ones(1, 77, 3), torch.ones(1, 2), torch.zeros(1, 6))}
    x, ids = torch.zeros(2, 4, 8, 8, device="meta"), torch.zeros(2, 6, device="meta")
    batch = dataset.Batch(x, x, x, x, torch.zeros(2), ids, ["a", "a"])
    gathered = gather_conditioning(batch, prompts)
    assert [(part.device.type, len(part)) for part in gathered] == [("meta", 2)] * 3


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
def test_the_bucket_has_the_nearest_aspect_ratio(size, cell, area, expected):
    assert captions.bucket(size, area, cell) == expected
    aspect, errors = math.log(size[0] / size[1]), []
    for h in range(cell, area // cell + 1, cell):
        for w in range(cell, area // cell + 1, cell):
            is_large = (h + cell) * w > area < h * (w + cell) + cell * h
            if h * w <= area and h <= 4 * w <= 16 * h and is_large:
                errors.append(abs(math.log(h / w) - aspect))
    assert abs(math.log(expected[0] / expected[1]) - aspect) <= min(errors) + 0.1


def test_a_batch_is_of_one_bucket_and_drops_its_share_of_captions(tiny, tmp_path):
    sdxl, buckets = alchemy.load(tiny, "cpu"), {}
    for path, text in captions.read(captioned(tmp_path / "a")):
        size = captions.bucket(Image.open(path).size[::-1], 32 * 32, 8)
        buckets.setdefault(size, []).append(dataset.encode_image(sdxl, path, size, text))
    assert len(buckets) == 3
    get_batch, seen, dropped = captions.make_batcher(sdxl, buckets, 5, 2, dropout=0.25), {}, 0
    for step in range(300):
        batch = get_batch(step, 0)
        (size,) = {tuple(ids[4:].int().tolist()) for ids in batch.time_ids}
        assert batch.x_0.shape == (2, 4, size[0] // 4, size[1] // 4)
        seen[size] = seen.get(size, 0) + 1
        dropped += batch.prompts.count(None)
        originals = {photo.original for photo in buckets[size]}
        assert {tuple(ids[:2].int().tolist()) for ids in batch.time_ids} <= originals
    shares = {size: round(4 * count / 300) for size, count in seen.items()}
    assert shares == {size: len(of_size) for size, of_size in buckets.items()}
    assert dropped == pytest.approx(150, abs=40)
    again = captions.make_batcher(sdxl, buckets, 5, 2, dropout=0.25)(7, 0)
    assert torch.equal(again.eps, get_batch(7, 0).eps)
    assert again.prompts == get_batch(7, 0).prompts


def test_train_py_trains_on_captions_and_names_no_subject_in_the_header(tiny, tmp_path):
    folder = captioned(tmp_path / "a")
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    (folder / "metadata.jsonl").write_text("\n".join(lines[:3]))
    flags = ("train.py", folder, "--captions", "--weights", tiny, "--rank", 2, "--steps", 3)
    run = good(call(*flags, "--preview-every", 0, "--out", "run"))
    assert "3 images with 3 captions" in run.err and "skipped 1 image " in run.err
    with safe_open("run/lora.safetensors", "pt") as file:
        names = [key for key in file.metadata() if key.startswith("alchemy.")]
    expected = ("base", "steps", "seed", "name", "targets", "rank", "alpha")
    assert set(names) == {f"alchemy.{name}" for name in expected}


# Masks


def test_a_mask_comes_from_a_folder_or_the_alpha_channel_and_is_rotated(tmp_path):
    photo, mask = picture(40, 24), left_half(40, 24)
    (tmp_path / "masks").mkdir()
    photo.save(tmp_path / "a.png")
    mask.save(tmp_path / "masks" / "a.webp", lossless=True)
    found = masks.mask_of(tmp_path / "masks", tmp_path / "a.png", None, None)
    assert found.tobytes() == mask.tobytes()
    photo.putalpha(mask)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated by a quarter
    photo.save(tmp_path / "b.png", exif=exif)
    rotated = masks.mask_of("alpha", tmp_path / "b.png", None, None)
    assert rotated.size == (40, 24)
    assert rotated.tobytes() == mask.rotate(-90, expand=True).tobytes()


def test_a_mask_that_is_missing_empty_or_of_another_size_is_refused(tmp_path):
    path, folder = tmp_path / "a.png", tmp_path / "masks"
    folder.mkdir()
    picture(40, 24).save(path)
    refused(lambda: masks.mask_of("alpha", path, None, None), "a.png", "no alpha channel")
    refused(lambda: masks.mask_of(folder, path, None, None), "no mask named a")
    left_half(24, 40).save(folder / "a.png")
    refused(lambda: masks.mask_of(folder, path, None, None), "40x24", "24x40")
    Image.new("L", (24, 40)).save(folder / "a.png")
    refused(lambda: masks.mask_of(folder, path, None, None), "empty")


def test_segmentation_gives_the_mask_where_attention_finds_the_word(tmp_path):
    heat = np.zeros((64, 64), np.float32)
    heat[16:48, 16:48] = 1
    picture(64, 64).save(tmp_path / "a.png")
    sdxl = Planted({"dog": None}, {"dog": torch.from_numpy(heat)})
    mask = np.asarray(masks.mask_of("segment", tmp_path / "a.png", sdxl, "dog"))
    assert mask[24:40, 24:40].min() == 255 and mask[:8].max() == 0 and mask[:, 56:].max() == 0


def test_train_py_with_masks_trains_something_else_and_checks_every_mask(tiny, tmp_path):
    folder = photos(tmp_path / "photos")
    for path in folder.iterdir():
        left_half(*Image.open(path).size[::-1]).save(tmp_path / path.name)
    common = ("--class-word", "dog", "--weights", tiny, "--rank", 2, "--steps", 2)
    flags = ("train.py", folder, *common, "--preview-every", 0)
    good(call(*flags, "--out", "all"))
    good(call(*flags, "--out", "masked", "--mask", tmp_path))
    loras = [load_file(f"{name}/lora.safetensors") for name in ("all", "masked")]
    assert loras[0].keys() == loras[1].keys() and not same_tensors(*loras)
    assert contents("masked").keys() == contents("all").keys()
    (tmp_path / "2.png").unlink()
    missing = call(*flags, "--check", "--mask", tmp_path, "--out", "run")
    run_refused(missing, "no mask named 2")


def test_outside_the_mask_of_a_photo_the_target_is_the_models_own_prediction(
    taught, tmp_path, monkeypatch, close
):
    for path in (tmp_path / "photos").iterdir():
        left_half(*Image.open(path).size[::-1]).save(tmp_path / path.name)
    seen, loss = [], training.loss
    with monkeypatch.context() as patch:
        patch.setattr(training, "loss", lambda *args: seen.append(args[1:3]) or loss(*args))
        for weight in (0, 1):
            good(taught("--mask", tmp_path, "--prior-weight", weight, "--out", f"run{weight}"))
    (masked, _), (kept, teacher) = seen
    mask = masked.loss_mask
    assert 0.2 < mask.mean() < 0.8 and kept.loss_mask.min() == 1
    close(kept.target, mask * masked.target + (1 - mask) * teacher.target, 1e-6)
