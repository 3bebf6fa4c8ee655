"""Whole checkpoints: the folder layout, the single-file layout, another VAE, precisions."""

import json
import shutil

import pytest
import torch
from helpers import checkpoints as synthetic
from helpers.checkpoints import (
    CONFIGS,
    NETWORKS,
    SCHEDULER,
    SHIPPED,
    VAE,
    all_same,
    same,
    single_tensors,
    weights,
    write_folder,
    write_json,
    write_single,
    write_weights,
)

import alchemy
from alchemy.schedule import Schedule
from alchemy.tokenizer import Tokenizer

TOKENIZERS = ("tokenizer", "tokenizer_2")


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    path = tmp_path_factory.mktemp("single") / "model.safetensors"
    return write_single(path, extras=synthetic.USUAL_EXTRAS)


def halved(tensors):
    return {key: tensor.half() for key, tensor in tensors.items()}


# The folder layout


def test_a_folder_loads_bit_equal_frozen_and_in_eval_mode(tiny):
    sdxl = alchemy.load(tiny, "cpu")
    all_same(sdxl)
    for name in NETWORKS:
        assert not sdxl.network(name).training
        assert not any(p.requires_grad for p in sdxl.network(name).parameters())


@pytest.mark.parametrize("dtype, seed", [("float32", 0), ("float16", 1), ("bfloat16", 1)])
def test_half_takes_fp16_files_and_float32_the_others(tmp_path, dtype, seed):
    write_folder(tmp_path, seed=0)
    write_folder(tmp_path, seed=1, dtype=torch.float16, variant=".fp16")
    expected = halved(weights(1)["unet"]) if seed else weights(0)["unet"]
    same(alchemy.load(tmp_path, "cpu", dtype).unet, expected, getattr(torch, dtype))


def test_fp16_files_alone_serve_float32(tmp_path):
    write_folder(tmp_path, dtype=torch.float16, variant=".fp16")
    same(alchemy.load(tmp_path, "cpu").unet, halved(weights()["unet"]))


@pytest.mark.parametrize(
    "options",
    [
        {"shards": 3},
        {"shards": 3, "dtype": torch.float16, "variant": ".fp16"},
        {"shards": 2, "dtype": torch.float16, "variant": ".fp16", "old": True},
    ],
    ids=["fp32", "fp16", "fp16-old-names"],
)
def test_shards_load_as_one(tmp_path, options):
    dtype = options.get("dtype", torch.float32)
    sdxl = alchemy.load(write_folder(tmp_path, **options), "cpu", dtype)
    same(sdxl.unet, weights()["unet"], dtype)
    same(sdxl.text_encoders[1], weights()["text_encoder_2"], dtype)


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_missing_shards_are_named_before_anything_is_read(tmp_path, variant):
    write_folder(tmp_path, shards=4, variant=variant)
    stem = f"diffusion_pytorch_model{variant}"
    missing = [f"{stem}-0000{i}-of-00004.safetensors" for i in (2, 4)]
    for name in missing:
        (tmp_path / "unet" / name).unlink()
    synthetic.refused(lambda: alchemy.load(tmp_path, "cpu"), "2 of 4 shards", *missing)


@pytest.mark.parametrize("form", ["folder", "single file"])
def test_encoder_1_in_the_names_of_transformers_5_loads(copy, tmp_path, form):
    stem, config = "text_model.", None
    if form == "folder":
        short = {k.removeprefix(stem): t for k, t in weights()["text_encoder"].items()}
        write_weights(copy / "text_encoder", "text_encoder", short)
    else:
        prefix, tensors = "conditioner.embedders.0.transformer.", {}
        for key, tensor in single_tensors().items():
            tensors[key.replace(prefix + stem, prefix)] = tensor
        config, copy = copy, write_single(tmp_path / "a.safetensors", tensors)
    same(alchemy.load(copy, "cpu", config=config).text_encoders[0], weights()["text_encoder"])


