"""train.py --method full: all of the UNet learns, and what comes out is a checkpoint."""
import pytest
import torch
from safetensors.torch import load_file

import alchemy
from alchemy.methods import dreambooth
from checkpoints import vocabulary_read_once  # noqa: F401
from running import call, contents, good, photos, quick, refused, taught, tiny  # noqa: F401
from test_resume import stopped  # noqa: F401

FULL = ("--method", "full", "--class-pictures", 2, "--class-folder", "class", "--steps", 3)


def test_the_result_is_a_checkpoint_of_which_every_weight_of_the_unet_has_learned(taught, tiny):
    run = good(taught(*FULL, "--out", "full"))
    assert "all of the UNet learns" in run.err and "full/checkpoint/unet/diffusion_pytorch_model.safetensors" in run.out
    after, before = alchemy.load("full/checkpoint", "cpu"), alchemy.load(tiny, "cpu")
    moved = {name: not torch.equal(p, q) for (name, p), q in zip(after.unet.named_parameters(), before.unet.parameters())}
    assert all(moved.values()), [name for name, did in moved.items() if not did]
    for name in ("vae", "text_encoder", "text_encoder_2"):
        assert all(torch.equal(p, q) for p, q in zip(after.network(name).parameters(), before.network(name).parameters()))
    good(call("sample.py", "a photo of a sks dog", "--weights", "full/checkpoint", "--out", "drawn.png"))


def test_it_resumes_to_the_same_bits(taught, tiny, stopped):
    good(taught(*FULL, "--out", "whole"))
    flags = ("train.py", "photos", "--class-word", "dog", "--weights", tiny, "--preview-every", 0, *FULL, "--out", "half")
    assert stopped(flags, step=1).status == 143
    good(call("train.py", "--out", "half", "--resume"))
    one, two = (load_file(f"{name}/checkpoint/unet/diffusion_pytorch_model.safetensors") for name in ("whole", "half"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    refused(call("train.py", "--out", "half", "--resume"), "finished")


def test_without_class_pictures_it_needs_to_be_told_that_there_is_no_prior(taught):
    refused(taught("--method", "full", "--class-pictures", 0), "--class-pictures", "--prior-weight 0")
    good(taught("--method", "full", "--prior-weight", 0, "--out", "bare"))
    assert sorted({name.partition("/")[0] for name in contents("bare")}) == ["checkpoint", "loss.png", "settings.json"]


def test_overwriting_replaces_the_checkpoint_and_a_lora_run_does_not_take_the_folder(taught):
    good(taught("--method", "full", "--prior-weight", 0, "--out", "run"))
    refused(taught("--out", "run"), "holds a run already")
    before = contents("run")["checkpoint/unet/diffusion_pytorch_model.safetensors"]
    good(taught("--method", "full", "--prior-weight", 0, "--out", "run", "--overwrite", "--seed", 4))
    assert contents("run")["checkpoint/unet/diffusion_pytorch_model.safetensors"] != before
    good(taught("--out", "run", "--overwrite"))
    assert "lora.safetensors" in contents("run") and not [name for name in contents("run") if name.startswith("checkpoint")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_learns_is_float32_and_its_memory_16_bytes_a_weight(tiny, dtype):
    sdxl = alchemy.load(tiny, "cpu", dtype)
    parameters = dreambooth.whole_unet(sdxl)
    assert {p.dtype for p in parameters.values()} == {torch.float32} and all(p.requires_grad for p in parameters.values())
    assert dreambooth.memory(parameters) == 16 * sum(p.numel() for p in sdxl.unet.parameters())
