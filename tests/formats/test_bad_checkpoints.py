"""What is no SDXL checkpoint, or not a whole one, is refused in one line that names it.

No pickle is ever read.
"""

import io
import json
import pickle
import re
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from helpers import checkpoints as synthetic
from helpers.checkpoints import (
    NETWORKS,
    SHIPPED,
    UNET,
    refused,
    single_tensors,
    weights,
    write_json,
    write_single,
    write_weights,
)
from safetensors.torch import save, save_file

import alchemy
from alchemy.clip import TextConfig
from alchemy.formats.configs import BUILT_IN
from alchemy.formats.family import FAMILIES
from alchemy.formats.tensors import open_safetensors
from alchemy.unet import UNetConfig
from alchemy.vae import VAEConfig

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"

# A wrong tensor, in both layouts


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
        ("missing", "1 tensors missing, 0 left over"),
        ("left over", "0 tensors missing, 1 left over"),
        ("shape", "by its configuration"),
    ],
)
def test_one_wrong_tensor_in_a_folder_is_named(copy, name, key, fault, words):
    write_weights(copy / name, name, spoil(weights()[name], fault, key))
    sdxl = alchemy.load(copy, "cpu")
    refused(lambda: sdxl.network(name), copy / name, key, words)


UP, QKV = "up_blocks.1.upsamplers.0.conv.weight", "encoder.layers.1.self_attn.q_proj.weight"
DECODER = "decoder.up_blocks.0.resnets.1.conv2.weight"
IN_PROJ = "transformer.resblocks.1.attn.in_proj_weight"


@pytest.mark.parametrize(
    "name, ours, theirs",
    [
        ("unet", UP, "model.diffusion_model.output_blocks.5.2.conv.weight"),
        ("vae", DECODER, "first_stage_model.decoder.up.2.block.1.conv2.weight"),
        ("text_encoder_2", f"text_model.{QKV}", f"conditioner.embedders.1.model.{IN_PROJ}"),
    ],
)
def test_one_wrong_tensor_in_a_single_file_is_named(tiny, tmp_path, name, ours, theirs):
    for fault, word in (("missing", ours), ("left over", theirs + "_2"), ("shape", ours)):
        tensors = spoil(single_tensors(), fault, theirs)
        file = write_single(tmp_path / "model.safetensors", tensors)
        sdxl = alchemy.load(file, "cpu", config=tiny)
        refused(lambda: sdxl.network(name), file, word)  # noqa: B023  called at once


def test_of_many_missing_and_left_over_tensors_the_first_three_are_named(copy):
    tensors = weights()["unet"]
    extra = {f"extra_{i}": torch.zeros(1) for i in range(4)}
    for count in (1, 5):
        write_weights(copy / "unet", "unet", dict(list(tensors.items())[count:]) | extra)
        problem = f"{count} tensors missing, 4 left over"
        sdxl = alchemy.load(copy, "cpu")
        line = refused(lambda: sdxl.unet, problem, *list(tensors)[: min(count, 3)])  # noqa: B023
        assert line.count("extra_") == max(0, 3 - count)


def test_a_network_that_a_single_file_lacks_is_an_error_when_it_is_used(tiny, tmp_path):
    vae = "first_stage_model."
    tensors = {key: t for key, t in single_tensors().items() if not key.startswith(vae)}
    file = write_single(tmp_path / "model.safetensors", tensors)
    sdxl = alchemy.load(file, "cpu", config=tiny)
    refused(lambda: sdxl.vae, "vae", "0 left over")


def test_tensors_of_no_known_network_in_a_single_file_are_named(tiny, tmp_path):
    extras = {f"control_model.{i}": torch.zeros(1) for i in range(5)}
    file = write_single(tmp_path / "model.safetensors", extras=extras)
    load = lambda: alchemy.load(file, "cpu", config=tiny)  # noqa: E731
    line = refused(load, file, "5 tensors of no known network", "control_model.0")
    assert line.count("control_model") == 3


# Damaged files


def header(description, data=b"", pad=0):
    text = description if isinstance(description, bytes) else json.dumps(description).encode()
    text += b" " * pad
    return len(text).to_bytes(8, "little") + text + data


