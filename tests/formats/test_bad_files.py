"""What a bad picture, LoRA file or checkpoint gets from the scripts: one line that names it, exit status 2, nothing written."""

import io
import json
import pickle
import shutil
import struct
import zlib
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import UNET, vocabulary_read_once, write_folder, write_json  # noqa: F401
from helpers.running import (
    call,
    contents,
    drawn,
    good,
    inserted,
    lora_file,
    nothing_written,
    photos,
    picture,
    quick,
    refused,
    taught,  # noqa: F401
    tiny,
)
from PIL import Image
from safetensors.torch import load_file, save_file

# Photos and pictures


def damaged(path):
    """A file of each kind of damage, by name."""
    buffer = io.BytesIO()
    picture(40, 40).save(buffer, "JPEG")
    (path / "truncated.jpg").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    (path / "text.png").write_text("this is no picture")
    (path / "empty.webp").write_bytes(b"")

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", 50000, 50000, 8, 2, 0, 0, 0)  # 7.5 GB of pixels
    (path / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(b"\0" * 10000))
        + chunk(b"IEND", b"")
    )
    (path / "pickle.png").write_bytes(pickle.dumps(Pwned()))


class Pwned:
    """Whoever unpickles it is found out."""

    def __reduce__(self):
        return (Path.touch, (Path("pwned"),))


