"""Checkpoints as they are written, a folder or one file: every bit is read back."""

import json
from dataclasses import replace

import pytest
import torch
from helpers.checkpoints import (
    NETWORKS,
    SHIPPED,
    VAE,
    all_same,
    refused,
    same,
    single_tensors,
    weights,
    write_folder,
    write_json,
    write_single,
    write_weights,
)
from helpers.running import contents
from helpers.spellings import adapters
from safetensors.torch import load_file

import alchemy
from alchemy import lora
from alchemy.formats import saving
from alchemy.formats.saving import POSITION_IDS, save_checkpoint

LAYOUT = {"model_index.json", "scheduler/scheduler_config.json"}
for network in NETWORKS:
    weight_file = "model" if network.startswith("text") else "diffusion_pytorch_model"
    LAYOUT |= {f"{network}/config.json", f"{network}/{weight_file}.safetensors"}
for tokenizer in ("tokenizer", "tokenizer_2"):
    LAYOUT |= {f"{tokenizer}/{file.name}" for file in (SHIPPED / tokenizer).iterdir()}


def identical(one, other):
    """Two checkpoints have the same networks to the bit, configurations, schedule and tokens."""
    for name in NETWORKS:
        same(one.network(name), other.network(name).state_dict(), one.dtype)
    assert one.configs == other.configs and one.zeros_for_none == other.zeros_for_none
    assert one.schedule.prediction == other.schedule.prediction
    assert one.schedule.spacing == other.schedule.spacing
    assert torch.equal(one.schedule.alpha_bar, other.schedule.alpha_bar)
    assert [t("a dog!") for t in one.tokenizers] == [t("a dog!") for t in other.tokenizers]


# A folder


@pytest.mark.parametrize("vocabulary", [True, False])  # without one, the shipped one is written
def test_a_written_folder_holds_the_layout_and_nothing_else_and_loads_the_same(
    tmp_path, vocabulary
):
    index = {"force_zeros_for_empty_prompt": False}
    source = write_folder(tmp_path / "source", vocabulary=vocabulary, index=index)
    for other in ("notes.txt", "unet/training.json", "lora/adapter_config.json"):
        write_json(source / other, {"of": "no use"})
    save_checkpoint(alchemy.load(source, "cpu"), tmp_path / "whole")
    assert contents(tmp_path / "whole").keys() == LAYOUT
    identical(alchemy.load(tmp_path / "whole", "cpu"), alchemy.load(source, "cpu"))


def test_another_vae_is_written_with_its_own_configuration(tiny, tmp_path):
    other = VAE | {"scaling_factor": 0.7, "force_upcast": False, "shift_factor": 0.1}
    write_json(tmp_path / "vae/config.json", other)
    write_weights(tmp_path / "vae", "vae", weights(1)["vae"])
    save_checkpoint(alchemy.load(tiny, "cpu", vae=tmp_path / "vae"), tmp_path / "whole")
    assert json.loads((tmp_path / "whole/vae/config.json").read_text()) == other
    expected = alchemy.load(tiny, "cpu", vae=tmp_path / "vae")
    identical(alchemy.load(tmp_path / "whole", "cpu"), expected)


def test_the_schedule_that_a_single_file_marks_is_written_to_a_folder(tiny, tmp_path):
    marks = {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
    file = write_single(tmp_path / "v.safetensors", extras=marks)
    single = alchemy.load(file, "cpu", config=tiny)
    save_checkpoint(single, tmp_path / "whole")
    assert single.schedule.prediction == "v_prediction" and single.schedule.alpha_bar[-1] == 0
    identical(alchemy.load(tmp_path / "whole", "cpu"), single)


def test_a_single_file_without_configurations_is_not_written_to_a_folder(tmp_path):
    first = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3)}
    single = alchemy.load(write_single(tmp_path / "single.safetensors", first), "cpu")
    target = tmp_path / "whole"
    refused(lambda: save_checkpoint(single, target), "single.safetensors", "--model-config")
    assert not target.exists()


# One file


def test_the_file_holds_the_original_layout_and_loads_bit_equal(tiny, tmp_path):
    path = tmp_path / "a.safetensors"
    assert save_checkpoint(alchemy.load(tiny, "cpu"), path, {"note": "x"}) == [path]
    stored, expected = load_file(path), single_tensors()
    assert torch.equal(stored.pop(POSITION_IDS), torch.arange(77)[None])
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[key], tensor) for key, tensor in expected.items())
    all_same(alchemy.load(path, "cpu", config=tiny))


@pytest.mark.parametrize(
    "prediction, zero", [("epsilon", 0), ("v_prediction", 0), ("v_prediction", 1)]
)
def test_the_schedule_is_marked_by_v_pred_and_ztsnr(fresh, tiny, tmp_path, prediction, zero):
    sdxl, path = fresh(), tmp_path / "a.safetensors"
    sdxl.schedule = replace(sdxl.schedule, prediction=prediction)
    if zero:
        sdxl.schedule = sdxl.schedule.zero_terminal_snr()
    save_checkpoint(sdxl, path)
    schedule = alchemy.load(path, "cpu", config=tiny).schedule
    assert schedule.prediction == prediction
    assert torch.equal(schedule.alpha_bar, sdxl.schedule.alpha_bar)


# Both


@pytest.mark.parametrize("target", ["a.safetensors", "a"])
@pytest.mark.parametrize("merged_before", [True, False])
def test_loras_are_merged_and_nothing_is_kept_beside(fresh, tiny, tmp_path, target, merged_before):
    sdxl, merged = fresh(), fresh()
    for checkpoint in (sdxl, merged):
        alchemy.add_lora(checkpoint, 2)
        for adapter in lora.adapters(checkpoint):
            adapter.up.data += 0.1
    lora.merge(merged)
    if merged_before:
        lora.merge(sdxl)
    state = merged.unet.state_dict()
    expected = {key: tensor for key, tensor in state.items() if ".lora." not in key}
    save_checkpoint(sdxl, tmp_path / target)
    config = tiny if target == "a.safetensors" else None
    same(alchemy.load(tmp_path / target, "cpu", config=config).unet, expected)
    assert not adapters(sdxl)
    assert all(layer.base_weight is None for layer in lora.layers(sdxl).values())


@pytest.mark.parametrize("target", ["a.safetensors", "a"])
def test_dtype_is_that_asked_for_and_what_exists_is_kept(fresh, tmp_path, target):
    sdxl, path = fresh(), tmp_path / target
    for file in save_checkpoint(sdxl, path, dtype=torch.float16):
        stored = {tensor.dtype for key, tensor in load_file(file).items() if key != POSITION_IDS}
        assert stored == {torch.float16}
    before = contents(tmp_path)
    refused(lambda: save_checkpoint(sdxl, path), path, "exists already")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("target", ["a.safetensors", "a"])
def test_a_checkpoint_that_cannot_be_written_whole_leaves_nothing(
    fresh, tmp_path, monkeypatch, target
):
    def full(tensors, path, metadata):
        raise OSError(f"{path}: could not be written (No space left on device)")

    monkeypatch.setattr(saving, "save_tensors", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(fresh(), tmp_path / target)
    assert not list(tmp_path.iterdir())
