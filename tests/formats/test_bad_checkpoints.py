"""What is no checkpoint, or not a whole one: one line that names the file and what it is; no pickle is ever read."""

import io
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from helpers import checkpoints as synthetic
from helpers.checkpoints import (
    refused,
    vocabulary_read_once,
    weights,
    write_folder,
    write_json,
    write_single,
    write_weights,
)  # noqa: F401
from safetensors.torch import save

import alchemy
from alchemy.formats.tensors import open_safetensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


# Strictness, in both layouts


def spoil(tensors, fault, key):
    if fault == "missing":
        return {k: t for k, t in tensors.items() if k != key}
    if fault == "left over":
        return tensors | {key + "_2": torch.zeros(1)}
    return tensors | {key: torch.zeros(*tensors[key].shape[:-1], 5)}


@pytest.mark.parametrize(
    "name, key",
    [
        ("unet", "mid_block.attentions.0.transformer_blocks.1.attn2.to_k.weight"),
        ("vae", "decoder.conv_in.weight"),
        ("text_encoder", "text_model.final_layer_norm.weight"),
        ("text_encoder_2", "text_projection.weight"),
    ],
)
@pytest.mark.parametrize(
    "fault, words",
    [
        ("missing", ["1 tensors missing, 0 left over"]),
        ("left over", ["0 tensors missing, 1 left over"]),
        ("shape", ["by its configuration"]),
    ],
)
def test_one_wrong_tensor_in_a_folder_is_named(copy, name, key, fault, words):
    write_weights(copy / name, name, spoil(weights()[name], fault, key))
    sdxl = alchemy.load(copy, "cpu")
    refused(lambda: sdxl.network(name), copy / name, key, *words)


@pytest.mark.parametrize(
    "name, ours, theirs",
    [
        (
            "unet",
            "up_blocks.1.upsamplers.0.conv.weight",
            "model.diffusion_model.output_blocks.5.2.conv.weight",
        ),
        (
            "vae",
            "decoder.up_blocks.0.resnets.1.conv2.weight",
            "first_stage_model.decoder.up.2.block.1.conv2.weight",
        ),
        (
            "text_encoder_2",
            "text_model.encoder.layers.1.self_attn.q_proj.weight",
            "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight",
        ),
    ],
)
def test_one_wrong_tensor_in_a_single_file_is_named(folder, tmp_path, name, ours, theirs):
    for fault, words in (
        ("missing", [ours]),
        ("left over", [theirs + "_2"]),
        ("shape", [ours, "by its configuration"]),
    ):
        file = write_single(
            tmp_path / "model.safetensors", spoil(synthetic.single_tensors(), fault, theirs)
        )
        sdxl = alchemy.load(file, "cpu", config=folder)
        refused(lambda: sdxl.network(name), file, *words)


def test_of_many_missing_and_left_over_tensors_the_first_three_are_named(copy):
    tensors = weights()["unet"]
    for count in (1, 5):
        kept = dict(list(tensors.items())[count:])
        write_weights(
            copy / "unet", "unet", kept | {f"extra_{i}": torch.zeros(1) for i in range(4)}
        )
        sdxl = alchemy.load(copy, "cpu")
        line = refused(
            lambda: sdxl.unet,
            f"{count} tensors missing, 4 left over",
            *list(tensors)[: min(count, 3)],
        )
        assert line.count("extra_") == max(0, 3 - count)


def test_a_network_that_a_single_file_lacks_is_an_error_when_it_is_used(folder, tmp_path):
    tensors = {
        key: t
        for key, t in synthetic.single_tensors().items()
        if not key.startswith("first_stage_model.")
    }
    sdxl = alchemy.load(write_single(tmp_path / "model.safetensors", tensors), "cpu", config=folder)
    refused(lambda: sdxl.vae, "vae", "0 left over")


def test_tensors_of_no_known_network_in_a_single_file_are_named(folder, tmp_path):
    extras = {f"control_model.{i}": torch.zeros(1) for i in range(5)}
    file = write_single(tmp_path / "model.safetensors", extras=extras)
    line = refused(
        lambda: alchemy.load(file, "cpu", config=folder),
        file,
        "5 tensors of no known network",
        "control_model.0",
    )
    assert line.count("control_model") == 3


# Files that are not whole, or lie


def header(description, data=b"", pad=0):
    text = (
        description if isinstance(description, bytes) else json.dumps(description).encode()
    ) + b" " * pad
    return len(text).to_bytes(8, "little") + text + data


