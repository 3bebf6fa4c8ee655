"""A checkpoint in one file, as we write it: the names of the official file, every bit read back."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import checkpoints as synthetic
from helpers.checkpoints import (
    all_same,
    refused,
    vocabulary_read_once,  # noqa: F401
    write_folder,
)
from safetensors.torch import load_file

import alchemy
from alchemy import lora
from alchemy.formats import layout
from alchemy.formats.checkpoint import BUILD, CONFIGS, build_on_meta
from alchemy.formats.saving import POSITION_IDS, save_checkpoint

MANIFEST = Path(__file__).resolve().parents[3] / "shared" / "reference" / "sdxl_base_manifest.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("checkpoint"))


def test_the_file_holds_the_original_layout_and_loads_bit_equal(folder, tmp_path):
    [path] = save_checkpoint(alchemy.load(folder, "cpu"), tmp_path / "a.safetensors", {"note": "x"})
    stored, expected = load_file(path), synthetic.single_tensors()
    position_ids = stored.pop(POSITION_IDS)
    assert torch.equal(position_ids, torch.arange(77)[None])
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[key], tensor) for key, tensor in expected.items())
    all_same(alchemy.load(path, "cpu", config=folder))


@pytest.mark.skipif(not MANIFEST.exists(), reason="the official manifest is not here")
def test_the_full_size_file_has_the_official_names_and_shapes():
    manifest, stored = json.loads(MANIFEST.read_text()), {}
    for name in BUILD:
        network = build_on_meta(name, CONFIGS[name].from_config(manifest["configs"][name]))
        stored |= layout.to_single_file(name, network.state_dict(), network.config)
    ours = {key: list(tensor.shape) for key, tensor in stored.items()}
    theirs = dict(manifest["single_file_layout"])
    assert theirs.pop(POSITION_IDS) == [1, 77]
    del theirs["conditioner.embedders.1.model.logit_scale"]  # of training CLIP; nothing here has it
    assert ours == theirs


def test_loras_are_merged_and_nothing_is_kept_beside(folder, tmp_path):
    sdxl = alchemy.load(folder, "cpu")
    alchemy.add_lora(sdxl, 2)
    for adapter in lora.adapters(sdxl):
        adapter.up.data += 0.1
    lora.merge(sdxl)
    expected = {key: p.clone() for key, p in sdxl.unet.state_dict().items() if ".lora." not in key}
    [path] = save_checkpoint(sdxl, tmp_path / "a.safetensors")
    synthetic.same(alchemy.load(path, "cpu", config=folder).unet, expected)
    assert not lora.adapters(sdxl)


@pytest.mark.parametrize(
    "prediction, zero", [("epsilon", 0), ("v_prediction", 0), ("v_prediction", 1)]
)
def test_the_schedule_is_marked_by_v_pred_and_ztsnr(folder, tmp_path, prediction, zero):
    sdxl = alchemy.load(folder, "cpu")
    sdxl.schedule = replace(sdxl.schedule, prediction=prediction)
    if zero:
        sdxl.schedule = sdxl.schedule.zero_terminal_snr()
    [path] = save_checkpoint(sdxl, tmp_path / "a.safetensors")
    schedule = alchemy.load(path, "cpu", config=folder).schedule
    assert schedule.prediction == prediction
    assert torch.equal(schedule.alpha_bar, sdxl.schedule.alpha_bar)


def test_dtype_is_that_asked_for_and_an_existing_file_is_kept(folder, tmp_path):
    sdxl, path = alchemy.load(folder, "cpu"), tmp_path / "a.safetensors"
    save_checkpoint(sdxl, path, dtype=torch.float16)
    weights = [t for key, t in load_file(path).items() if not key.endswith(POSITION_IDS)]
    assert {t.dtype for t in weights} == {torch.float16}
    before = path.read_bytes()
    refused(lambda: save_checkpoint(sdxl, path), path, "exists already")
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_encoder_1_in_transformers_5_names_loads(folder, tmp_path):
    tensors = {}
    for key, tensor in synthetic.single_tensors().items():
        first = key.startswith(layout.PREFIX["text_encoder"])
        tensors[key.replace("text_model.", "") if first else key] = tensor
    file = synthetic.write_single(tmp_path / "a.safetensors", tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        all_same(alchemy.load(file, "cpu", config=folder))
