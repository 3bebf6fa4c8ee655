"""Names and shapes: the full SDXL, without memory, against the official checkpoint's manifest in both layouts; what is stored differently."""

import json
from pathlib import Path

import pytest
import torch

from alchemy import lora
from alchemy.formats import layout
from alchemy.formats.checkpoint import BASE, BUILD, CONFIGS, build_on_meta
from alchemy.formats.lora import KOHYA, known_key_names, kohya_name

MANIFEST = Path(__file__).resolve().parents[3] / "shared" / "reference" / "sdxl_base_manifest.json"
NAMES = tuple(BUILD)
needs_manifest = pytest.mark.skipif(
    not MANIFEST.exists(), reason="sdxl_base_manifest.json is not beside the repository"
)
PAIRS = (
    ("unet", "conv_in.weight", "input_blocks.0.0.weight"),
    ("unet", "time_embedding.linear_2.bias", "time_embed.2.bias"),
    ("unet", "add_embedding.linear_1.weight", "label_emb.0.0.weight"),
    ("unet", "down_blocks.0.downsamplers.0.conv.weight", "input_blocks.3.0.op.weight"),
    (
        "unet",
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight",
        "input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight",
    ),
    (
        "unet",
        "down_blocks.2.attentions.1.transformer_blocks.9.norm1.weight",
        "input_blocks.8.1.transformer_blocks.9.norm1.weight",
    ),
    (
        "unet",
        "down_blocks.1.resnets.0.conv_shortcut.weight",
        "input_blocks.4.0.skip_connection.weight",
    ),
    ("unet", "mid_block.resnets.1.time_emb_proj.weight", "middle_block.2.emb_layers.1.weight"),
    ("unet", "up_blocks.0.upsamplers.0.conv.weight", "output_blocks.2.2.conv.weight"),
    ("unet", "up_blocks.1.resnets.2.norm2.bias", "output_blocks.5.0.out_layers.0.bias"),
    ("unet", "conv_norm_out.weight", "out.0.weight"),
    (
        "vae",
        "encoder.down_blocks.0.downsamplers.0.conv.weight",
        "encoder.down.0.downsample.conv.weight",
    ),
    ("vae", "decoder.up_blocks.0.resnets.2.conv1.weight", "decoder.up.3.block.2.conv1.weight"),
    ("vae", "decoder.mid_block.attentions.0.to_out.0.weight", "decoder.mid.attn_1.proj_out.weight"),
    ("vae", "encoder.mid_block.resnets.1.norm1.weight", "encoder.mid.block_2.norm1.weight"),
    ("text_encoder", "text_model.final_layer_norm.weight", "text_model.final_layer_norm.weight"),
    (
        "text_encoder_2",
        "text_model.encoder.layers.31.self_attn.v_proj.bias",
        "transformer.resblocks.31.attn.in_proj_bias",
    ),
    (
        "text_encoder_2",
        "text_model.encoder.layers.0.layer_norm2.weight",
        "transformer.resblocks.0.ln_2.weight",
    ),
    ("text_encoder_2", "text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_encoder_2", "text_projection.weight", "text_projection"),
)


@pytest.fixture(scope="module")
def manifest():
    return json.loads(MANIFEST.read_text())


def shapes(name, config):
    """{tensor name: shape} of our network, built without memory."""
    with torch.device("meta"):
        return {
            key: tuple(value.shape)
            for key, value in BUILD[name](CONFIGS[name].from_config(config)).state_dict().items()
        }


@needs_manifest
@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_of_the_folder_layout_by_name_and_shape(name, manifest):
    theirs = {
        key: tuple(shape)
        for key, shape in manifest["folder_layout"][name].items()
        if "position_ids" not in key
    }
    assert shapes(name, manifest["configs"][name]) == theirs


@needs_manifest
@pytest.mark.parametrize("name", NAMES)
def test_the_classes_defaults_and_base_are_sdxl_base(name, manifest):
    assert CONFIGS[name].from_config(BASE[name]) == CONFIGS[name].from_config(
        manifest["configs"][name]
    )


