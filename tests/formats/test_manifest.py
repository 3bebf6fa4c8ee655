"""Names and shapes of the full SDXL, without memory, against the official checkpoint's manifest.

And the tensors that the single file stores differently.
"""

import json
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import shapes

from alchemy import lora
from alchemy.formats import layout
from alchemy.formats.checkpoint import BASE, BUILD, CONFIGS, build_on_meta
from alchemy.formats.lora import KOHYA, known_key_names, kohya_name

MANIFEST = Path(__file__).resolve().parents[3] / "shared" / "reference" / "sdxl_base_manifest.json"
NAMES = tuple(BUILD)
needs_manifest = pytest.mark.skipif(
    not MANIFEST.exists(), reason="sdxl_base_manifest.json is not beside the repository"
)
POSITION_IDS = "conditioner.embedders.0.transformer.text_model.embeddings.position_ids"
LOGIT_SCALE = "conditioner.embedders.1.model.logit_scale"


@pytest.fixture(scope="module")
def manifest():
    return json.loads(MANIFEST.read_text())


@needs_manifest
@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_of_the_folder_layout_by_name_and_shape(name, manifest):
    theirs = {k: tuple(shape) for k, shape in manifest["folder_layout"][name].items()}
    theirs.pop("text_model.embeddings.position_ids", None)
    assert shapes(name, manifest["configs"][name]) == theirs


@needs_manifest
@pytest.mark.parametrize("name", NAMES)
def test_the_defaults_of_the_classes_and_base_are_sdxl_base(name, manifest):
    official = CONFIGS[name].from_config(manifest["configs"][name])
    assert CONFIGS[name].from_config(BASE[name]) == official


@needs_manifest
def test_every_tensor_of_the_single_file_by_name_and_shape(manifest):
    theirs = {k: tuple(shape) for k, shape in manifest["single_file_layout"].items()}
    read, written = set(), {}
    for name in NAMES:
        config = CONFIGS[name].from_config(manifest["configs"][name])
        network = build_on_meta(name, config).state_dict()
        written |= layout.to_single_file(name, network, config)
        for key, tensor in network.items():
            stored = layout.PREFIX[name] + layout.single_file_name(name, key, config)
            adapted = layout.adapt(name, key, torch.empty(theirs[stored], device="meta"))
            assert adapted.shape == tensor.shape, key
            read.add(stored)
    assert {*theirs} - read == {POSITION_IDS, LOGIT_SCALE}
    assert all(layout.EXTRAS.search(key) for key in (POSITION_IDS, LOGIT_SCALE))
    assert not any(layout.EXTRAS.search(key) for key in read)
    # The file that is written lacks position_ids, added when it is saved, and logit_scale, which
    # only the training of CLIP needs.
    del theirs[POSITION_IDS], theirs[LOGIT_SCALE]
    assert {key: tuple(tensor.shape) for key, tensor in written.items()} == theirs


def layers_of(tensors, prefix=""):
    """The linear layers and convolutions of a manifest's network."""
    names = set()
    for key, shape in tensors.items():
        is_weight = key.startswith(prefix) and key.endswith(".weight") and len(shape) in (2, 4)
        if is_weight and ".embeddings." not in key:
            names.add(key.removeprefix(prefix).removesuffix(".weight"))
    return names


@needs_manifest
def test_kohyas_names_are_those_of_every_linear_layer_and_convolution_of_sdxl_base(manifest):
    by_diffusers, by_single_file = {}, set()
    for network, prefix in KOHYA.items():
        for name in layers_of(manifest["folder_layout"][network]):
            by_diffusers[f"{network}.{name}"] = prefix + name.replace(".", "_")
    for name in layers_of(manifest["single_file_layout"], layout.PREFIX["unet"]):
        by_single_file.add("lora_unet_" + name.replace(".", "_"))
    text = {layer for layer in by_diffusers if layer.startswith("text")}
    unet = by_diffusers.keys() - text
    assert (len(unet), len(by_single_file), len(text)) == (794, 794, 12 * 6 + 32 * 6 + 1)
    assert "lora_te2_text_model_encoder_layers_31_mlp_fc1" in by_diffusers.values()
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q" in by_single_file

    # Read by either name, and written by the single file's.
    networks = {}
    for name in KOHYA:
        networks[name] = build_on_meta(name, CONFIGS[name].from_config(manifest["configs"][name]))
    table = known_key_names(networks)
    assert all(table[name] == layer for layer, name in by_diffusers.items())
    assert {table[name] for name in by_single_file} == unet
    written = set()
    for network, model in networks.items():
        written |= {kohya_name(network, name, model.config) for name in lora.layers(model)}
    assert written == by_single_file | {by_diffusers[layer] for layer in text}