DAMAGED = {
    "truncated.jpg": "not a readable",
    "text.png": "not a readable",
    "empty.webp": "not a readable",
    "bomb.png": "million pixels",
    "pickle.png": "not a readable",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_picture_that_is_none_is_named(taught, drawn, inserted, tmp_path, name):
    (tmp_path / "bad").mkdir()
    damaged(tmp_path / "bad")
    bad = tmp_path / "bad" / name
    picture(32, 32).save("own.png")
    for run in (
        drawn("--image", bad),
        inserted("--image", bad),
        inserted("--image", "own.png", "--mask", bad),
        drawn("--like", bad),
    ):
        refused(run, bad, DAMAGED[name])
    shutil.copy(bad, tmp_path / "photos" / name)
    refused(taught("--out", "run"), f"photos/{name}", DAMAGED[name])
    assert nothing_written() and not contents("run") and not Path("pwned").exists()


def test_a_folder_that_is_missing_or_without_pictures_is_named(tiny, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/notes.txt").touch()
    train = ("train.py", "--class-word", "dog", "--weights", tiny)
    refused(call(*train, "nowhere"), "nowhere", "no such folder")
    refused(call(*train, "empty/notes.txt"), "empty/notes.txt", "no such folder")
    refused(call(*train, "empty"), "empty", "no images found", ".jpg", "check the path")
    assert nothing_written()


def test_a_file_that_is_not_there_is_named(drawn, inserted):
    for run in (
        drawn("--image", "none.png"),
        inserted("--image", "none.png"),
        inserted("--mask", "none.png"),
        drawn("--like", "none.png"),
    ):
        refused(run, "none.png: no such file")
    for run in (drawn("--lora", "none.safetensors"), inserted("--lora", "none.safetensors:0.5")):
        refused(run, "none.safetensors", "No such file")


def test_a_mask_of_another_size_is_refused_with_both_sizes(inserted):
    picture(32, 40).save("own.png")
    Image.new("L", (40, 31), 255).save("mask.png")
    refused(inserted("--image", "own.png", "--mask", "mask.png"), "mask.png", "40x31", "40x32")
    refused(inserted("--mask", "mask.png"), "mask.png", "40x31", "32x32")
    Image.new("L", (40, 32), 0).save("mask.png")
    refused(inserted("--image", "own.png", "--mask", "mask.png"), "mask is empty")
    assert nothing_written()


def test_like_takes_only_what_sample_made(drawn, inserted, taught):
    picture(8, 8).save("plain.png")
    refused(drawn("--like", "plain.png"), "plain.png", "no facts")
    good(taught("--out", "run"))
    refused(drawn("--like", "run/loss.png"), "run/loss.png", "sample.py")


# LoRA files and checkpoints


def liar(shape, end):
    """A safetensors file whose header tells of more than there is."""
    header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()
    return struct.pack("<Q", len(header)) + header + b"\0" * 16


BROKEN = {
    "empty": b"",
    "text": b"this is no LoRA, but a text of some length",
    "a header of 2^60": struct.pack("<Q", 2**60) + b"{}",
    "no JSON": struct.pack("<Q", 8) + b"notjson!",
    "more than there is": liar([4000], 16000),
    "a shape that is a lie": liar([999], 16),
    "no UTF-8": struct.pack("<Q", 29) + '{"__metadata__":{"a":"caf\xe9"}}'.encode("latin-1"),
    "a pickle": pickle.dumps(Pwned()),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_lora_file_that_is_broken_or_lies_is_named(drawn, inserted, tmp_path, fault):
    (tmp_path / "bad.safetensors").write_bytes(BROKEN[fault])
    for run in (drawn("--lora", "bad.safetensors"), inserted("--lora", "bad.safetensors")):
        refused(
            run,
            "bad.safetensors",
            "pickle" if fault == "a pickle" else "not a whole safetensors file",
        )
    assert nothing_written() and not Path("pwned").exists()


def test_a_lora_that_was_cut_short_is_named(drawn, lora_file, tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(lora_file.read_bytes()[:-1])
    refused(drawn("--lora", "cut.safetensors"), "cut.safetensors", "not a whole safetensors file")


def test_a_lora_of_another_base_is_named_with_the_layer_and_both_shapes(
    drawn, inserted, lora_file, tiny
):
    tensors = load_file(lora_file)
    stem = "lora_unet_output_blocks_5_1_transformer_blocks_0_attn2_to_k"
    save_file(
        tensors
        | {
            stem + ".lora_down.weight": torch.zeros(2, 2048),
            stem + ".lora_up.weight": torch.zeros(640, 2),
        },
        "other.safetensors",
    )
    for run in (drawn("--lora", "other.safetensors"), inserted("--lora", "other.safetensors")):
        refused(
            run,
            "other.safetensors",
            "up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_k",
            "(640, 2048)",
            "(12, 20)",
            str(tiny),
        )
    save_file(tensors | {"lora_te1_text_model.alpha": torch.ones(1)}, "more.safetensors")
    refused(
        drawn("--lora", "more.safetensors"),
        "more.safetensors",
        "1 of its",
        "lora_te1_text_model.alpha",
    )
    assert nothing_written()


@pytest.mark.parametrize(
    "name", ["model.ckpt", "model.bin", "model.pt", "model.safetensors", "model"]
)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_never_opened_under_any_name(drawn, tmp_path, name, zipped):
    if zipped:
        torch.save({"state_dict": Pwned()}, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(pickle.dumps(Pwned()))
    for run in (
        call("sample.py", "a dog", "--weights", name),
        drawn("--lora", name),
        drawn("--vae", name),
    ):
        refused(run, name, "pickle")
    assert not Path("pwned").exists() and nothing_written()


def test_a_checkpoint_that_is_not_there_or_of_another_kind_is_named(taught, tiny, tmp_path):
    def weights(path):
        return [call("sample.py", "a dog", "--weights", path), taught("--weights", path)]

    (tmp_path / "empty").mkdir()
    for path, words in (
        ("nowhere/at/all", ["no such folder"]),
        ("empty", ["not a checkpoint folder", "unet/config.json"]),
        ("photos/0.png", ["safetensors"]),
    ):
        for run in weights(path):
            refused(run, path, *words)
    old = write_folder(
        tmp_path / "old",
        configs={
            "text_encoder_2": {},
            "text_encoder": {},
            "vae": {},
            "unet": {**{k: v for k, v in UNET.items() if k != "addition_embed_type"}},
        },
    )
    for run in weights(old):
        refused(run, old, "Stable Diffusion 1 or 2")
    nine = shutil.copytree(tiny, tmp_path / "nine")
    write_json(nine / "unet/config.json", UNET | {"in_channels": 9})
    for run in weights(nine):
        refused(run, nine, "inpainting")
    write_json(nine / "unet/config.json", UNET)
    part = nine / "unet/diffusion_pytorch_model.safetensors"
    save_file({k: t for k, t in load_file(part).items() if k != "conv_out.bias"}, part)
    for run in weights(nine):
        refused(run, part, "1 tensors missing", "conv_out.bias")
    assert nothing_written()
