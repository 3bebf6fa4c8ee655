"""Writing LoRA files: what was written is read back exactly, and another tool's names keep the change of every weight."""
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import alchemy
from alchemy import lora
from alchemy.formats.__main__ import main as convert
from alchemy.formats.folder import save_checkpoint
from checkpoints import refused, vocabulary_read_once  # noqa: F401
from running import tiny  # noqa: F401
from spellings import adapter, ALPHA, equal, fresh, pairs, RANK, SPELLINGS, written  # noqa: F401


# Writing

def random_adapter(sdxl, alpha=ALPHA):
    alchemy.add_lora(sdxl, RANK, alpha)
    for i, layer in enumerate(lora.attention_layers(sdxl.unet).values()):
        layer.lora["default"].up.data = torch.randn(layer.out_features, RANK, generator=torch.Generator().manual_seed(i))
    return {layer: pair[:2] for layer, pair in adapter(sdxl, "default").items()}


def test_kohyas_format_is_read_back_to_the_bit(fresh, tmp_path):
    sdxl, other = fresh(), fresh()
    pairs = random_adapter(sdxl)
    alchemy.save_lora(sdxl, tmp_path / "a.safetensors")
    equal(adapter(other, alchemy.load_lora(other, tmp_path / "a.safetensors")), pairs)
    # And under exactly these names:
    assert load_file(tmp_path / "a.safetensors").keys() == written(pairs, *SPELLINGS["kohya, the single file's blocks"]).keys()


def test_diffusers_format_is_read_back_to_the_bit_with_alpha_multiplied_into_up(fresh, tmp_path):
    sdxl, other = fresh(), fresh()
    pairs = random_adapter(sdxl)
    alchemy.save_lora(sdxl, tmp_path / "a.safetensors", format="diffusers")
    expected = {layer: (down, up * (ALPHA / RANK)) for layer, (down, up) in pairs.items()}
    equal(adapter(other, alchemy.load_lora(other, tmp_path / "a.safetensors")), expected, alpha=float(RANK))
    assert load_file(tmp_path / "a.safetensors").keys() == written(pairs, *SPELLINGS["diffusers"], alpha=False).keys()
    alchemy.save_lora(other, tmp_path / "b.safetensors", name=lora.names(other)[0], format="diffusers")
    assert load_file(tmp_path / "b.safetensors").keys() == load_file(tmp_path / "a.safetensors").keys()


def test_the_header_holds_the_facts_and_what_other_tools_show(fresh, tmp_path):
    sdxl = fresh()
    random_adapter(sdxl)
    for form in ("kohya", "diffusers"):
        alchemy.save_lora(sdxl, tmp_path / "a.safetensors", format=form, facts={"prompt": "a photo of a sks dog", "steps": 12, "targets": ["to_q"]})
        with safe_open(tmp_path / "a.safetensors", "pt") as file:
            assert file.metadata() == {
                "alchemy.prompt": "a photo of a sks dog", "alchemy.steps": "12", "alchemy.targets": '["to_q"]', "alchemy.rank": "2", "alchemy.alpha": "3.0",
                "ss_network_dim": "2", "ss_network_alpha": "3.0", "ss_base_model_version": "sdxl_base_v1-0", "format": "pt"}


def test_only_what_is_there_is_saved_in_a_format_that_is_known(fresh, tmp_path):
    sdxl = fresh()
    random_adapter(sdxl)
    refused(lambda: alchemy.save_lora(sdxl, tmp_path / "a.safetensors", name="other"), "'other'")
    refused(lambda: alchemy.save_lora(sdxl, tmp_path / "a.safetensors", format="comfy"), "'comfy'", "kohya, diffusers, peft")
    assert not list(Path(tmp_path).iterdir())


# Converting