@pytest.mark.parametrize("prefix", ["text_model.", ""])
def test_position_ids_are_dropped_by_name(copy, prefix):
    extra = {f"{prefix}embeddings.position_ids": torch.arange(77)[None]}
    extra["logit_scale"] = torch.tensor(4.6)
    for name in ("text_encoder", "text_encoder_2"):
        write_weights(copy / name, name, weights()[name] | extra)
    all_same(alchemy.load(copy, "cpu"))


def test_a_checkpoint_with_tokenizer_json_alone_gives_the_same_ids(copy):
    vocab = json.loads((SHIPPED / "tokenizer/vocab.json").read_text())
    lines = (SHIPPED / "tokenizer/merges.txt").read_text().splitlines()[1:]
    model = {"vocab": vocab, "merges": [line.split() for line in lines if line]}
    for name, pad in zip(TOKENIZERS, ("<|endoftext|>", "!"), strict=True):
        special = sorted({pad, "<|startoftext|>", "<|endoftext|>"}, key=vocab.get)
        added = [{"id": vocab[token], "content": token} for token in special]
        write_json(copy / name / "tokenizer.json", {"added_tokens": added, "model": model})
    ours = alchemy.load(copy, "cpu").tokenizers
    for tokenizer, name in zip(ours, TOKENIZERS, strict=True):
        shipped = Tokenizer.from_folder(SHIPPED / name)
        assert tokenizer("a photo of a dog, 2 cats!") == shipped("a photo of a dog, 2 cats!")
    assert [tokenizer("x")[-1] for tokenizer in ours] == [49407, 0]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_a_float32_file_becomes_the_dtype_asked_for(tiny, dtype):
    sdxl = alchemy.load(tiny, "cpu", dtype)
    for name in ("unet", "text_encoder", "text_encoder_2"):
        same(sdxl.network(name), weights()[name], getattr(torch, dtype))


def test_the_scheduler_config_sets_the_schedule(copy):
    changes = {
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "steps_offset": 0,
        "beta_end": 0.02,
        "num_train_timesteps": 500,
        "trained_betas": None,
    }
    write_json(copy / "scheduler" / "scheduler_config.json", SCHEDULER | changes)
    s = alchemy.load(copy, "cpu").schedule
    beta = torch.linspace(0.00085**0.5, 0.02**0.5, 500, dtype=torch.float64) ** 2
    assert torch.equal(s.alpha_bar, torch.cumprod(1 - beta, 0))
    assert (s.prediction, s.spacing, s.steps_offset) == ("v_prediction", "trailing", 0)


@pytest.mark.parametrize("value, expected", [(True, True), (None, True), (False, False)])
def test_force_zeros_for_empty_prompt_is_read_from_model_index(tmp_path, value, expected):
    write_folder(tmp_path, index={"force_zeros_for_empty_prompt": value})
    assert alchemy.load(tmp_path, "cpu").zeros_for_none is expected


# Another VAE

OTHER = VAE | {"scaling_factor": 0.7, "force_upcast": False}


@pytest.mark.parametrize("form", ["folder", "checkpoint", "its vae folder"])
def test_another_vae_brings_its_configuration(tiny, tmp_path, form):
    if form == "folder":
        write_json(tmp_path / "config.json", OTHER)
        write_weights(tmp_path, "vae", weights(1)["vae"])
    else:
        write_folder(tmp_path, seed=1, configs=CONFIGS | {"vae": OTHER})
    sdxl = alchemy.load(tiny, "cpu", vae=tmp_path / "vae" if form[:3] == "its" else tmp_path)
    same(sdxl.vae, weights(1)["vae"])
    same(sdxl.unet, weights()["unet"])
    assert sdxl.vae.config.scaling_factor == 0.7


