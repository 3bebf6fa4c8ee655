"""Writing LoRA files: what was written is read back exactly, and another tool's names keep the change of every weight."""

from pathlib import Path

import torch
from helpers.checkpoints import refused, vocabulary_read_once  # noqa: F401
from helpers.running import tiny  # noqa: F401
from helpers.spellings import (
    ALPHA,
    RANK,
    SPELLINGS,
    adapter,
    adapters,
    equal,
    fresh,
    pairs,
    written,
)  # noqa: F401
from safetensors import safe_open
from safetensors.torch import load_file

import alchemy
from alchemy import lora

# Writing


def random_adapter(sdxl, alpha=ALPHA):
    alchemy.add_lora(sdxl, RANK, alpha)
    for i, layer in enumerate(lora.attention_layers(sdxl.unet).values()):
        layer.lora["default"].up.data = torch.randn(
            layer.out_features, RANK, generator=torch.Generator().manual_seed(i)
        )
    return {layer: pair[:2] for layer, pair in adapter(sdxl, "default").items()}


def test_kohyas_format_is_read_back_to_the_bit(fresh, tmp_path):
    sdxl, other = fresh(), fresh()
    pairs = random_adapter(sdxl)
    alchemy.save_lora(sdxl, tmp_path / "a.safetensors")
    equal(adapter(other, alchemy.load_lora(other, tmp_path / "a.safetensors")), pairs)
    # And under exactly these names:
    assert (
        load_file(tmp_path / "a.safetensors").keys()
        == written(pairs, *SPELLINGS["kohya, the single file's blocks"]).keys()
    )


def test_diffusers_format_is_read_back_to_the_bit_with_alpha_multiplied_into_up(fresh, tmp_path):
    sdxl, other = fresh(), fresh()
    pairs = random_adapter(sdxl)
    alchemy.save_lora(sdxl, tmp_path / "a.safetensors", format="diffusers")
    expected = {layer: (down, up * (ALPHA / RANK)) for layer, (down, up) in pairs.items()}
    equal(
        adapter(other, alchemy.load_lora(other, tmp_path / "a.safetensors")),
        expected,
        alpha=float(RANK),
    )
    assert (
        load_file(tmp_path / "a.safetensors").keys()
        == written(pairs, *SPELLINGS["diffusers"], alpha=False).keys()
    )
    alchemy.save_lora(
        other, tmp_path / "b.safetensors", name=next(iter(adapters(other))), format="diffusers"
    )
    assert (
        load_file(tmp_path / "b.safetensors").keys() == load_file(tmp_path / "a.safetensors").keys()
    )


def test_the_header_holds_the_facts_and_what_other_tools_show(fresh, tmp_path):
    sdxl = fresh()
    random_adapter(sdxl)
    for form in ("kohya", "diffusers"):
        alchemy.save_lora(
            sdxl,
            tmp_path / "a.safetensors",
            format=form,
            metadata={"prompt": "a photo of a sks dog", "steps": 12, "targets": ["to_q"]},
        )
        with safe_open(tmp_path / "a.safetensors", "pt") as file:
            assert file.metadata() == {
                "alchemy.prompt": "a photo of a sks dog",
                "alchemy.steps": "12",
                "alchemy.targets": '["to_q"]',
                "alchemy.rank": "2",
                "alchemy.alpha": "3.0",
                "ss_network_dim": "2",
                "ss_network_alpha": "3.0",
                "ss_base_model_version": "sdxl_base_v1-0",
                "format": "pt",
            }


def test_only_what_is_there_is_saved_in_a_format_that_is_known(fresh, tmp_path):
    sdxl = fresh()
    random_adapter(sdxl)
    refused(lambda: alchemy.save_lora(sdxl, tmp_path / "a.safetensors", name="other"), "'other'")
    refused(
        lambda: alchemy.save_lora(sdxl, tmp_path / "a.safetensors", format="comfy"),
        "'comfy'",
        "kohya, diffusers, peft",
    )
    assert not list(Path(tmp_path).iterdir())
