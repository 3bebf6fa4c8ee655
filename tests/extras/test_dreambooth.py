"""train.py --method full: the whole UNet is trained, and the result is a checkpoint."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from helpers.running import call, contents, good, refused
from helpers.training import SIZE, draw, make_batch
from safetensors.torch import load_file

import alchemy
from alchemy import dataset, pipeline, training
from alchemy.dataset import EncodeEveryStep
from alchemy.methods import dreambooth
from alchemy.training import TrainState, denoising_loss

FULL = ("--method", "full", "--class-images", 2, "--class-folder", "class", "--steps", 3)
BARE = ("--method", "full", "--prior-weight", 0)
BOTH = ("--method", "full", "--text-encoders", "--steps", 3)
UNET = "checkpoint/unet/diffusion_pytorch_model.safetensors"
NETWORKS = (UNET, "checkpoint/text_encoder/model.safetensors")


def moved(after, before, name):
    """{key: whether the parameter has changed} of a network."""
    pairs = zip(after.network(name).named_parameters(), before.network(name).parameters())
    return {key: not torch.equal(p, q) for (key, p), q in pairs}


def test_the_result_is_a_checkpoint_in_which_every_unet_weight_moved(taught, tiny):
    run = good(taught(*FULL, "--out", "full"))
    assert f"full/{UNET}" in run.out
    after, before = alchemy.load("full/checkpoint", "cpu"), alchemy.load(tiny, "cpu")
    assert all(moved(after, before, "unet").values())
    for name in ("vae", "text_encoder", "text_encoder_2"):
        assert not any(moved(after, before, name).values())
    prompt = ("a photo of a sks dog", "--weights", "full/checkpoint")
    good(call("sample.py", *prompt, "--out", "sample.png"))


def test_full_needs_class_images_or_prior_weight_0_and_its_folder_is_replaced(taught):
    refused(taught("--method", "full", "--class-images", 0), "--class-images", "--prior-weight 0")
    good(taught(*BARE, "--out", "run"))
    before = contents("run")
    top = sorted({name.partition("/")[0] for name in before})
    assert top == ["checkpoint", "log.csv", "log.jsonl", "loss.png", "settings.json"]
    refused(taught("--out", "run"), "holds a run already")
    good(taught(*BARE, "--out", "run", "--overwrite", "--seed", 4))
    assert contents("run")[UNET] != before[UNET]
    good(taught("--out", "run", "--overwrite"))
    assert "lora.safetensors" in contents("run") and UNET not in contents("run")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trained_networks_are_float32(tiny, dtype):
    sdxl = alchemy.load(tiny, "cpu", dtype)
    for names in (("unet",), ("unet", *dreambooth.TEXT_ENCODERS)):
        parameters = dreambooth.train_whole(sdxl, names)
        assert {p.dtype for p in parameters.values()} == {torch.float32}
        assert all(p.requires_grad for p in parameters.values())
        count = sum(len(list(sdxl.network(name).parameters())) for name in names)
        assert len(parameters) == count


def test_autocast_is_used_where_the_weights_are_float32_and_nowhere_else(tiny):
    sdxl, seen = alchemy.load(tiny, "cpu", torch.bfloat16), []
    parameter = torch.nn.Parameter(torch.ones(2))
    for autocast in (True, False):
        state = TrainState.create({"p": parameter}, 1e-3)

        def get_loss(step, micro_step):
            seen.append(torch.is_autocast_enabled("cpu"))
            return parameter.sum()

        list(training.train(sdxl, state, get_loss, steps=1, autocast=autocast))
    assert seen == [True, False]


def test_a_state_of_another_method_is_refused_first(taught, tiny, stopped, monkeypatch):
    common = ("--class-word", "dog", "--weights", tiny, "--preview-every", 0, "--steps", 2)
    assert stopped(("train.py", "photos", *common, *BARE, "--out", "run")).status == 143
    monkeypatch.setattr(dataset, "encode_image", None)
    resume = ("train.py", "--out", "run", "--resume")
    refused(call(*resume, "--method", "lora"), "--method lora", "full", "--out")
    settings = json.loads(Path("run/settings.json").read_text())
    changed = settings | {"method": "lora", "rank": 2}
    Path("run/settings.json").write_text(json.dumps(changed))
    before = contents("run")
    words = ("run/state.safetensors", "another kind of run (full, not lora)", "--overwrite")
    refused(call(*resume), *words)
    assert contents("run") == before


def test_both_text_encoders_are_trained_as_far_as_they_are_used(taught, tiny):
    good(taught(*BOTH, "--class-images", 2, "--out", "full"))
    after, before = alchemy.load("full/checkpoint", "cpu"), alchemy.load(tiny, "cpu")
    for name in ("unet", *dreambooth.TEXT_ENCODERS):
        # The first encoder is used up to its penultimate layer, without the final norm.
        unmoved = {key for key, did in moved(after, before, name).items() if not did}
        if name == "text_encoder":
            assert unmoved
            unmoved = {k for k in unmoved if ".layers.1." not in k and "final_layer" not in k}
        assert not unmoved


def test_a_text_encoders_gradient_is_that_of_the_loss(tiny):
    sdxl = alchemy.load(tiny, "cpu", torch.float64)
    p = sdxl.text_encoders[1].text_model.encoder.layers[0].mlp.fc1.weight.requires_grad_(True)
    batch, prompts = make_batch(sdxl.schedule, 2), EncodeEveryStep(sdxl, SIZE)
    denoising_loss(sdxl, batch, prompts).mean().backward()
    direction, values = draw(*p.shape), []
    for sign in (1, -1):
        with torch.no_grad():
            p += sign * 1e-5 * direction
            values.append(denoising_loss(sdxl, batch, prompts).mean().item())
            p -= sign * 1e-5 * direction
    derivative = (p.grad * direction).sum().item()
    assert derivative == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)


def test_a_half_precision_run_writes_float16(taught):
    more = ("--prior-weight", 0, "--dtype", "bfloat16", "--steps", 1, "--preview-every", 1)
    good(taught(*BOTH, *more, "--out", "half"))
    for network in NETWORKS:
        dtypes = {tensor.dtype for tensor in load_file(f"half/{network}").values()}
        assert dtypes == {torch.float16}


def test_a_single_file_has_the_weights_of_the_folder(taught):
    good(taught(*BARE, "--out", "a/run"))
    run = good(taught(*BARE, "--out", "b/run.safetensors"))
    assert str(run.wrote[0]) == "b/run.safetensors" and "b/run/log.csv" in contents(".")
    file = ("b/run.safetensors", "cpu")
    folder = alchemy.load("a/run/checkpoint", "cpu")
    single = alchemy.load(*file, config="a/run/checkpoint")
    for name in ("unet", "vae", *dreambooth.TEXT_ENCODERS):
        assert not any(moved(single, folder, name).values())
    refused(taught(*BARE, "--out", "b/run.safetensors"), "b/run.safetensors holds a run already")
    refused(
        call("train.py", "--out", "b/run", "--resume"), "b/run.safetensors: this run is finished"
    )


def test_previews_of_full_run_the_unet_in_the_training_dtype(taught, monkeypatch):
    sample, seen = pipeline.sample, []

    def sampling(sdxl, *args, **options):
        def hook(module, inputs, output):
            seen.append(output.dtype)

        handle = sdxl.unet.conv_in.register_forward_hook(hook)
        try:
            return sample(sdxl, *args, **options)
        finally:
            handle.remove()

    monkeypatch.setattr(pipeline, "sample", sampling)
    good(taught(*BARE, "--dtype", "bfloat16", "--preview-every", 1, "--out", "run"))
    assert set(seen) == {torch.bfloat16}


def test_large_states_are_saved_on_request_and_at_the_end(taught, monkeypatch):
    save, saved = TrainState.save, []

    def saving(state, *args):
        saved.append(state.step)
        save(state, *args)

    monkeypatch.setattr(TrainState, "save", saving)
    good(taught(*BARE, "--steps", 4, "--out", "none"))
    good(taught(*BARE, "--steps", 4, "--save-every", 2, "--out", "some"))
    assert saved == [4, 0, 2, 4]


def test_a_breakdown_leaves_the_last_finite_weights(taught, monkeypatch):
    whole, calls = training.loss, itertools.count(1)

    def broken(*args):
        return whole(*args) * (float("nan") if next(calls) >= 3 else 1)

    monkeypatch.setattr(training, "loss", broken)
    words = ("not finite", "--resume continues from run/state.safetensors")
    refused(taught(*BARE, "--steps", 30, "--out", "run"), *words)
    state = load_file("run/state.safetensors")
    assert all(tensor.isfinite().all() for name, tensor in state.items() if name != "losses")
    assert state["losses"].isfinite().tolist() == [True] * 2 + [False] * 6
    monkeypatch.setattr(training, "loss", whole)
    good(call("train.py", "--out", "run", "--resume", "--steps", 8))


def test_a_preview_that_is_not_finite_blames_the_training(taught, monkeypatch):
    sample, images = pipeline.sample, []

    def broken(*args, **options):
        images.append(args)
        if len(images) <= 3:  # before the first step
            return sample(*args, **options)
        raise FloatingPointError("the latents became NaN or infinite: is a LoRA damaged?")

    monkeypatch.setattr(pipeline, "sample", broken)
    words = ("the preview at step 1", "--learning-rate", "--resume")
    assert "damaged" not in refused(taught("--preview-every", 1, "--out", "run"), *words)