F32 = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
BROKEN = {
    "empty": b"",
    "three-bytes": b"abc",
    "huge-header": (2**62).to_bytes(8, "little") + b"{}",
    "all-ones": b"\xff" * 64,
    "header-beyond-the-end": (4096).to_bytes(8, "little") + b'{"a":',
    "not-json": header(b"not json"),
    "a-list": header(b"[1, 2]"),
    "truncated": save({"a": torch.arange(64.0)})[:-9],
    "offsets-beyond-the-end": header(
        {"a": F32 | {"data_offsets": [0, 64], "shape": [16]}}, bytes(16)
    ),
    "offsets-reversed": header({"a": F32 | {"data_offsets": [16, 0]}}, bytes(16)),
    "shape-beyond-the-data": header({"a": F32 | {"shape": [400]}}, bytes(16)),
    "overlapping": header({"a": F32, "b": F32}, bytes(16)),
    "unknown-dtype": header({"a": F32 | {"dtype": "Q4"}}, bytes(16)),
    "shape-overflows": header({"a": F32 | {"shape": [2**40, 2**40]}}, bytes(16)),
    "text": b"<!DOCTYPE html><html>not found</html>",
    "lfs-pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 6938078334\n",
    "png": b"\x89PNG\r\n\x1a\n" + bytes(64),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_a_file_that_is_not_whole_is_refused_in_one_line(copy, tmp_path, content):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    refused(lambda: alchemy.load(file, "cpu"), file, "not a whole safetensors file")
    refused(lambda: alchemy.load(copy, "cpu", vae=file).vae, file, "not a whole safetensors file")
    (copy / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(content)
    sdxl = alchemy.load(copy, "cpu")
    refused(
        lambda: sdxl.unet,
        copy / "unet" / "diffusion_pytorch_model.safetensors",
        "not a whole safetensors file",
    )


def test_a_real_checkpoint_cut_short_anywhere_is_refused(tmp_path):
    whole = write_single(tmp_path / "whole.safetensors").read_bytes()
    for length in (1, 8, 9, 1000, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.safetensors").write_bytes(whole[:length])
        refused(
            lambda: alchemy.load(tmp_path / "cut.safetensors", "cpu"),
            "cut.safetensors",
            "not a whole safetensors file",
        )


def test_a_weight_of_no_dimension_is_refused(tmp_path):
    file = write_single(
        tmp_path / "odd.safetensors",
        {"model.diffusion_model.input_blocks.0.0.weight": torch.tensor(1.0)},
    )
    refused(lambda: alchemy.load(file, "cpu"), file)


# Pickles


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def pickles(bomb):
    for protocol in range(2, 6):
        yield f"protocol-{protocol}", pickle.dumps(bomb, protocol)
    for zipped in (True, False):
        buffer = io.BytesIO()
        torch.save(
            {"state_dict": bomb, "weight": torch.zeros(8)},
            buffer,
            _use_new_zipfile_serialization=zipped,
        )
        yield f"torch.save {'zip' if zipped else 'legacy'}", buffer.getvalue()


@pytest.mark.parametrize(
    "name",
    [
        "model.ckpt",
        "model.bin",
        "model.pt",
        "model.pth",
        "model.safetensors",
        "model",
        "model.SAFETENSORS",
    ],
)
def test_a_pickle_under_any_name_is_named_and_not_read(copy, tmp_path, name):
    went_off = tmp_path / "went off"
    for kind, content in pickles(Bomb(went_off)):
        (tmp_path / name).write_bytes(content)
        refused(lambda: alchemy.load(tmp_path / name, "cpu"), tmp_path / name, "a pickle")
        refused(
            lambda: alchemy.load(copy, "cpu", vae=tmp_path / name).vae, tmp_path / name, "a pickle"
        )
        assert not went_off.exists(), kind


def test_a_pickle_in_a_folder_under_the_official_name_is_named_and_not_read(copy, tmp_path):
    for kind, content in pickles(Bomb(tmp_path / "went off")):
        (copy / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(content)
        sdxl = alchemy.load(copy, "cpu")
        refused(lambda: sdxl.unet, copy / "unet", "a pickle")
        assert not (tmp_path / "went off").exists(), kind


@pytest.mark.parametrize(
    "name, pickled",
    [("unet", "diffusion_pytorch_model.bin"), ("text_encoder_2", "pytorch_model.bin")],
)
def test_a_folder_with_only_a_pickle_is_refused_at_once(copy, name, pickled):
    shutil.rmtree(copy / name)
    write_json(copy / name / "config.json", synthetic.CONFIGS[name])
    (copy / name / pickled).write_bytes(b"\x80\x02")
    refused(lambda: alchemy.load(copy, "cpu"), copy / name, "no safetensors weights", "pickles")


@pytest.mark.parametrize("length", [0x4B50, 0x0280, 0x0480])
def test_a_safetensors_file_that_begins_as_a_pickle_does_is_read(tmp_path, length):
    description = {"a": F32}
    content = header(
        description, torch.arange(4.0).numpy().tobytes(), pad=length - len(json.dumps(description))
    )
    (tmp_path / "model.safetensors").write_bytes(content)
    assert content[:2] in (
        b"PK",
        b"\x80\x02",
        b"\x80\x04",
    )  # the length of the header, low byte first
    assert torch.equal(
        open_safetensors(tmp_path / "model.safetensors").get_tensor("a"), torch.arange(4.0)
    )