BLOCK_4 = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight"
BLOCK_8 = "down_blocks.2.attentions.1.transformer_blocks.9.norm1.weight"
IN_4, IN_8 = "input_blocks.4.1.transformer_blocks.0.", "input_blocks.8.1.transformer_blocks.9."
LAYERS, RESBLOCKS = "text_model.encoder.layers.", "transformer.resblocks."
PAIRS = {
    "unet": {
        "conv_in.weight": "input_blocks.0.0.weight",
        "time_embedding.linear_2.bias": "time_embed.2.bias",
        "add_embedding.linear_1.weight": "label_emb.0.0.weight",
        "down_blocks.0.downsamplers.0.conv.weight": "input_blocks.3.0.op.weight",
        BLOCK_4: IN_4 + "attn1.to_q.weight",
        BLOCK_8: IN_8 + "norm1.weight",
        "down_blocks.1.resnets.0.conv_shortcut.weight": "input_blocks.4.0.skip_connection.weight",
        "mid_block.resnets.1.time_emb_proj.weight": "middle_block.2.emb_layers.1.weight",
        "up_blocks.0.upsamplers.0.conv.weight": "output_blocks.2.2.conv.weight",
        "up_blocks.1.resnets.2.norm2.bias": "output_blocks.5.0.out_layers.0.bias",
        "conv_norm_out.weight": "out.0.weight",
    },
    "vae": {
        "encoder.down_blocks.0.downsamplers.0.conv.bias": "encoder.down.0.downsample.conv.bias",
        "decoder.up_blocks.0.resnets.2.conv1.weight": "decoder.up.3.block.2.conv1.weight",
        "decoder.mid_block.attentions.0.to_out.0.weight": "decoder.mid.attn_1.proj_out.weight",
        "encoder.mid_block.resnets.1.norm1.weight": "encoder.mid.block_2.norm1.weight",
    },
    "text_encoder": {"text_model.final_layer_norm.weight": "text_model.final_layer_norm.weight"},
    "text_encoder_2": {
        LAYERS + "31.self_attn.v_proj.bias": RESBLOCKS + "31.attn.in_proj_bias",
        LAYERS + "0.layer_norm2.weight": RESBLOCKS + "0.ln_2.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_projection.weight": "text_projection",
    },
}


@pytest.mark.parametrize("network", PAIRS)
def test_the_name_of_a_tensor_in_the_single_file(network):
    for name, single in PAIRS[network].items():
        assert layout.single_file_name(network, name, CONFIGS[network]()) == single


def test_names_follow_the_number_of_layers_and_levels():
    upsampler = layout.vae("decoder.up_blocks.0.upsamplers.0.conv.weight", levels=3)
    assert upsampler == "decoder.up.2.upsample.conv.weight"
    downsampler = layout.unet("down_blocks.1.downsamplers.0.conv.bias", layers=1)
    assert downsampler == "input_blocks.4.0.op.bias"
    transformer = layout.unet("up_blocks.1.attentions.1.norm.weight", layers=1)
    assert transformer == "output_blocks.3.1.norm.weight"


def test_in_proj_holds_q_k_v_in_this_order():
    whole, layer = torch.arange(12.0).view(6, 2), "text_model.encoder.layers.3.self_attn."
    for i, part in enumerate("qkv"):
        third = layout.adapt("text_encoder_2", f"{layer}{part}_proj.weight", whole)
        assert torch.equal(third, whole[2 * i : 2 * i + 2])


def test_text_projection_is_stored_transposed():
    # In the official file, P[1, 0] is -0.0037.
    stored = torch.tensor([[-0.0348, 0.0218], [-0.0037, 0.5]])
    ours = layout.adapt("text_encoder_2", "text_projection.weight", stored)
    assert ours[0, 1] == torch.tensor(-0.0037)


def test_only_the_vaes_attention_is_stored_as_1_x_1_convolutions():
    stored = torch.arange(4.0).view(2, 2, 1, 1)
    ours = layout.adapt("vae", "encoder.mid_block.attentions.0.to_q.weight", stored)
    assert torch.equal(ours, stored.view(2, 2))
    for name, key in (
        ("vae", "quant_conv.weight"),
        ("unet", "down_blocks.1.attentions.0.proj_in.weight"),
        ("text_encoder", "text_model.final_layer_norm.bias"),
    ):
        assert layout.adapt(name, key, stored) is stored
