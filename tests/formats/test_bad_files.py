"""What a bad image, LoRA file or checkpoint gets from the scripts.

One line that names it, exit status 2, nothing written.
"""

# ruff: noqa: F401, F811  fixtures are imported and given as arguments
import io
import os
import pickle
import shutil
import struct
import zlib
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import UNET, write_json
from helpers.running import (
    call,
    call_main,
    contents,
    drawn,
    good,
    inserted,
    lora_file,
    nothing_written,
    picture,
    quick,
    refused,
    taught,
)
from PIL import Image
from safetensors.torch import load_file, save_file

from alchemy.formats.__main__ import main as convert

# Photos and images


class Pwned:
    """Writes a file when it is unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("pwned"),))


def truncated_jpeg():
    buffer = io.BytesIO()
    picture(40, 40).save(buffer, "JPEG")
    return buffer.getvalue()[: len(buffer.getvalue()) // 2]


def huge_png():
    """A few bytes that claim 7.5 GB of pixels."""

    def chunk(kind, data):
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 50000, 50000, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 10000))
    return b"\x89PNG\r\n\x1a\n" + head + pixels + chunk(b"IEND", b"")


DAMAGED = {
    "truncated.jpg": (truncated_jpeg(), "not a readable"),
    "text.png": (b"this is no image", "not a readable"),
    "empty.webp": (b"", "not a readable"),
    "huge.png": (huge_png(), "million pixels"),
    "pickle.png": (pickle.dumps(Pwned()), "not a readable"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_image_is_named(taught, drawn, inserted, tmp_path, name):
    content, words = DAMAGED[name]
    Path(name).write_bytes(content)
    picture(32, 32).save("scene.png")
    refused(drawn("--image", name), name, words)
    refused(drawn("--like", name), name, words)
    refused(inserted("--image", name), name, words)
    refused(inserted("--image", "scene.png", "--mask", name), name, words)
    shutil.copy(name, tmp_path / "photos" / name)
    refused(taught("--out", "run"), f"photos/{name}", words)
    assert nothing_written() and not contents("run") and not Path("pwned").exists()


def test_a_folder_that_is_missing_or_without_images_is_named(tiny, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/notes.txt").touch()
    train = ("train.py", "--class-word", "dog", "--weights", tiny)
    refused(call(*train, "nowhere"), "nowhere", "no such folder")
    refused(call(*train, "empty/notes.txt"), "empty/notes.txt", "no such folder")
    refused(call(*train, "empty"), "empty", "no images found", ".jpg", "check the path")
    assert nothing_written()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(taught, drawn, lora_file):
    os.mkfifo("pipe")
    for flag in ("--lora", "--embedding", "--config", "--like", "--image", "--vae", "--weights"):
        refused(drawn(flag, "pipe"), "pipe")
    refused(call("sample.py", "--prompts", "pipe"), "pipe: a pipe or a device, not a file")
    refused(call_main(convert, "pipe", "a.safetensors", "--to", "peft"), "pipe: a pipe")
    good(taught("--out", "run"))
    for name in ("settings.json", "state.safetensors", "log.csv", ".lock"):
        Path("run", name).rename("kept") if name != ".lock" else None
        os.mkfifo(f"run/{name}")
        run = call("train.py", "--out", "run", "--resume", "--steps", 2)
        refused(run, f"run/{name}: a pipe or a device, not a file")
        os.unlink(f"run/{name}")
        Path("kept").rename(f"run/{name}") if name != ".lock" else None


def test_links_in_a_circle_are_refused(taught, tmp_path):
    for folder in ("circle", "photos/circle.png"):
        Path(folder).symlink_to(Path(folder).name)
    run = call("train.py", "circle", "--class-word", "dog")
    refused(run, "circle: no such folder")
    good(taught("--out", "run"))


def test_a_file_that_is_not_there_is_named(drawn, inserted):
    for run in (drawn, inserted):
        refused(run("--image", "none.png"), "none.png: no such file")
        refused(run("--lora", "none.safetensors:0.5"), "none.safetensors", "No such file")
    refused(inserted("--mask", "none.png"), "none.png: no such file")
    refused(drawn("--like", "none.png"), "none.png: no such file")


def test_a_mask_of_another_size_is_refused_with_both_sizes(inserted):
    picture(32, 40).save("scene.png")
    scene, mask = ("--image", "scene.png"), ("--mask", "mask.png")
    Image.new("L", (40, 31), 255).save("mask.png")
    refused(inserted(*scene, *mask), "the mask is 40x31", "40x32")
    refused(inserted(*mask), "the mask is 40x31", "32x32")
    Image.new("L", (40, 32), 0).save("mask.png")
    refused(inserted(*scene, *mask), "mask is empty")
    assert nothing_written()


def test_like_takes_only_images_of_sample(drawn, taught):
    picture(8, 8).save("plain.png")
    refused(drawn("--like", "plain.png"), "plain.png", "no metadata")
    good(taught("--out", "run"))
    refused(drawn("--like", "run/loss.png"), "run/loss.png", "sample.py")


# LoRA files and checkpoints


def test_a_damaged_lora_file_is_named(drawn, inserted, lora_file):
    pickled, not_whole = pickle.dumps(Pwned()), "not a whole safetensors file"
    for name, content, words in (
        ("text.safetensors", b"this is no LoRA, but a text of some length", not_whole),
        ("cut.safetensors", lora_file.read_bytes()[:-1], not_whole),
        ("pickle.safetensors", pickled, "pickle"),
        ("pickle.pt", pickled, "pickle"),
    ):
        Path(name).write_bytes(content)
        refused(drawn("--lora", name), name, words)
        refused(inserted("--lora", name), name, words)
    refused(call("sample.py", "a dog", "--weights", "pickle.pt"), "pickle.pt", "pickle")
    refused(drawn("--vae", "pickle.pt"), "pickle.pt", "pickle")
    assert nothing_written() and not Path("pwned").exists()


def test_a_lora_that_does_not_fit_is_named(drawn, inserted, lora_file, tiny):
    tensors = load_file(lora_file)
    stem = "lora_unet_output_blocks_5_1_transformer_blocks_0_attn2_to_k"
    down, up = torch.zeros(2, 2048), torch.zeros(640, 2)
    other = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
    save_file(tensors | other, "other.safetensors")
    layer = "up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_k"
    for run in (drawn("--lora", "other.safetensors"), inserted("--lora", "other.safetensors")):
        refused(run, "other.safetensors", layer, "(640, 2048)", "(12, 20)", tiny)
    more = "lora_te1_text_model.alpha"
    save_file(tensors | {more: torch.ones(1)}, "more.safetensors")
    refused(drawn("--lora", "more.safetensors"), "more.safetensors", "1 of its", more)
    assert nothing_written()


def test_a_checkpoint_that_is_not_there_or_of_another_kind_is_named(taught, copy, tmp_path):
    def refused_by_both(path, *words):
        refused(call("sample.py", "a dog", "--weights", path), path, *words)
        refused(taught("--weights", path), path, *words)

    (tmp_path / "empty").mkdir()
    refused_by_both("nowhere/at/all", "no such folder")
    refused_by_both("empty", "not a checkpoint folder", "unet/config.json")
    refused_by_both("photos/0.png", "safetensors")
    write_json(copy / "unet/config.json", UNET | {"addition_embed_type": None})
    refused_by_both(copy, "Stable Diffusion 1 or 2")
    write_json(copy / "unet/config.json", UNET | {"in_channels": 9})
    refused_by_both(copy, "inpainting")
    write_json(copy / "unet/config.json", UNET)
    file = copy / "unet/diffusion_pytorch_model.safetensors"
    save_file({k: t for k, t in load_file(file).items() if k != "conv_out.bias"}, file)
    refused_by_both(copy, "unet: 1 tensors missing", "conv_out.bias")
    assert nothing_written()