@pytest.mark.parametrize("source", SPELLINGS)
@pytest.mark.parametrize("to", ["kohya", "diffusers", "peft"])
def test_converting_keeps_the_change_of_every_weight(pairs, fresh, tiny, tmp_path, source, to):
    save_file(written(pairs, *SPELLINGS[source]), tmp_path / "a.safetensors", {"alchemy.prompt": "a dog"})
    convert([str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), "--to", to, "--weights", str(tiny)])
    sdxl = fresh()
    ours = adapter(sdxl, alchemy.load_lora(sdxl, tmp_path / "b.safetensors"))
    assert ours.keys() == pairs.keys()
    for layer, (down, up, alpha, _) in ours.items():
        assert torch.equal(down, pairs[layer][0]) and torch.allclose(up * (alpha / RANK), pairs[layer][1] * (ALPHA / RANK), rtol=1e-6, atol=0)
    ends = {"kohya": SPELLINGS["kohya, the single file's blocks"], "diffusers": SPELLINGS["diffusers"], "peft": SPELLINGS["PEFT in diffusers"]}[to]
    assert load_file(tmp_path / "b.safetensors").keys() == written(pairs, *ends, alpha=to == "kohya").keys()
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert file.metadata()["alchemy.prompt"] == "a dog"


def test_converting_needs_no_weights_of_sdxl_base_and_knows_its_names(tmp_path):
    layer = "unet.mid_block.attentions.0.transformer_blocks.9.attn2.to_k"
    save_file({layer + ".lora_A.weight": torch.ones(2, 2048), layer + ".lora_B.weight": torch.ones(1280, 2)}, tmp_path / "a.safetensors")
    convert([str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), "--to", "kohya"])
    stem = "lora_unet_middle_block_1_transformer_blocks_9_attn2_to_k"
    assert load_file(tmp_path / "b.safetensors").keys() == {stem + end for end in (".lora_down.weight", ".lora_up.weight", ".alpha")}


def test_converting_overwrites_nothing_and_names_another_base(pairs, tiny, tmp_path):
    a, b = str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")
    save_file(written(pairs, *SPELLINGS["PEFT"]), a)
    refused(lambda: convert([a, b, "--to", "kohya"]), "made for another base", "SDXL base", "--weights")
    refused(lambda: convert([a, a, "--to", "kohya", "--weights", str(tiny)]), "there already")
    refused(lambda: convert([a, b + ".pt", "--to", "kohya", "--weights", str(tiny)]), ".safetensors")
    assert not Path(b).exists()


# Merging

def test_a_merged_checkpoint_draws_what_base_and_lora_draw(pairs, tiny, tmp_path):
    small = {layer: (0.1 * down, 0.1 * up) for layer, (down, up) in pairs.items()}
    save_file(written(small, *SPELLINGS["PEFT in diffusers"]), tmp_path / "a.safetensors")
    convert([str(tmp_path / "a.safetensors"), str(tmp_path / "whole"), "--merge", "--weights", str(tiny), "--dtype", "float32", "--scale", "0.5"])
    merged, beside, base = alchemy.load(tmp_path / "whole", "cpu"), alchemy.load(tiny, "cpu"), alchemy.load(tiny, "cpu")
    alchemy.load_lora(beside, tmp_path / "a.safetensors", 0.5)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    drawn = [sdxl.unet(x, 500, *sdxl.encode_prompt(["a dog"], (32, 32)).parts()) for sdxl in (merged, beside, base)]
    assert (drawn[0] - drawn[1]).norm() <= 3e-6 * drawn[1].norm() and (drawn[0] - drawn[2]).norm() > 1e-2 * drawn[2].norm()
    assert lora.names(merged) == [] and all(torch.equal(p, q) for p, q in zip(merged.vae.parameters(), base.vae.parameters()))
    assert not [key for key in load_file(tmp_path / "whole/unet/diffusion_pytorch_model.safetensors") if "lora" in key]


def test_merging_refuses_a_folder_that_is_there_and_a_base_without_configurations(pairs, tiny, tmp_path):
    save_file(written(pairs, *SPELLINGS["PEFT"]), tmp_path / "a.safetensors")
    (tmp_path / "b").mkdir()
    a = str(tmp_path / "a.safetensors")
    refused(lambda: convert([a, str(tmp_path / "b"), "--merge", "--weights", str(tiny)]), "there already")
    refused(lambda: convert([a, str(tmp_path / "c"), "--merge"]), "--weights")
    sdxl = alchemy.load(tiny, "cpu")
    sdxl.source = a  # a single file
    refused(lambda: save_checkpoint(sdxl, tmp_path / "c"), "a.safetensors", "--config")
    assert not (tmp_path / "c").exists()