@needs_manifest
def test_every_tensor_of_the_single_file_by_name_and_shape(manifest):
    theirs, met = (
        {key: tuple(shape) for key, shape in manifest["single_file_layout"].items()},
        set(),
    )
    for name in NAMES:
        config = CONFIGS[name].from_config(manifest["configs"][name])
        for key, shape in shapes(name, manifest["configs"][name]).items():
            stored = layout.PREFIX[name] + layout.single_file_name(name, key, config)
            assert (
                layout.adapt(name, key, torch.empty(theirs[stored], device="meta")).shape == shape
            ), key
            met.add(stored)
    left_over = set(theirs) - met
    assert left_over == {
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
        "conditioner.embedders.1.model.logit_scale",
    }
    assert all(layout.EXTRAS.search(key) for key in left_over) and not any(
        layout.EXTRAS.search(key) for key in met
    )


@needs_manifest
def test_kohyas_names_are_those_of_every_linear_layer_and_convolution_of_sdxl_base(manifest):
    def modules(tensors):
        weights = {
            key.removesuffix(".weight")
            for key, shape in tensors.items()
            if key.endswith(".weight") and len(shape) in (2, 4)
        }
        return {name for name in weights if ".embeddings." not in name}

    theirs, ldm = manifest["folder_layout"], layout.PREFIX["unet"]
    by_blocks = {
        "unet." + name: "lora_unet_" + name.replace(".", "_") for name in modules(theirs["unet"])
    }
    words = {
        f"{network}.{name}": prefix + name.replace(".", "_")
        for network, prefix in (("text_encoder", "lora_te1_"), ("text_encoder_2", "lora_te2_"))
        for name in modules(theirs[network])
    }
    single = {
        "lora_unet_" + name.removeprefix(ldm).replace(".", "_")
        for name in modules(manifest["single_file_layout"])
        if name.startswith(ldm)
    }
    assert (len(by_blocks), len(single), len(words)) == (794, 794, 12 * 6 + 32 * 6 + 1)
    assert "lora_te2_text_model_encoder_layers_31_mlp_fc1" in words.values()
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q" in single

    networks = {
        name: build_on_meta(name, CONFIGS[name].from_config(manifest["configs"][name]))
        for name in KOHYA
    }
    table = known_key_names(networks)
    assert all(table[name] == layer for layer, name in (by_blocks | words).items())  # read
    assert {table[name] for name in single} == by_blocks.keys()
    made = {
        kohya_name(network, name, model.config)
        for network, model in networks.items()
        for name in lora.layers(model)
    }
    assert made == single | {*words.values()}  # written


@pytest.mark.parametrize("network, name, single", PAIRS)
def test_the_place_of_a_tensor_in_the_single_file(network, name, single):
    assert layout.single_file_name(network, name, CONFIGS[network]()) == single


def test_places_follow_the_number_of_layers_and_levels():
    assert (
        layout.unet("up_blocks.1.attentions.1.norm.weight", layers=1)
        == "output_blocks.3.1.norm.weight"
    )
    assert (
        layout.unet("down_blocks.1.downsamplers.0.conv.bias", layers=1)
        == "input_blocks.4.0.op.bias"
    )
    assert (
        layout.vae("decoder.up_blocks.0.upsamplers.0.conv.weight", levels=3)
        == "decoder.up.2.upsample.conv.weight"
    )


def test_in_proj_holds_q_k_v_in_this_order():
    whole = torch.arange(12.0).view(6, 2)
    for i, part in enumerate("qkv"):
        got = layout.adapt(
            "text_encoder_2", f"text_model.encoder.layers.3.self_attn.{part}_proj.weight", whole
        )
        assert torch.equal(got, whole[2 * i : 2 * i + 2])


def test_text_projection_is_stored_transposed():
    stored = torch.tensor(
        [[-0.0348, 0.0218], [-0.0037, 0.5]]
    )  # as in the official file: P[1, 0] = -0.0037
    assert layout.adapt("text_encoder_2", "text_projection.weight", stored)[0, 1] == torch.tensor(
        -0.0037
    )


def test_the_vaes_attention_is_stored_as_1_x_1_convolutions():
    stored = torch.arange(4.0).view(2, 2, 1, 1)
    assert torch.equal(
        layout.adapt("vae", "encoder.mid_block.attentions.0.to_q.weight", stored), stored.view(2, 2)
    )
    assert layout.adapt("vae", "quant_conv.weight", stored) is stored


@pytest.mark.parametrize(
    "name, key",
    [
        ("unet", "down_blocks.1.attentions.0.proj_in.weight"),
        ("text_encoder", "text_model.final_layer_norm.bias"),
    ],
)
def test_everything_else_is_stored_as_it_is(name, key):
    tensor = torch.zeros(2, 2)
    assert layout.adapt(name, key, tensor) is tensor