F32 = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
LARGE = F32 | {"data_offsets": [0, 64], "shape": [16]}
BROKEN = {
    "empty": b"",
    "three-bytes": b"abc",
    "huge-header": (2**62).to_bytes(8, "little") + b"{}",
    "all-ones": b"\xff" * 64,
    "header-beyond-the-end": (4096).to_bytes(8, "little") + b'{"a":',
    "not-json": header(b"not json"),
    "a-list": header(b"[1, 2]"),
    "truncated": save({"a": torch.arange(64.0)})[:-9],
    "offsets-beyond-the-end": header({"a": LARGE}, bytes(16)),
    "offsets-reversed": header({"a": F32 | {"data_offsets": [16, 0]}}, bytes(16)),
    "shape-beyond-the-data": header({"a": F32 | {"shape": [400]}}, bytes(16)),
    "overlapping": header({"a": F32, "b": F32}, bytes(16)),
    "unknown-dtype": header({"a": F32 | {"dtype": "Q4"}}, bytes(16)),
    "shape-overflows": header({"a": F32 | {"shape": [2**40, 2**40]}}, bytes(16)),
    "text": b"<!DOCTYPE html><html>not found</html>",
    "lfs-pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 6938078334\n",
    "png": b"\x89PNG\r\n\x1a\n" + bytes(64),
}


def refused_everywhere(copy, file, content, word):
    """As a checkpoint, as a VAE, and as the UNet of a folder."""
    file.write_bytes(content)
    refused(lambda: alchemy.load(file, "cpu"), file, word)
    refused(lambda: alchemy.load(copy, "cpu", vae=file).vae, file, word)
    (copy / UNET_FILE).write_bytes(content)
    sdxl = alchemy.load(copy, "cpu")
    refused(lambda: sdxl.unet, copy / UNET_FILE, word)


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_a_file_that_is_not_whole_is_refused_in_one_line(copy, tmp_path, content):
    file = tmp_path / "model.safetensors"
    refused_everywhere(copy, file, content, "not a whole safetensors file")


def test_a_real_checkpoint_cut_short_anywhere_is_refused(tmp_path):
    whole = write_single(tmp_path / "whole.safetensors").read_bytes()
    file = tmp_path / "cut.safetensors"
    for length in (1, 8, 9, 1000, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        refused(lambda: alchemy.load(file, "cpu"), file, "not a whole safetensors file")


def test_a_weight_of_no_dimension_is_refused(tmp_path):
    file = write_single(tmp_path / "odd.safetensors", {FIRST: torch.tensor(1.0)})
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
        yield pickle.dumps(bomb, protocol)
    content = {"state_dict": bomb, "weight": torch.zeros(8)}
    for zipped in (True, False):
        buffer = io.BytesIO()
        torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
        yield buffer.getvalue()


@pytest.mark.parametrize("ending", ["ckpt", "bin", "pt", "pth", "safetensors", "SAFETENSORS", ""])
def test_a_pickle_under_any_name_is_named_and_not_read(copy, tmp_path, ending):
    for content in pickles(Bomb(tmp_path / "unpickled")):
        refused_everywhere(
            copy, (tmp_path / "model").with_suffix(ending and f".{ending}"), content, "a pickle"
        )
        assert not (tmp_path / "unpickled").exists()


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
    data, pad = torch.arange(4.0), length - len(json.dumps({"a": F32}))
    content = header({"a": F32}, data.numpy().tobytes(), pad)
    (tmp_path / "model.safetensors").write_bytes(content)
    # The length of the header comes first, low byte first.
    assert content[:2] in (b"PK", b"\x80\x02", b"\x80\x04")
    assert torch.equal(open_safetensors(tmp_path / "model.safetensors").get_tensor("a"), data)


# Folders that are no checkpoint, and their configurations


@pytest.mark.parametrize("source", ["nowhere", "no/such/folder", "weights/no.safetensors", "~/no"])
def test_what_is_not_there_is_named(source):
    refused(lambda: alchemy.load(source, "cpu"), source, "no such folder or file")


def test_a_folder_without_configurations_is_named(tmp_path):
    empty, file = tmp_path / "empty", write_single(tmp_path / "model.safetensors")
    empty.mkdir()
    words = "not a checkpoint folder", "unet/config.json"
    refused(lambda: alchemy.load(empty, "cpu"), empty, *words)
    for config in (empty, file):
        refused(lambda: alchemy.load(file, "cpu", config=config), config, *words)  # noqa: B023


@pytest.mark.parametrize("name", NETWORKS[1:])
def test_a_network_without_a_configuration_is_not_guessed(copy, name):
    (copy / name / "config.json").unlink()
    word = "refiner" if name == "text_encoder" else f"{name}/config.json"
    refused(lambda: alchemy.load(copy, "cpu"), copy, word)


@pytest.mark.parametrize(
    "content", [b"{", b"", b"[1, 2]", b'"text"', b"3", b"null", b"\xff\xfe", b'{"in_channels": 4,}']
)
@pytest.mark.parametrize(
    "file",
    ["unet/config.json", "vae/config.json", "scheduler/scheduler_config.json", "model_index.json"],
)
def test_an_invalid_configuration_is_named(copy, file, content):
    (copy / file).write_bytes(content)
    refused(lambda: alchemy.load(copy, "cpu"), copy / file, "JSON")


@pytest.mark.parametrize(
    "file, change, words",
    [
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "'sample'"),
        (
            "unet/config.json",
            {"down_block_types": ["DownBlock2D", "ResBlock"]},
            "must be a list of",
        ),
        ("unet/config.json", {"attention_head_dim": [1, 2]}, "must have as many values each"),
        ("unet/config.json", {"attention_head_dim": [1, 5, 4]}, "do not divide into 5 heads"),
        ("unet/config.json", {"norm_num_groups": 3}, "must be multiples of norm_num_groups"),
        ("unet/config.json", {"addition_time_embed_dim": 3}, "must be even"),
        ("unet/config.json", {"cross_attention_dim": 24}, "the text encoders give 20"),
        ("unet/config.json", {"projection_class_embeddings_input_dim": 30}, "time ids give 34"),
        ("unet/config.json", {"num_attention_heads": [1, 2, 4]}, "must be an integer"),
        ("vae/config.json", {"block_out_channels": []}, "1 to 8 values"),
        ("vae/config.json", {"force_upcast": "yes"}, "must be true or false"),
        ("vae/config.json", {"latent_channels": 16}, "must be from 4 to 4"),
        ("text_encoder/config.json", {"num_attention_heads": 3}, "must be a multiple of"),
        ("vae/config.json", {"latents_mean": 5}, "latents_mean is 5; it is supported as null only"),
        ("vae/config.json", {"latents_std": [1, 1, 1, 1]}, "latents_std is [1, 1, 1, 1]; it is"),
        ("unet/config.json", {"flip_sin_to_cos": False}, "is supported as True only"),
        ("unet/config.json", {"act_fn": "gelu"}, "is supported as 'silu' or 'swish' only"),
        ("unet/config.json", {"in_channels": "4"}, "in_channels is '4'; it must be an integer"),
        ("unet/config.json", {"out_channels": 8}, "in_channels and out_channels must be 4"),
        ("vae/config.json", {"in_channels": 4}, "in_channels and out_channels must be 3"),
        ("text_encoder/config.json", {"hidden_act": "relu"}, "as 'quick_gelu' or 'gelu' only"),
        ("model_index.json", {"_class_name": 5}, "_class_name is 5; it must be a short string"),
    ],
)
def test_a_value_that_cannot_be_is_named(copy, file, change, words):
    write_json(copy / file, json.loads((copy / file).read_text()) | change)
    refused(lambda: alchemy.load(copy, "cpu"), words)


