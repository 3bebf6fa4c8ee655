"""Folders and files that are no SDXL base checkpoint, or not described as one: each is named as what it is, in one line."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import checkpoints as synthetic
from helpers.checkpoints import (
    NETWORKS,
    UNET,
    refused,
    vocabulary_read_once,
    weights,
    write_folder,
    write_json,
    write_single,
)  # noqa: F401
from safetensors.torch import save_file

import alchemy
from alchemy.formats.family import FAMILIES


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


# Folders that are no checkpoint


@pytest.mark.parametrize(
    "source",
    [
        "nowhere",
        "no/such/folder",
        "weights/nowhere.safetensors",
        "./no-such",
        "~/no-such-checkpoint",
    ],
)
def test_what_is_not_there_is_named(source):
    refused(lambda: alchemy.load(source, "cpu"), source, "no such folder or file")


def test_a_directory_that_is_no_checkpoint_is_named(tmp_path):
    refused(
        lambda: alchemy.load(tmp_path, "cpu"),
        tmp_path,
        "not a checkpoint folder",
        "unet/config.json",
    )


def test_a_folder_given_as_config_has_to_be_a_checkpoints(tmp_path):
    file = write_single(tmp_path / "model.safetensors")
    (tmp_path / "empty").mkdir()
    for config in (tmp_path / "empty", file):
        refused(lambda: alchemy.load(file, "cpu", config=config), config, "not a checkpoint folder")


@pytest.mark.parametrize("name", NETWORKS[1:])
def test_a_network_without_a_configuration_is_not_guessed(copy, name):
    (copy / name / "config.json").unlink()
    refused(
        lambda: alchemy.load(copy, "cpu"),
        copy,
        "refiner" if name == "text_encoder" else f"{name}/config.json",
    )


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


def test_an_unknown_scheduler_setting_is_named(copy):
    write_json(
        copy / "scheduler" / "scheduler_config.json",
        synthetic.SCHEDULER | {"prediction_type": "sample"},
    )
    refused(lambda: alchemy.load(copy, "cpu"), "prediction_type", "'sample'")


# Other families

SD1 = UNET | dict(
    block_out_channels=[320, 640, 1280, 1280], cross_attention_dim=768, addition_embed_type=None
)
REFINER = UNET | dict(block_out_channels=[384, 768, 1536, 1536], cross_attention_dim=1280)


@pytest.mark.parametrize(
    "pipeline, unet, words",
    [
        (
            "StableDiffusionPipeline",
            {k: v for k, v in SD1.items() if k != "addition_embed_type"},
            "Stable Diffusion 1 or 2",
        ),
        ("StableDiffusionPipeline", SD1, "Stable Diffusion 1 or 2"),
        (
            "StableDiffusionPipeline",
            SD1 | dict(cross_attention_dim=1024),
            "Stable Diffusion 1 or 2",
        ),
        ("StableDiffusionInpaintPipeline", SD1 | dict(in_channels=9), "inpainting"),
        (
            "StableDiffusionXLInpaintPipeline",
            UNET | dict(in_channels=9),
            "inpainting or editing model (9 input channels)",
        ),
        (
            "StableDiffusionXLInstructPix2PixPipeline",
            UNET | dict(in_channels=8),
            "inpainting or editing model (8 input channels)",
        ),
        ("StableDiffusionXLImg2ImgPipeline", REFINER, "the SDXL refiner"),
        ("FluxPipeline", None, "Flux"),
        ("StableDiffusion3Pipeline", None, "StableDiffusion3"),
    ],
)
def test_a_folder_of_another_family_is_named(tmp_path, pipeline, unet, words):
    write_json(tmp_path / "model_index.json", {"_class_name": pipeline})
    write_json(
        tmp_path / ("unet" if unet else "transformer") / "config.json", unet or {"in_channels": 64}
    )
    for name in ("vae", "text_encoder_2" if unet is REFINER else "text_encoder"):
        write_json(tmp_path / name / "config.json", synthetic.CONFIGS[name])
    refused(lambda: alchemy.load(tmp_path, "cpu"), tmp_path, words, "not an SDXL base checkpoint")


@pytest.mark.parametrize("file", ["lora.safetensors", "pytorch_lora_weights.safetensors"])
def test_a_folder_with_a_lora_is_named(tmp_path, file):
    save_file({"lora_unet_a.alpha": torch.tensor(4.0)}, tmp_path / file)
    refused(lambda: alchemy.load(tmp_path, "cpu"), tmp_path, "a LoRA", "--lora")


FIRST = "model.diffusion_model.input_blocks.0.0.weight"
CLIP = "cond_stage_model.transformer.text_model.final_layer_norm.weight"
LORA = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1."
SINGLE = {
    "sd1": ("Stable Diffusion 1 or 2", {FIRST: (8, 4, 3, 3), CLIP: (8,), "betas": (9,)}),
    "sd2": (
        "Stable Diffusion 1 or 2",
        {FIRST: (8, 4, 3, 3), "cond_stage_model.model.ln_final.weight": (8,)},
    ),
    "sd1-inpainting": ("Stable Diffusion 1 or 2", {FIRST: (8, 9, 3, 3), CLIP: (8,)}),
    "refiner": (
        "the SDXL refiner",
        {FIRST: (8, 4, 3, 3), "conditioner.embedders.0.model.ln_final.weight": (8,)},
    ),
    "inpainting": (
        "inpainting",
        {FIRST: (8, 9, 3, 3), "conditioner.embedders.1.model.ln_final.weight": (8,)},
    ),
    "flux": ("Flux", {"double_blocks.0.img_attn.qkv.weight": (8, 8), "img_in.weight": (8, 8)}),
    "flux-whole": (
        "Flux",
        {
            "model.diffusion_model.double_blocks.0.img_attn.qkv.weight": (8, 8),
            "text_encoders.t5xxl.logit_scale": (1,),
        },
    ),
    "flux-diffusers": ("Flux", {"single_transformer_blocks.0.attn.to_q.weight": (8, 8)}),
    "sd3": (
        "Stable Diffusion 3",
        {"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": (8, 8)},
    ),
    "lora-kohya": (
        "a LoRA",
        {"lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight": (4, 8)},
    ),
    "lora-diffusers": (
        "a LoRA",
        {LORA + "to_q.lora.down.weight": (4, 8), LORA + "to_q.lora.up.weight": (8, 4)},
    ),
    "lora-peft": ("a LoRA", {LORA + "to_q.lora_A.weight": (4, 8)}),
    "lora-old": ("a LoRA", {LORA + "processor.to_q_lora.down.weight": (4, 8)}),
    "vae": ("not an SDXL checkpoint", {"encoder.conv_in.weight": (8, 3, 3, 3)}),
    "unet-diffusers": ("not an SDXL checkpoint", {"conv_in.weight": (8, 4, 3, 3)}),
}


@pytest.mark.parametrize("words, shapes", SINGLE.values(), ids=SINGLE.keys())
def test_a_single_file_of_another_family_is_named(folder, tmp_path, words, shapes):
    file = write_single(
        tmp_path / "model.safetensors", {key: torch.zeros(shape) for key, shape in shapes.items()}
    )
    refused(lambda: alchemy.load(file, "cpu", config=folder), file, words, "SDXL")


def test_families_are_told_by_names_that_no_sdxl_checkpoint_has():
    for key in [
        *synthetic.single_tensors(),
        *synthetic.USUAL_EXTRAS,
        *(k for w in weights().values() for k in w),
    ]:
        assert not any(re.search(mark, key) for mark in FAMILIES), key
