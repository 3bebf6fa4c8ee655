"""DreamBooth's prior: class pictures that the model draws before it is taught, and the loss with them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import alchemy
from alchemy import dataset
from alchemy.formats import png
from alchemy.methods import prior
from alchemy.training import denoising_loss, min_snr
from helpers.checkpoints import refused, vocabulary_read_once  # noqa: F401
from helpers.lessons import PROMPTS, batch, model, parameters, told  # noqa: F401
from helpers.running import call, contents, good, quick, taught, tiny  # noqa: F401
from helpers.running import refused as run_refused
from test_resume import stopped  # noqa: F401


def class_batch(count, dtype=torch.float64):
    made = batch(3, dtype)
    part = {key: value[:count] for key, value in made.__dict__.items()}
    return type(made)(
        **part
        | {"x_0": part["x_0"] + 1, "eps": part["eps"].flip(-1), "prompts": [PROMPTS[1]] * count}
    )


def error_by_hand(sdxl, drawn, i, gamma):
    t = int(drawn.t[i])
    ab = float(sdxl.schedule.alpha_bar[t])
    told_i = told(sdxl)[drawn.prompts[i]]
    x_t = ab**0.5 * drawn.x_0[i : i + 1] + (1 - ab) ** 0.5 * drawn.eps[i : i + 1]
    snr = ab / (1 - ab)
    return (
        min(gamma, snr)
        / snr
        * (
            (
                sdxl.unet(x_t, t, told_i.context, told_i.pooled, drawn.time_ids[i : i + 1])
                - drawn.eps[i : i + 1]
            )
            ** 2
        ).mean()
    )


@pytest.mark.parametrize("subjects, pictures", [(1, 1), (3, 3), (2, 1), (1, 3)])
def test_the_loss_is_the_mean_of_each_term_whatever_the_batch_sizes(model, subjects, pictures):
    sdxl, one, other = model(torch.float64), batch(subjects), class_batch(pictures)
    ours = prior.loss(sdxl, one, other, told(sdxl), 0.3, 2.0)
    theirs = (
        sum(error_by_hand(sdxl, one, i, 2.0) for i in range(subjects)) / subjects
        + 0.3 * sum(error_by_hand(sdxl, other, i, 2.0) for i in range(pictures)) / pictures
    )
    assert abs((ours - theirs).item()) <= 1e-9 * theirs.item() and theirs.item() > 1e-3
    ps = list(parameters(sdxl).values())
    for a, b in zip(torch.autograd.grad(ours, ps), torch.autograd.grad(theirs, ps)):
        assert (a - b).norm() <= 1e-6 * b.norm()


def test_a_place_counts_by_its_weight_and_one_of_weight_0_not_at_all(model):
    sdxl, drawn = model(torch.float64), batch()
    half = torch.ones_like(drawn.weight)
    half[..., 4:] = 0
    masked = type(drawn)(**drawn.__dict__ | {"weight": half})
    x_t = sdxl.schedule.add_noise(drawn.x_0, drawn.eps, drawn.t)
    predicted = torch.cat(
        [
            sdxl.unet(
                x_t[i : i + 1],
                drawn.t[i : i + 1],
                *(p for p in told(sdxl)[PROMPTS[0]].parts()[:2]),
                drawn.time_ids[i : i + 1],
            )
            for i in range(3)
        ]
    )
    expected = min_snr(sdxl.schedule, drawn.t, 5.0) * (predicted - drawn.eps)[
        ..., :4
    ].square().mean((1, 2, 3))
    assert torch.allclose(denoising_loss(sdxl, masked, told(sdxl)), expected, rtol=1e-9)
    assert torch.allclose(
        denoising_loss(sdxl, type(drawn)(**masked.__dict__ | {"weight": 3 * half}), told(sdxl)),
        expected,
        rtol=1e-9,
    )


def drawn(sdxl, *args):
    """The paths of class pictures, of which those that are not there yet have been drawn."""
    pictures = prior.class_pictures(sdxl, *args)
    assert list(prior.draw(sdxl, missing := [p for p in pictures if not p[0].exists()])) == [
        path for path, _ in missing
    ]
    return [path for path, _ in pictures]


def test_class_pictures_are_the_models_own_by_their_seeds_and_are_not_drawn_twice(tiny, tmp_path):
    sdxl = alchemy.load(tiny, "cpu")
    first = drawn(sdxl, "a photo of a dog", tmp_path, 2)
    assert [p.name for p in first] == ["0000.png", "0001.png"] and png.facts_of(first[1])[
        "seed"
    ] == prior.FIRST_SEED + 1
    alone = alchemy.text_to_image(sdxl, "a photo of a dog", seed=prior.FIRST_SEED + 1)
    assert alone.tobytes() == alchemy.images.read(first[1]).tobytes()
    png.save(
        alchemy.images.read(first[1]), first[0], png.facts_of(first[0])
    )  # a picture that is there is used
    times = [p.stat().st_mtime_ns for p in first]
    assert len(drawn(sdxl, "a photo of a dog", tmp_path, 3)) == 3
    assert [p.stat().st_mtime_ns for p in first] == times
    refused(
        lambda: drawn(sdxl, "a photo of a cat", tmp_path, 3),
        "0000.png",
        "a photo of a dog",
        "another folder",
    )


def test_class_pictures_of_another_size_or_vae_are_refused_before_any_is_drawn(tiny, tmp_path):
    sdxl = alchemy.load(tiny, "cpu")
    drawn(sdxl, "a photo of a dog", tmp_path, 1, (32, 32))
    before = contents(tmp_path)
    refused(
        lambda: drawn(sdxl, "a photo of a dog", tmp_path, 2, (24, 32)),
        "0000.png",
        "size [32, 32], not [24, 32]",
        "another folder",
    )
    refused(
        lambda: drawn(sdxl, "a photo of a dog", tmp_path, 2, (32, 32), {"vae": "other"}),
        "vae None, not 'other'",
    )
    assert contents(tmp_path) == before


def test_the_class_prompt_is_encoded_once_and_no_text_encoder_is_kept_while_drawing(
    tiny, tmp_path, monkeypatch
):
    sdxl, calls, whole = alchemy.load(tiny, "cpu"), [], prior.pipeline.sample

    def draw(sdxl, *args, **options):
        calls.append(set(sdxl.loaded))
        return whole(sdxl, *args, **options)

    encode = type(sdxl).encode_prompt
    prompts = []
    monkeypatch.setattr(
        type(sdxl),
        "encode_prompt",
        lambda self, p, *rest, **more: prompts.extend(p) or encode(self, p, *rest, **more),
    )
    monkeypatch.setattr(prior.pipeline, "sample", draw)
    drawn(sdxl, "a photo of a dog", tmp_path, 3)
    assert (
        prompts == ["a photo of a dog", None]
        and len(calls) == 3
        and not {"text_encoder", "text_encoder_2"} & set().union(*calls)
    )


def test_train_draws_class_pictures_once_and_learns_from_them(taught):
    run = good(
        taught("--class-pictures", 2, "--out", "one", "--steps", 3, "--class-folder", "shared")
    )
    assert "by 2 pictures of it" in run.err and sorted(contents("shared")) == [
        "0000.png",
        "0001.png",
    ]
    written = [path.stat().st_mtime_ns for path in sorted(Path("shared").iterdir())]
    good(taught("--class-pictures", 2, "--out", "two", "--steps", 3, "--class-folder", "shared"))
    assert [
        path.stat().st_mtime_ns for path in sorted(Path("shared").iterdir())
    ] == written  # not drawn again
    good(taught("--out", "none", "--steps", 3))
    one, two, none = (load_file(f"{name}/lora.safetensors") for name in ("one", "two", "none"))
    assert all(torch.equal(one[key], two[key]) for key in one) and any(
        not torch.equal(one[key], none[key]) for key in one
    )


def test_a_run_with_class_pictures_resumes_to_the_same_bits(taught, stopped, tiny):
    flags = ("--class-pictures", 2, "--class-folder", "shared", "--steps", 4)
    good(taught(*flags, "--out", "whole"))
    assert (
        stopped(
            (
                "train.py",
                "photos",
                "--class-word",
                "dog",
                "--weights",
                tiny,
                "--rank",
                2,
                "--preview-every",
                0,
                *flags,
                "--out",
                "half",
            ),
            step=1,
        ).status
        == 143
    )
    good(call("train.py", "--out", "half", "--resume"))
    one, two = load_file("whole/lora.safetensors"), load_file("half/lora.safetensors")
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_class_pictures_of_another_word_are_refused_before_a_photo_is_encoded(taught, monkeypatch):
    good(taught("--class-pictures", 1, "--out", "run"))
    monkeypatch.setattr(dataset, "encode", lambda *args: pytest.fail("a photo was encoded"))
    run_refused(
        taught("--class-pictures", 1, "--out", "run", "--overwrite", "--class-word", "cat"),
        "run/class/0000.png",
        "a photo of a dog",
    )


def test_a_class_folder_that_cannot_be_is_named_by_its_flag_and_no_empty_out_stays(taught):
    run_refused(
        taught("--class-pictures", 1, "--class-folder", "/dev/null", "--out", "new/run"),
        "--class-folder /dev/null",
    )
    assert not Path("new").exists()


def test_an_interrupt_while_class_pictures_are_drawn_says_how_to_go_on(taught, monkeypatch):
    whole, drawn = prior.pipeline.sample, []

    def sample(*args, **options):
        if drawn:
            raise KeyboardInterrupt
        return drawn.append(1) or whole(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(prior.pipeline, "sample", sample)
        run = taught("--class-pictures", 2, "--out", "run")
    assert (
        run.status == 130
        and "the same command goes on" in run.err
        and sorted(contents("run")) == ["class/0000.png"]
    )
    good(taught("--class-pictures", 2, "--out", "run"))
