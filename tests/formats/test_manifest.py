"""Names and shapes of the full SDXL, without memory, against the official checkpoint's manifest.

And what the single file names and stores differently.
"""

import pytest
import torch
from helpers.checkpoints import shapes, unet_modules, vae_modules
from helpers.tool_names import manifest

from alchemy.formats import layout
from alchemy.formats.checkpoint import BASE, BUILD, CONFIGS, build_on_meta

NAMES = tuple(BUILD)
POSITION_IDS = "conditioner.embedders.0.transformer.text_model.embeddings.position_ids"
LOGIT_SCALE = "conditioner.embedders.1.model.logit_scale"


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_of_the_folder_layout_by_name_and_shape(name):
    theirs = {k: tuple(shape) for k, shape in manifest()["folder_layout"][name].items()}
    theirs.pop("text_model.embeddings.position_ids", None)
    assert shapes(name, manifest()["configs"][name]) == theirs


@pytest.mark.parametrize("name", NAMES)
def test_the_defaults_of_the_classes_and_base_are_sdxl_base(name):
    official = CONFIGS[name].from_config(manifest()["configs"][name])
    assert CONFIGS[name].from_config(BASE[name]) == official


def test_every_tensor_of_the_single_file_by_name_and_shape():
    theirs = {k: tuple(shape) for k, shape in manifest()["single_file_layout"].items()}
    read, written = set(), {}
    for name in NAMES:
        config = CONFIGS[name].from_config(manifest()["configs"][name])
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


@pytest.mark.parametrize("levels, layers", [(2, 1), (3, 1), (3, 2), (4, 3)])
def test_single_file_names_count_as_the_original_code_does(levels, layers):
    types = ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * (levels - 1)
    modules = unet_modules({"layers_per_block": layers, "down_block_types": types})
    for ours, theirs in modules.items():
        assert layout.unet(ours + ".weight", layers) == theirs + ".weight"
    sizes = {"layers_per_block": 2, "block_out_channels": [8] * levels}
    for ours, theirs in vae_modules(sizes).items():
        assert layout.vae(ours + ".weight", levels) == theirs + ".weight"


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