def test_a_token_beyond_an_encoders_vocabulary_is_named(copy):
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(SHIPPED / name, copy / name)
    write_json(copy / "tokenizer_2/added_tokens.json", {"<x>": 49408})
    words = "tokenizer_2: '<x>' has the id 49408; text_encoder_2 has a vocab_size of 49408"
    refused(lambda: alchemy.load(copy, "cpu"), words)


SETTINGS = {  # by file, the names that are read
    "unet/config.json": {field.name for field in fields(UNetConfig)} | BUILT_IN.keys(),
    "vae/config.json": {field.name for field in fields(VAEConfig)} | BUILT_IN.keys(),
    "text_encoder/config.json": {field.name for field in fields(TextConfig)},
    "text_encoder_2/config.json": {field.name for field in fields(TextConfig)},
    "scheduler/scheduler_config.json": {"prediction_type", "timestep_spacing", "beta_schedule"}
    | {"num_train_timesteps", "beta_start", "beta_end", "steps_offset", "rescale_betas_zero_snr"}
    | {"_class_name", "trained_betas"},
    "model_index.json": {"_class_name", "force_zeros_for_empty_prompt"},
}
NEVER_RIGHT = (-1, float("nan"), 2**70, -1e300, [], [[]], {"a": 1}, [None], "x" * 5000)


@pytest.mark.parametrize("file", SETTINGS)
def test_a_value_of_no_right_type_or_size_is_named_for_every_setting(copy, file):
    content = json.loads((copy / file).read_text())
    for name in sorted(SETTINGS[file]):
        for value in NEVER_RIGHT:
            write_json(copy / file, content | {name: value})
            line = refused(lambda: alchemy.load(copy, "cpu"), name)
            assert file in line or Path(file).name in line, line


# Other families

SD1 = UNET | {
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "addition_embed_type": None,
}
REFINER = UNET | {"block_out_channels": [384, 768, 1536, 1536], "cross_attention_dim": 1280}
OLD_SD1 = {k: v for k, v in SD1.items() if k != "addition_embed_type"}
NINE, EIGHT = (f"inpainting or editing model ({n} input channels)" for n in (9, 8))


