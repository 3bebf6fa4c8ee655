"""The pages of insert.py and train.py: what they show is what was done, and showing it changes nothing."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import alchemy
from alchemy import attention, images, sampling, lora
from alchemy.command import lessons
from alchemy.extras.inspect import page, placing, stage, teaching
from alchemy.extras.inspect.pictures import spread
from alchemy.extras.inspect.record import Recorder
from alchemy.training import denoising_loss
from helpers.checkpoints import vocabulary_read_once  # noqa: F401
from helpers.lessons import PROMPTS, batch, model, told  # noqa: F401
from helpers.running import (
    SCENE,
    call,
    contents,
    drawn,
    good,
    inserted,
    lora_file,
    nothing_written,
    picture,
    pixels,
    quick,
    refused,
    same,
    taught,
    tiny,
)  # noqa: F401
from test_inspect import data_of, unpacked


@pytest.fixture
def watched(tiny, lora_file):
    """watched(image=..., ...): (sdxl, the Watcher, the Insertion)."""

    def make(image=None, mask=None):
        sdxl = alchemy.load(tiny, "cpu", torch.float32)
        alchemy.load_lora(sdxl, lora_file)
        totals = [len(sdxl.schedule.timesteps(8, strength=s)) for s in (1.0, 0.5)]
        watcher = placing.Watcher(
            sdxl, SCENE, "dog", "sks", totals, image=image, mask=mask, size=sdxl.size, full=True
        )
        made = alchemy.insert(
            sdxl,
            SCENE,
            "dog",
            "sks",
            image=image,
            mask=mask,
            steps=8,
            strength=0.5,
            seed=2,
            progress=watcher.follow,
        )
        return sdxl, watcher, made

    return make


# insert.py


@pytest.mark.parametrize("image", [None, picture(40, 60)])
def test_the_stages_of_the_mask_end_in_the_very_mask_that_was_used(watched, image):
    sdxl, watcher, made = watched(image)
    shown = {
        name: m for name, _, m in placing.mask_stages(watcher, made, sdxl.defaults["threshold"])
    }
    assert (
        " ".join(shown)
        == "cross-attention times self-attention enlarged edge-aware thresholded cleaned grown feathered"
    )
    assert torch.equal(shown["edge-aware"], made.soft)
    assert torch.equal(shown["thresholded"], (made.soft >= sdxl.defaults["threshold"]).float())
    assert torch.equal(shown["grown"], made.mask) and torch.equal(
        shown["feathered"], made.feathered
    )
    assert (
        not torch.equal(shown["cross-attention"], shown["times self-attention"])
        and (shown["cleaned"] <= made.mask).all()
    )


def test_watching_an_insertion_changes_no_bit_of_it(watched, tiny, lora_file):
    sdxl, watcher, made = watched()
    plain = alchemy.load(tiny, "cpu", torch.float32)
    alchemy.load_lora(plain, lora_file)
    expected = alchemy.insert(plain, SCENE, "dog", "sks", steps=8, strength=0.5, seed=2)
    assert all(
        same(np.asarray(getattr(made, name)), np.asarray(getattr(expected, name)))
        for name in ("scene", "result", "generated")
    )
    assert torch.equal(made.soft, expected.soft)
    first, second = (recorder for _, recorder in watcher.stages)
    assert (len(first.steps), len(second.steps)) == (8, 4) and second.focus == first.focus + 1 == 6


def test_outside_the_latent_mask_the_known_scene_is_put_back(watched, close):
    mask = torch.zeros(32, 32)
    mask[9:19, 4:21] = 1
    sdxl, watcher, made = watched(picture(32, 32), mask)
    ((_, recorder),) = watcher.stages
    m = placing.latent_mask(made, sdxl.vae_scale_factor)
    assert (
        m.shape == (8, 8) and (m == 1).sum() == 3 * 5
    )  # rows 2-4, columns 1-5: each cell that the mask touches
    known, noise = sdxl.vae.encode(images.to_tensor(made.crop))[0], alchemy.noise((1, 4, 8, 8), [3])
    for numbers, x in zip(recorder.steps, recorder.stacked("x_prev")):
        ab = numbers["alpha_bar_prev"] if numbers["t_prev"] is not None else 1.0
        close((x * (1 - m)), ((ab**0.5 * known + (1 - ab) ** 0.5 * noise)[0] * (1 - m)), 1e-6)


def test_the_difference_is_zero_outside_the_mask_and_is_seen_where_it_is_not(watched):
    _, _, made = watched()
    changed, outside = placing.difference(made)
    expected = np.abs(np.asarray(made.result, dtype=int) - np.asarray(made.scene, dtype=int)).max(2)
    assert (changed == expected).all() and changed.max() > 0 and outside == 0
    spoiled = np.asarray(made.result).copy()
    y, x = np.argwhere(made.feathered.numpy() == 0)[0]
    spoiled[y, x, 1] ^= 64
    assert placing.difference(dataclasses.replace(made, result=Image.fromarray(spoiled)))[1] == 64


def test_insert_writes_the_page_of_both_stages(inserted):
    run = good(inserted("--steps", 8, "--seed", 2, "--inspect", "page", "--inspect-full"))
    names = [
        "index.html",
        "overview.png",
        "stage-1.png",
        "stage-1.safetensors",
        "stage-2.png",
        "stage-2.safetensors",
    ]
    assert sorted(contents("page")) == names and run.wrote[-1].as_posix() == "page/index.html"
    data = data_of(contents("page")["index.html"].decode())
    assert [s["prompt"] for s in data["stages"]] == [
        SCENE,
        SCENE.replace("dog", "sks dog"),
    ] and data["insertion"]["outside"] == 0
    assert same(
        unpacked(data["insertion"]["mask"][6]["film"])[0], pixels("out/insert/mask.png")[:, :, 0]
    )
    # Of the same noise level, both stages have the same timesteps: the second are the last of the first.
    first, second = ([step["t"] for step in s["steps"]] for s in data["stages"])
    assert second == first[-len(second) :] and len(second) < len(first)


# train.py


def test_how_far_a_layer_has_moved_is_the_norm_of_its_change_over_its_weights(model, close):
    sdxl = model()
    watcher = teaching.Watcher(sdxl, lambda t: t / 7, 10)
    assert list(watcher.follow([(step, 0.5) for step in range(1, 11)]))[-1] == (10, 0.5)
    assert watcher.moments == list(range(11)) and list(watcher.by_t) == [0, 2, 5, 8, 10]
    assert watcher.by_t[5] == [t / 7 for t in watcher.timesteps] and watcher.timesteps[:2] == [
        41,
        125,
    ]
    for name, layer in lora.attention_layers(sdxl.unet).items():
        a = layer.lora["default"]
        expected = (3.0 / 2 * a.up.double() @ a.down.double()).norm() / layer.weight.double().norm()
        close(torch.tensor(watcher.norms[name][3]), expected, 1e-5)
    blocks = teaching.network(watcher.norms)
    parts = [block.split(".")[0] for block, _ in blocks]
    assert parts == sorted(parts, key=["down_blocks", "mid_block", "up_blocks"].index)
    assert all(
        list(rows) == [f"attn{n}.to_{p}" for n in (1, 2) for p in ("q", "k", "v", "out")]
        for _, rows in blocks
    )
    assert sum(len(rows) for _, rows in blocks) == len(watcher.norms)


def test_the_error_at_a_timestep_is_the_plain_one_of_the_same_batch_at_it(model, close):
    sdxl, given = model(), batch(dtype=torch.float32)
    error_at, prompts = lessons.at_timestep(sdxl, lambda step, part: given, told(sdxl)), told(sdxl)
    for t in (5, 700):
        x_t = sdxl.schedule.add_noise(given.x_0, given.eps, torch.full((3,), t))
        context, pooled = (
            part.expand(3, *part.shape[1:]) for part in prompts[PROMPTS[0]].parts()[:2]
        )
        with torch.no_grad():
            prediction = sdxl.unet(x_t, torch.full((3,), t), context, pooled, given.time_ids)
            close(torch.tensor(error_at(t)), (prediction - given.eps).square().mean(), 1e-5)
    assert (
        abs(error_at(5) - float(denoising_loss(sdxl, given, prompts, 0).mean().detach())) > 1e-4
    )  # not at the batch's own timesteps


def test_the_running_mean_leaves_out_what_is_no_number():
    means = teaching.running_mean([float("nan"), 2.0, 4.0, float("nan"), 1.0])
    assert (
        means[0] is None
        and means[1] == 2
        and means[2] == means[3] == pytest.approx((0.95 * 2 + 4) / 1.95, rel=1e-12)
    )
    assert means[4] == pytest.approx((0.95 * (0.95 * 2 + 4) + 1) / (0.95 * 1.95 + 1), rel=1e-12)


def test_train_writes_its_page_and_learns_the_same_to_the_bit(taught):
    good(taught("--out", "plain/run", "--steps", 3))
    run = good(
        taught(
            "--out",
            "seen/run",
            "--steps",
            3,
            "--inspect",
            "page",
            "--inspect-full",
            "--preview-every",
            2,
        )
    )
    assert contents("plain/run")["lora.safetensors"] == contents("seen/run")["lora.safetensors"]
    assert "inspect" not in contents("seen/run")["settings.json"].decode()
    assert sorted(contents("page")) == ["index.html", "overview.png", "training.safetensors"]
    assert run.wrote[-1].as_posix() == "page/index.html"
    made, arrays = (
        data_of(contents("page")["index.html"].decode())["training"],
        load_file("page/training.safetensors"),
    )
    assert made["moments"] == [step for step, _ in made["by_t"]] == [0, 1, 2, 3] and [
        step for step, _ in made["previews"]
    ] == [0, 2, 3]
    assert len(made["losses"]) == len(arrays["losses"]) == 3 and all(
        math.isfinite(x) for x in made["losses"]
    )
    norms = [rows["attn2.to_v"] for _, rows in made["network"]]
    assert all(row[0] == 0 < row[1] for row in norms)  # a fresh LoRA has moved nothing


def test_a_page_without_a_lora_has_no_heat_map(taught):
    good(taught("--method", "textual-inversion", "--inspect", "page"))
    made = data_of(contents("page")["index.html"].decode())["training"]
    assert made["network"] == [] and len(made["by_t"]) == 2 and spread(2, 5) == [0, 1]


# What a page's folder is, and what a page survives


def test_a_page_takes_only_a_new_or_empty_folder_and_not_that_of_the_pictures(drawn, tiny):
    run = good(drawn("--out", "clash/steps.png", "--inspect", "clash"))
    assert [p.as_posix() for p in run.wrote] == [
        "clash/steps.png",
        "clash-1/steps.png",
        "clash-1/index.html",
    ]
    before = contents("clash") | contents("clash-1")
    run = good(drawn("--out", "b.png", "--inspect", "clash", "--count", 2))
    assert sorted(contents("clash-2")) == [
        f"b-{seed}/{name}" for seed in (0, 1) for name in ("index.html", "steps.png")
    ]
    assert (
        alchemy.inspect(alchemy.load(tiny, "cpu"), "a dog", "clash", steps=1)[1][-1].as_posix()
        == "clash-3/index.html"
    )
    assert contents("clash") | contents("clash-1") == before
    refused(drawn("--inspect", "b-0.png"), "--inspect 'b-0.png' is no folder")
    refused(drawn("--inspect", ""), "--inspect '' is no folder")


@pytest.mark.parametrize("folder", ["/proc/foo", "/dev/null/page", "x" * 300])
def test_a_place_for_the_page_that_cannot_be_written_is_refused_before_anything_is_drawn(
    drawn, inserted, taught, folder
):
    for run in (
        drawn("--inspect", folder),
        inserted("--inspect", folder),
        taught("--inspect", folder, "--out", "run"),
    ):
        assert (
            "loss"
            not in refused(run, f"--inspect {folder}: cannot write there", "name another folder")
            and "stage" not in run.err
        )
    assert nothing_written()


def test_of_a_list_that_goes_on_each_picture_has_a_folder_of_its_own_and_none_where_nothing_is_drawn(
    tiny, tmp_path
):
    (tmp_path / "prompts.txt").write_text("a dog\na cat\n")
    listed = ("--prompts", "prompts.txt", "--weights", tiny, "--out", "set")
    good(call("sample.py", *listed))
    (tmp_path / "set/00001.png").unlink()
    good(call("sample.py", *listed, "--inspect", "page"))
    assert sorted(contents("page")) == ["00001/index.html", "00001/steps.png"]
    run = good(call("sample.py", *listed, "--inspect", "none"))
    assert "there is no page" in run.err and not (tmp_path / "none").exists()


def test_a_run_that_diverges_has_a_page_too(drawn, tiny, close):
    good(drawn("--guidance", 200000, "--out", "a.png", "--inspect", "page"))
    (shown,) = data_of(contents("page")["index.html"].decode())["stages"]
    assert all(step["std"]["x_0"] > 1e3 for step in shown["steps"])
    recorder = Recorder(alchemy.load(tiny, "cpu"), "a dog", 2)
    latents = torch.stack([torch.full((4, 8, 8), float("nan")), torch.full((4, 8, 8), 0.5)])[
        :, None
    ]
    for index, x in enumerate(latents):
        recorder.take(sampling.Step(index, 2 - index, 1 - index, 0.5, 0.6, *[x] * 6))
    *_, written = page.write("nan", "a dog", [("", recorder, picture(32, 32))], {"seed": 0})
    (shown,) = data_of(written.read_text())["stages"]
    assert shown["steps"][0]["std"] == {"eps": None, "x_0": None} and shown["steps"][1]["std"] == {
        "eps": 0,
        "x_0": 0,
    }
    assert (unpacked(shown["films"]["x_0"])[0] == 0).all() and (
        unpacked(shown["films"]["x_0"])[1] > 0
    ).any()


def test_a_hook_and_a_bar_may_go_with_the_call_and_the_facts_name_the_negative_prompt(tiny):
    sdxl, seen = alchemy.load(tiny, "cpu", torch.float32), []
    made, paths = alchemy.inspect(
        sdxl,
        "a dog",
        "page",
        steps=2,
        negative_prompt="a cat",
        hook=lambda step: step.x_prev * 0.5,
        progress=lambda steps: (seen.append(step.index) or step for step in steps),
    )
    assert same(
        np.asarray(made),
        np.asarray(
            alchemy.text_to_image(
                sdxl, "a dog", steps=2, negative_prompt="a cat", hook=lambda step: step.x_prev * 0.5
            )
        ),
    ) and seen == [0, 1]
    assert data_of(paths[-1].read_text())["facts"]["negative_prompt"] == "a cat"
    with pytest.raises(TypeError, match="strength"):
        alchemy.inspect(sdxl, "a dog", "page", strength=0.5)


def test_a_tokens_share_of_all_attention_counts_each_layer_once(tiny):
    recorder = Recorder(alchemy.load(tiny, "cpu"), "a dog", 1)
    coarse, fine = torch.full((4, 4), 0.5), torch.full((16, 4), 0.25)
    recorder.seen = {("attn2", 16): (fine, 1), ("attn2", 4): (3 * coarse, 3)}
    recorder.take(sampling.Step(0, 1, None, 0.5, 1.0, *[torch.zeros(1, 4, 8, 8)] * 6))
    assert stage.mass(recorder).tolist() == [[(0.25 + 3 * 0.5) / 4] * 4]


def test_self_attention_is_looked_at_from_the_first_step_on_of_both_stages(inserted):
    good(inserted("--steps", 8, "--seed", 2, "--strength", 0.2, "--inspect", "page"))
    first, second = data_of(contents("page")["index.html"].decode())["stages"]
    assert (
        first["own"]["4 × 4"]["at"] == [0, 2, 4, 5, 7]
        and len(second["steps"]) == 1
        and second["own"]["4 × 4"]["at"] == [0]
    )


def test_a_recorder_leaves_no_hook_and_no_watcher_behind(tiny):
    sdxl = alchemy.load(tiny, "cpu", torch.float32)
    recorder = Recorder(sdxl, "a dog", 2)
    noise = alchemy.noise((1, 4, 9, 6), [0])  # latents of a size of their own
    assert (
        len(
            list(
                recorder.follow(
                    alchemy.denoise(sdxl, noise, sdxl.encode_prompt(["a dog"]), steps=2, guidance=1)
                )
            )
        )
        == 2
    )
    assert not sdxl.unet._forward_pre_hooks and all(
        layer.callbacks == () for layer in attention.attentions(sdxl.unet).values()
    )
    assert recorder.size == (9, 6) and [list(own) for own in recorder.own.values()] == [[15, 6]] * 2
