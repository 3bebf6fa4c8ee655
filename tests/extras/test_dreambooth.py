"""train.py --method full: all of the UNet learns, and what comes out is a checkpoint."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import alchemy
from alchemy import dataset, pipeline, sampling
from alchemy.command import lessons as lessons_of, training
from alchemy.methods import dreambooth
from alchemy.methods.textual_inversion import Live
from alchemy.training import denoising_loss
from helpers.checkpoints import vocabulary_read_once  # noqa: F401
from helpers.lessons import SIZE, batch, draw
from helpers.running import call, contents, good, photos, quick, refused, taught, tiny  # noqa: F401
from test_resume import stopped  # noqa: F401

FULL = ("--method", "full", "--class-pictures", 2, "--class-folder", "class", "--steps", 3)


def test_the_result_is_a_checkpoint_of_which_every_weight_of_the_unet_has_learned(taught, tiny):
    run = good(taught(*FULL, "--out", "full"))
    assert (
        "all of unet learns" in run.err
        and "full/checkpoint/unet/diffusion_pytorch_model.safetensors" in run.out
    )
    after, before = alchemy.load("full/checkpoint", "cpu"), alchemy.load(tiny, "cpu")
    moved = {
        name: not torch.equal(p, q)
        for (name, p), q in zip(after.unet.named_parameters(), before.unet.parameters())
    }
    assert all(moved.values()), [name for name, did in moved.items() if not did]
    for name in ("vae", "text_encoder", "text_encoder_2"):
        assert all(
            torch.equal(p, q)
            for p, q in zip(after.network(name).parameters(), before.network(name).parameters())
        )
    good(
        call(
            "sample.py",
            "a photo of a sks dog",
            "--weights",
            "full/checkpoint",
            "--out",
            "drawn.png",
        )
    )


def test_it_resumes_to_the_same_bits(taught, tiny, stopped):
    good(taught(*FULL, "--out", "whole"))
    flags = (
        "train.py",
        "photos",
        "--class-word",
        "dog",
        "--weights",
        tiny,
        "--preview-every",
        0,
        *FULL,
        "--out",
        "half",
    )
    assert stopped(flags, step=1).status == 143
    good(call("train.py", "--out", "half", "--resume"))
    one, two = (
        load_file(f"{name}/checkpoint/unet/diffusion_pytorch_model.safetensors")
        for name in ("whole", "half")
    )
    assert all(torch.equal(one[key], two[key]) for key in one)
    refused(call("train.py", "--out", "half", "--resume"), "finished")


def test_without_class_pictures_it_needs_to_be_told_that_there_is_no_prior(taught):
    refused(
        taught("--method", "full", "--class-pictures", 0), "--class-pictures", "--prior-weight 0"
    )
    good(taught("--method", "full", "--prior-weight", 0, "--out", "bare"))
    assert sorted({name.partition("/")[0] for name in contents("bare")}) == [
        "checkpoint",
        "loss.png",
        "settings.json",
    ]


def test_overwriting_replaces_the_checkpoint_and_a_lora_run_does_not_take_the_folder(taught):
    good(taught("--method", "full", "--prior-weight", 0, "--out", "run"))
    refused(taught("--out", "run"), "holds a run already")
    before = contents("run")["checkpoint/unet/diffusion_pytorch_model.safetensors"]
    good(
        taught("--method", "full", "--prior-weight", 0, "--out", "run", "--overwrite", "--seed", 4)
    )
    assert contents("run")["checkpoint/unet/diffusion_pytorch_model.safetensors"] != before
    good(taught("--out", "run", "--overwrite"))
    assert "lora.safetensors" in contents("run") and not [
        name for name in contents("run") if name.startswith("checkpoint")
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_learns_is_float32(tiny, dtype):
    sdxl = alchemy.load(tiny, "cpu", dtype)
    for names in (("unet",), ("unet", *dreambooth.TEXT_ENCODERS)):
        parameters = dreambooth.whole(sdxl, names)
        assert {p.dtype for p in parameters.values()} == {torch.float32} and all(
            p.requires_grad for p in parameters.values()
        )
        assert len(parameters) == sum(len(list(sdxl.network(name).parameters())) for name in names)


def test_a_state_of_another_method_is_refused_before_anything_is_computed(
    taught, tiny, stopped, monkeypatch
):
    flags = (
        "train.py",
        "photos",
        "--class-word",
        "dog",
        "--weights",
        tiny,
        "--preview-every",
        0,
        "--method",
        "full",
        "--prior-weight",
        0,
        "--out",
        "run",
    )
    assert stopped((*flags, "--steps", 2)).status == 143
    monkeypatch.setattr(dataset, "encode", None)
    refused(
        call("train.py", "--out", "run", "--resume", "--method", "lora"),
        "--method lora",
        "full",
        "--out",
    )
    settings = json.loads(Path("run/settings.json").read_text())  # or those are not the state's
    Path("run/settings.json").write_text(json.dumps(settings | {"method": "lora", "rank": 2}))
    before = contents("run")
    refused(
        call("train.py", "--out", "run", "--resume"),
        "run/state.safetensors",
        "another kind of run (--method full, not lora)",
        "--overwrite",
    )
    assert contents("run") == before


# The text encoders too

BOTH = ("--method", "full", "--text-encoders", "--steps", 3)


def test_both_text_encoders_learn_if_wanted_as_far_as_they_have_a_part(taught, tiny):
    run = good(taught(*BOTH, "--class-pictures", 2, "--out", "full"))
    assert "all of unet, text_encoder, text_encoder_2 learns" in run.err.splitlines()[0]
    after, before = alchemy.load("full/checkpoint", "cpu"), alchemy.load(tiny, "cpu")
    for name in ("unet", *dreambooth.TEXT_ENCODERS):
        moved = {
            key: not torch.equal(p, q)
            for (key, p), q in zip(
                after.network(name).named_parameters(), before.network(name).parameters()
            )
        }
        # What the first encoder is read from are the states before its last layer: of that and the norm behind it nothing is seen.
        unseen = {
            key
            for key in moved
            if name == "text_encoder" and (".layers.1." in key or "final_layer_norm" in key)
        }
        assert {key for key, did in moved.items() if not did} == unseen
    good(
        call(
            "sample.py",
            "a photo of a sks dog",
            "--weights",
            "full/checkpoint",
            "--out",
            "drawn.png",
        )
    )


def test_the_gradient_of_a_text_encoder_is_that_of_the_loss_with_the_prompt_encoded_in_it(tiny):
    sdxl = alchemy.load(tiny, "cpu", torch.float64)
    p = sdxl.text_encoders[1].text_model.encoder.layers[0].mlp.fc1.weight.requires_grad_(True)
    drawn, told = batch(2), Live(sdxl, SIZE)
    denoising_loss(sdxl, drawn, told).mean().backward()
    direction = draw(*p.shape)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            p += sign * 1e-5 * direction
            values.append(denoising_loss(sdxl, drawn, told).mean().item())
            p -= sign * 1e-5 * direction
    assert (p.grad * direction).sum().item() == pytest.approx(
        (values[0] - values[1]) / 2e-5, rel=1e-5
    )


def test_with_text_encoders_and_captions_too_it_resumes_to_the_same_bits(
    taught, tiny, stopped, tmp_path
):
    for k in range(3):
        (tmp_path / "photos" / f"{k}.txt").write_text(f"picture {k} of a dog")
    for name, teach in (
        ("subject", ("--class-word", "dog", "--class-pictures", 2, "--class-folder", "class")),
        ("captions", ("--captions",)),
    ):
        flags = ("train.py", "photos", *teach, "--weights", tiny, *BOTH, "--preview-every", 2)
        good(call(*flags, "--out", f"whole-{name}"))
        assert stopped((*flags, "--out", f"half-{name}"), step=1).status == 143
        good(call("train.py", "--out", f"half-{name}", "--resume"))
        for network in (
            "unet/diffusion_pytorch_model",
            "text_encoder/model",
            "text_encoder_2/model",
        ):
            one, two = (
                load_file(f"{half}-{name}/checkpoint/{network}.safetensors")
                for half in ("whole", "half")
            )
            assert all(torch.equal(one[key], two[key]) for key in one)


def test_trained_text_encoders_are_float16_in_the_checkpoint_of_a_half_precision_run(taught):
    good(taught(*BOTH, "--prior-weight", 0, "--dtype", "bfloat16", "--steps", 1, "--out", "half"))
    for network in ("unet/diffusion_pytorch_model", "text_encoder/model", "text_encoder_2/model"):
        assert {t.dtype for t in load_file(f"half/checkpoint/{network}.safetensors").values()} == {
            torch.float16
        }


def test_its_large_states_are_written_where_asked_for_at_an_interruption_and_at_the_end(
    taught, stopped, tiny, monkeypatch
):
    saved, whole = [], training.save_state
    monkeypatch.setattr(
        training, "save_state", lambda state, *args: saved.append(state.step) or whole(state, *args)
    )
    good(taught("--method", "full", "--prior-weight", 0, "--steps", 4, "--out", "none"))
    good(
        taught(
            "--method",
            "full",
            "--prior-weight",
            0,
            "--steps",
            4,
            "--save-every",
            2,
            "--out",
            "some",
        )
    )
    assert saved == [4, 0, 2, 4]


def test_when_it_breaks_down_the_last_finite_weights_are_on_disk(taught, monkeypatch):
    whole, calls = lessons_of.loss, itertools.count(1)
    monkeypatch.setattr(
        lessons_of, "loss", lambda *args: whole(*args) * (float("nan") if next(calls) >= 3 else 1)
    )
    flags = ("--method", "full", "--prior-weight", 0, "--out", "run")
    refused(
        taught(*flags, "--steps", 30), "not finite", "--resume goes on from run/state.safetensors"
    )
    state = load_file("run/state.safetensors")
    assert all(tensor.isfinite().all() for name, tensor in state.items() if name != "losses")
    assert state["losses"].isfinite().tolist() == [True] * 2 + [False] * 6
    monkeypatch.setattr(lessons_of, "loss", whole)
    good(call("train.py", "--out", "run", "--resume", "--steps", 8))


def test_a_preview_that_is_not_finite_blames_the_training(taught, monkeypatch):
    sample, drawn = pipeline.sample, []

    def broken(*args, **options):
        drawn.append(args)
        if len(drawn) <= 3:  # before the first step
            return sample(*args, **options)
        raise FloatingPointError(
            "the UNet's latents became NaN or infinite: is a LoRA damaged, or its scale too large?"
        )

    monkeypatch.setattr(pipeline, "sample", broken)
    line = refused(
        taught("--preview-every", 1, "--out", "run"),
        "the preview at step 1",
        "--learning-rate",
        "--resume",
    )
    assert "damaged" not in line