@pytest.mark.parametrize(
    "pipeline, unet, words",
    [
        ("StableDiffusionPipeline", OLD_SD1, "Stable Diffusion 1 or 2"),
        ("StableDiffusionPipeline", SD1, "Stable Diffusion 1 or 2"),
        ("StableDiffusionPipeline", SD1 | {"cross_attention_dim": 1024}, "Stable Diffusion 1 or 2"),
        ("StableDiffusionInpaintPipeline", SD1 | {"in_channels": 9}, "inpainting"),
        ("StableDiffusionXLInpaintPipeline", UNET | {"in_channels": 9}, NINE),
        ("StableDiffusionXLInstructPix2PixPipeline", UNET | {"in_channels": 8}, EIGHT),
        ("StableDiffusionXLImg2ImgPipeline", REFINER, "the SDXL refiner"),
        ("FluxPipeline", None, "Flux"),
        ("StableDiffusion3Pipeline", None, "StableDiffusion3"),
    ],
)
def test_a_folder_of_another_family_is_named(tmp_path, pipeline, unet, words):
    write_json(tmp_path / "model_index.json", {"_class_name": pipeline})
    folder = tmp_path / ("unet" if unet else "transformer")
    write_json(folder / "config.json", unet or {"in_channels": 64})
    for name in ("vae", "text_encoder_2" if unet is REFINER else "text_encoder"):
        write_json(tmp_path / name / "config.json", synthetic.CONFIGS[name])
    refused(lambda: alchemy.load(tmp_path, "cpu"), tmp_path, words, "not an SDXL base checkpoint")


@pytest.mark.parametrize("file", ["lora.safetensors", "pytorch_lora_weights.safetensors"])
def test_a_folder_with_a_lora_is_named(tmp_path, file):
    save_file({"lora_unet_a.alpha": torch.tensor(4.0)}, tmp_path / file)
    refused(lambda: alchemy.load(tmp_path, "cpu"), tmp_path, "a LoRA", "--lora")


FIRST = "model.diffusion_model.input_blocks.0.0.weight"
CLIP = "cond_stage_model.transformer.text_model.final_layer_norm.weight"
FLUX = "double_blocks.0.img_attn.qkv.weight"
LORA = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1."
OLD, NOT_SDXL = "Stable Diffusion 1 or 2", "not an SDXL checkpoint"
FOUR, NINE_CHANNELS = (8, 4, 3, 3), (8, 9, 3, 3)
SINGLE = {  # the words, and the shapes of some of its tensors
    "sd1": (OLD, {FIRST: FOUR, CLIP: (8,), "betas": (9,)}),
    "sd2": (OLD, {FIRST: FOUR, "cond_stage_model.model.ln_final.weight": (8,)}),
    "sd1-inpainting": (OLD, {FIRST: NINE_CHANNELS, CLIP: (8,)}),
    "refiner": ("refiner", {FIRST: FOUR, "conditioner.embedders.0.model.ln_final.weight": (8,)}),
    "inpainting": (
        "inpainting",
        {FIRST: NINE_CHANNELS, "conditioner.embedders.1.model.ln_final.weight": (8,)},
    ),
    "flux": ("Flux", {FLUX: (8, 8), "img_in.weight": (8, 8)}),
    "flux-whole": ("Flux", {"model.diffusion_model." + FLUX: (8, 8), "text_encoders.t5xxl": (1,)}),
    "flux-diffusers": ("Flux", {"single_transformer_blocks.0.attn.to_q.weight": (8, 8)}),
    "sd3": ("Stable Diffusion 3", {"model.diffusion_model.joint_blocks.0.x_block": (8, 8)}),
    "lora-kohya": ("a LoRA", {"lora_unet_input_blocks_4_1_attn1_to_q.lora_down.weight": (4, 8)}),
    "lora-diffusers": ("a LoRA", {LORA + "to_q.lora.down.weight": (4, 8)}),
    "lora-peft": ("a LoRA", {LORA + "to_q.lora_A.weight": (4, 8)}),
    "lora-old": ("a LoRA", {LORA + "processor.to_q_lora.down.weight": (4, 8)}),
    "vae": (NOT_SDXL, {"encoder.conv_in.weight": (8, 3, 3, 3)}),
    "unet-diffusers": (NOT_SDXL, {"conv_in.weight": FOUR}),
}


@pytest.mark.parametrize("words, shapes", SINGLE.values(), ids=SINGLE.keys())
def test_a_single_file_of_another_family_is_named(tiny, tmp_path, words, shapes):
    tensors = {key: torch.zeros(shape) for key, shape in shapes.items()}
    file = write_single(tmp_path / "model.safetensors", tensors)
    refused(lambda: alchemy.load(file, "cpu", config=tiny), file, words, "SDXL")


def test_families_are_recognized_by_names_that_no_sdxl_checkpoint_has():
    keys = [*single_tensors(), *synthetic.USUAL_EXTRAS]
    for network in weights().values():
        keys += network
    for mark in FAMILIES:
        assert not [key for key in keys if re.search(mark, key)]