@pytest.mark.parametrize("form", ["prefixed", "ldm", "diffusers", "whole"])
def test_a_vae_as_a_single_file_in_each_naming(tiny, single, tmp_path, form):
    ldm = synthetic.ldm_vae(weights(1)["vae"])
    tensors = {
        "prefixed": synthetic.with_prefix("first_stage_model.", ldm),
        "ldm": ldm,
        "diffusers": weights(1)["vae"],
        "whole": single_tensors(1),
    }[form]
    file = write_single(tmp_path / "vae.safetensors", tensors)
    sdxl = alchemy.load(tiny, "cpu", vae=file)
    same(sdxl.vae, weights(1)["vae"])
    assert sdxl.vae.config.scaling_factor == VAE["scaling_factor"]  # a file brings none of its own
    same(alchemy.load(single, "cpu", config=tiny, vae=file).vae, weights(1)["vae"])


def test_a_checkpoint_without_a_vae_loads_with_another(copy, tmp_path):
    shutil.rmtree(copy / "vae")
    write_json(tmp_path / "vae" / "config.json", OTHER)
    write_weights(tmp_path / "vae", "vae", weights(1)["vae"])
    same(alchemy.load(copy, "cpu", vae=tmp_path / "vae").vae, weights(1)["vae"])
    synthetic.refused(lambda: alchemy.load(copy, "cpu"), "vae/config.json")


# The single-file layout


def test_a_single_file_with_the_usual_extras_loads_bit_equal_to_the_folder(tiny, single):
    all_same(alchemy.load(single, "cpu", config=tiny))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_one_fp16_file_loads_in_each_precision(tiny, tmp_path, dtype):
    path, extras = tmp_path / "tune.safetensors", synthetic.USUAL_EXTRAS
    sdxl = alchemy.load(write_single(path, None, torch.float16, extras), "cpu", dtype, config=tiny)
    for name in ("unet", "text_encoder", "text_encoder_2"):
        same(sdxl.network(name), halved(weights()[name]), dtype)


def test_single_file_projection_is_transposed_and_in_proj_cut_in_three(tiny, single):
    stored = single_tensors()
    second = alchemy.load(single, "cpu", config=tiny).text_encoders[1]
    prefix = "conditioner.embedders.1.model."
    assert torch.equal(second.text_projection.weight, stored[prefix + "text_projection"].T)
    fused = stored[prefix + "transformer.resblocks.2.attn.in_proj_weight"]
    assert torch.equal(second.text_model.encoder.layers[2].self_attn.k_proj.weight, fused[12:24])


def test_v_pred_and_ztsnr_keys_set_the_schedule(tiny, tmp_path):
    schedules = []
    for marks in ([], ["v_pred"], ["v_pred", "ztsnr"]):
        extras = {mark: torch.tensor([]) for mark in marks}
        file = write_single(tmp_path / f"{len(marks)}.safetensors", extras=extras)
        schedules.append(alchemy.load(file, "cpu", config=tiny).schedule)
    plain, v, zero = schedules
    assert [s.prediction for s in schedules] == ["epsilon", "v_prediction", "v_prediction"]
    assert torch.equal(plain.alpha_bar, v.alpha_bar) and plain.alpha_bar[-1] > 0
    assert zero.alpha_bar[-1] == 0 and zero.timesteps(30)[0][0] == 999  # it starts at pure noise


def test_a_single_file_without_config_is_sdxl_base(tmp_path):
    first = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3)}
    sdxl = alchemy.load(write_single(tmp_path / "base.safetensors", first), "cpu")
    unet, vae, *encoders = (sdxl.configs[name] for name in NETWORKS)
    assert unet.block_out_channels == (320, 640, 1280)
    assert unet.transformer_layers_per_block[1:] == (2, 10)
    sizes = [(e.hidden_size, e.num_hidden_layers, e.hidden_act) for e in encoders]
    assert sizes == [(768, 12, "quick_gelu"), (1280, 32, "gelu")]
    assert encoders[1].projection_dim == 1280
    assert vae.scaling_factor == 0.13025 and vae.force_upcast
    assert torch.equal(sdxl.schedule.alpha_bar, Schedule.from_config({}).alpha_bar)
    # The vocabulary is the one that ships.
    assert [tokenizer("x")[-1] for tokenizer in sdxl.tokenizers] == [49407, 0]
    assert sdxl.size == (1024, 1024) and sdxl.zeros_for_none
