"""The loader on whole checkpoints: the folder layout, the single-file layout, another VAE, precisions."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import checkpoints as synthetic
from helpers.checkpoints import (
    CONFIGS,
    NETWORKS,
    SCHEDULER,
    VAE,
    all_same,
    same,
    vocabulary_read_once,
    weights,
    write_folder,  # noqa: F401
    write_json,
    write_single,
    write_weights,
)

import alchemy
from alchemy.formats import checkpoint, layout
from alchemy.schedule import Schedule

SHARED = Path(__file__).resolve().parents[3] / "shared" / "reference"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return write_single(
        tmp_path_factory.mktemp("single") / "model.safetensors", extras=synthetic.USUAL_EXTRAS
    )


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the folder to spoil."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


# The folder layout


def test_folder_loads_bit_equal(folder):
    all_same(alchemy.load(folder, "cpu"))


def test_loaded_parameters_take_no_gradient_and_the_networks_are_in_eval_mode(folder):
    sdxl = alchemy.load(folder, "cpu")
    for name in NETWORKS:
        assert not sdxl.network(name).training
        assert not any(p.requires_grad for p in sdxl.network(name).parameters())


@pytest.mark.parametrize("dtype, seed", [("float32", 0), ("float16", 1), ("bfloat16", 1)])
def test_with_both_precisions_there_half_takes_fp16_files_and_float32_the_others(
    tmp_path, dtype, seed
):
    write_folder(tmp_path, seed=0)
    write_folder(tmp_path, seed=1, dtype=torch.float16, variant=".fp16")
    expected = (
        weights(seed)["unet"]
        if seed == 0
        else {k: t.half() for k, t in weights(seed)["unet"].items()}
    )
    same(alchemy.load(tmp_path, "cpu", dtype).unet, expected, getattr(torch, dtype))


def test_fp16_files_alone_serve_float32(tmp_path):
    write_folder(tmp_path, dtype=torch.float16, variant=".fp16")
    same(alchemy.load(tmp_path, "cpu").unet, {k: t.half() for k, t in weights()["unet"].items()})


@pytest.mark.parametrize(
    "how",
    [
        dict(shards=3),
        dict(shards=3, dtype=torch.float16, variant=".fp16"),
        dict(shards=2, dtype=torch.float16, variant=".fp16", old=True),
    ],
    ids=["fp32", "fp16", "fp16-old-names"],
)
def test_shards_load_as_one(tmp_path, how):
    sdxl = alchemy.load(write_folder(tmp_path, **how), "cpu", how.get("dtype", torch.float32))
    same(sdxl.unet, weights()["unet"], how.get("dtype", torch.float32))
    same(sdxl.text_encoders[1], weights()["text_encoder_2"], how.get("dtype", torch.float32))


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_missing_shards_are_named_before_anything_is_read(tmp_path, variant):
    write_folder(tmp_path, shards=4, variant=variant)
    for i in (2, 4):
        (
            tmp_path / "unet" / f"diffusion_pytorch_model{variant}-0000{i}-of-00004.safetensors"
        ).unlink()
    with pytest.raises(ValueError, match="2 of 4 shards") as caught:
        alchemy.load(tmp_path, "cpu")
    assert all(
        f"diffusion_pytorch_model{variant}-0000{i}-of-00004.safetensors" in str(caught.value)
        for i in (2, 4)
    )


def test_first_encoder_as_transformers_5_saves_it_loads(copy):
    (copy / "text_encoder" / "model.safetensors").unlink()
    write_weights(
        copy / "text_encoder",
        "text_encoder",
        {k.removeprefix("text_model."): t for k, t in weights()["text_encoder"].items()},
    )
    same(alchemy.load(copy, "cpu").text_encoders[0], weights()["text_encoder"])


@pytest.mark.parametrize("prefix", ["text_model.", ""])
def test_position_ids_are_dropped_by_name(copy, prefix):
    for name in ("text_encoder", "text_encoder_2"):
        extra = {
            f"{prefix}embeddings.position_ids": torch.arange(77)[None],
            "logit_scale": torch.tensor(4.6),
        }
        write_weights(copy / name, name, weights()[name] | extra)
    all_same(alchemy.load(copy, "cpu"))


def test_tokenizer_json_alone_gives_the_same_ids(copy):
    source = synthetic.SHIPPED / "tokenizer"
    vocab = json.loads((source / "vocab.json").read_text())
    merges = [
        line.split()
        for line in (source / "merges.txt").read_text().splitlines()
        if line and line[0] != "#"
    ]
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        added = [
            {"id": vocab[token], "content": token}
            for token in sorted({pad, "<|startoftext|>", "<|endoftext|>"}, key=vocab.get)
        ]
        write_json(
            copy / name / "tokenizer.json",
            {"added_tokens": added, "model": {"vocab": vocab, "merges": merges}},
        )
    ours, shipped = (
        alchemy.load(copy, "cpu").tokenizers,
        [
            checkpoint.Tokenizer.from_folder(synthetic.SHIPPED / n)
            for n in ("tokenizer", "tokenizer_2")
        ],
    )
    for a, b in zip(ours, shipped):
        assert a("a photo of a dog, 2 cats!") == b("a photo of a dog, 2 cats!")
    assert [a("x")[-1] for a in ours] == [49407, 0]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_a_float32_file_becomes_the_dtype_asked_for(folder, dtype):
    sdxl = alchemy.load(folder, "cpu", dtype)
    for name in ("unet", "text_encoder", "text_encoder_2"):
        same(sdxl.network(name), weights()[name], getattr(torch, dtype))


def test_scheduler_config_sets_the_schedule(copy):
    write_json(
        copy / "scheduler" / "scheduler_config.json",
        SCHEDULER
        | dict(
            prediction_type="v_prediction",
            timestep_spacing="trailing",
            steps_offset=0,
            beta_end=0.02,
            num_train_timesteps=500,
        ),
    )
    schedule = alchemy.load(copy, "cpu").schedule
    beta = torch.linspace(0.00085**0.5, 0.02**0.5, 500, dtype=torch.float64) ** 2
    assert torch.equal(schedule.alpha_bar, torch.cumprod(1 - beta, 0))
    assert (schedule.prediction, schedule.spacing, schedule.steps_offset) == (
        "v_prediction",
        "trailing",
        0,
    )


def test_force_zeros_for_empty_prompt_is_read_from_model_index(tmp_path, folder):
    assert alchemy.load(folder, "cpu").zeros_for_none is True
    write_folder(tmp_path, index={"force_zeros_for_empty_prompt": False})
    assert alchemy.load(tmp_path, "cpu").zeros_for_none is False


# Another VAE

OTHER = VAE | dict(scaling_factor=0.7, force_upcast=False)


def other_vae():
    return weights(1)["vae"]


def test_vae_as_a_folder_brings_its_configuration(folder, tmp_path):
    write_json(tmp_path / "config.json", OTHER)
    write_weights(tmp_path, "vae", other_vae())
    sdxl = alchemy.load(folder, "cpu", vae=tmp_path)
    same(sdxl.vae, other_vae())
    same(sdxl.unet, weights()["unet"])
    assert sdxl.vae.config.scaling_factor == 0.7


def test_vae_as_a_checkpoint_takes_its_vae_folder(folder, tmp_path):
    write_folder(tmp_path, seed=1, configs=CONFIGS | {"vae": OTHER})
    for place in (tmp_path, tmp_path / "vae"):
        sdxl = alchemy.load(folder, "cpu", vae=place)
        same(sdxl.vae, other_vae())
        assert sdxl.vae.config.scaling_factor == 0.7


@pytest.mark.parametrize("form", ["prefixed", "ldm", "diffusers", "whole"])
def test_vae_as_a_single_file_in_each_spelling(folder, single, tmp_path, form):
    tensors = synthetic.ldm_vae(other_vae())
    if form == "prefixed":
        tensors = {"first_stage_model." + key: t for key, t in tensors.items()}
    tensors = {"diffusers": other_vae(), "whole": synthetic.single_tensors(1)}.get(form, tensors)
    file = write_single(tmp_path / "vae.safetensors", tensors)
    same(alchemy.load(folder, "cpu", vae=file).vae, other_vae())
    same(alchemy.load(single, "cpu", config=folder, vae=file).vae, other_vae())
    assert (
        alchemy.load(folder, "cpu", vae=file).vae.config.scaling_factor == VAE["scaling_factor"]
    )  # a file brings none of its own


def test_a_checkpoint_without_a_vae_loads_with_another(copy, tmp_path):
    shutil.rmtree(copy / "vae")
    write_json(tmp_path / "vae" / "config.json", OTHER)
    write_weights(tmp_path / "vae", "vae", other_vae())
    same(alchemy.load(copy, "cpu", vae=tmp_path / "vae").vae, other_vae())
    with pytest.raises(ValueError, match="vae/config.json"):
        alchemy.load(copy, "cpu")


# The single-file layout


def test_single_file_with_the_usual_extras_loads_bit_equal_to_the_folder(folder, single):
    all_same(alchemy.load(single, "cpu", config=folder))


def test_one_fp16_file_loads_in_each_precision(folder, tmp_path):
    file = write_single(
        tmp_path / "tune.safetensors", dtype=torch.float16, extras=synthetic.USUAL_EXTRAS
    )
    half = {
        name: {key: t.half() for key, t in tensors.items()} for name, tensors in weights().items()
    }
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        sdxl = alchemy.load(file, "cpu", dtype, config=folder)
        for name in ("unet", "text_encoder", "text_encoder_2"):
            same(sdxl.network(name), half[name], dtype)


def test_single_file_projection_is_transposed_and_in_proj_cut_in_three(folder, single):
    stored, second = (
        synthetic.single_tensors(),
        alchemy.load(single, "cpu", config=folder).text_encoders[1],
    )
    prefix = "conditioner.embedders.1.model."
    assert torch.equal(second.text_projection.weight, stored[prefix + "text_projection"].T)
    fused = stored[prefix + "transformer.resblocks.2.attn.in_proj_weight"]
    assert torch.equal(second.text_model.encoder.layers[2].self_attn.k_proj.weight, fused[12:24])


@pytest.mark.parametrize("levels, layers", [(2, 1), (3, 1), (3, 2), (4, 3)])
def test_single_file_unet_names_count_as_the_original_code_does(levels, layers):
    types = ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * (levels - 1)
    for ours, theirs in synthetic.unet_modules(
        dict(layers_per_block=layers, down_block_types=types)
    ).items():
        assert layout.unet(ours + ".weight", layers) == theirs + ".weight"


@pytest.mark.parametrize("levels", [2, 3, 4])
def test_single_file_vae_names_count_the_decoder_from_its_finest_level(levels):
    for ours, theirs in synthetic.vae_modules(
        dict(layers_per_block=2, block_out_channels=[8] * levels)
    ).items():
        assert layout.vae(ours + ".weight", levels) == theirs + ".weight"


def test_v_pred_and_ztsnr_keys_set_the_schedule(folder, tmp_path):
    plain = write_single(tmp_path / "plain.safetensors")
    v = write_single(tmp_path / "v.safetensors", extras={"v_pred": torch.tensor([])})
    z = write_single(
        tmp_path / "z.safetensors", extras={"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
    )
    schedules = [alchemy.load(file, "cpu", config=folder).schedule for file in (plain, v, z)]
    assert [s.prediction for s in schedules] == ["epsilon", "v_prediction", "v_prediction"]
    assert (
        torch.equal(schedules[0].alpha_bar, schedules[1].alpha_bar)
        and schedules[0].alpha_bar[-1] > 0
    )
    assert (
        schedules[2].alpha_bar[-1] == 0 and schedules[2].timesteps(30)[0][0] == 999
    )  # it starts from pure noise


def test_single_file_without_config_is_sdxl_base(tmp_path):
    name = "model.diffusion_model.input_blocks.0.0.weight"
    sdxl = alchemy.load(
        write_single(tmp_path / "base.safetensors", {name: torch.zeros(320, 4, 3, 3)}), "cpu"
    )
    c = sdxl.configs
    assert c["unet"].block_out_channels == (320, 640, 1280) and c[
        "unet"
    ].transformer_layers_per_block[1:] == (2, 10)
    assert (
        c["text_encoder"].hidden_size,
        c["text_encoder"].num_hidden_layers,
        c["text_encoder"].hidden_act,
    ) == (768, 12, "quick_gelu")
    assert (
        c["text_encoder_2"].hidden_size,
        c["text_encoder_2"].num_hidden_layers,
        c["text_encoder_2"].hidden_act,
    ) == (1280, 32, "gelu")
    assert (
        c["text_encoder_2"].projection_dim == 1280
        and c["vae"].scaling_factor == 0.13025
        and c["vae"].force_upcast
    )
    assert torch.equal(
        sdxl.schedule.alpha_bar, Schedule.from_config({}).alpha_bar
    ) and sdxl.size == (1024, 1024)
    assert [t("x")[-1] for t in sdxl.tokenizers] == [
        49407,
        0,
    ] and sdxl.zeros_for_none  # the vocabulary that ships serves


@pytest.mark.skipif(
    not SHARED.is_dir(), reason="the manifest of the official checkpoint is not here"
)
def test_what_a_single_file_assumes_is_what_the_official_configurations_say():
    official = json.loads((SHARED / "sdxl_base_manifest.json").read_text())["configs"]
    for name, kind in checkpoint.CONFIGS.items():
        assert kind.from_config(checkpoint.BASE[name]) == kind.from_config(official[name])
