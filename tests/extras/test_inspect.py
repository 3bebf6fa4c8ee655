"""Recorders and their pages: what they show is what was computed, and recording changes nothing."""

import dataclasses
import json
import math
import operator
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.pages import HOSTILE, cut_frames, page_data, random
from helpers.running import (
    SCENE,
    contents,
    good,
    nothing_written,
    picture,
    pixels,
    process,
    refused,
    same,
)
from PIL import Image
from safetensors.torch import load_file

import alchemy
from alchemy import attention, lora, pipeline, sampling
from alchemy.extras.inspect import insertion_page, page, sheets, stage, training_page
from alchemy.extras.inspect.record import QUANTITIES, Recorder
from alchemy.extras.inspect.sprites import (
    even_indices,
    fit_colors,
    preview,
    sprite_sheet,
    to_uint8,
)
from alchemy.formats import png

PAGE_FILES = ("index.html", "steps.safetensors")


def read_page(folder):
    return page_data((folder / "index.html").read_text(encoding="utf-8"))


@pytest.fixture
def recorded(tiny):
    """recorded(steps, ...): (recorder, Steps, {(step, layer): probabilities}, image)."""

    def make(prompt="a dog on a beach", steps=4, full=False, **options):
        sdxl, seen, kept, pending = alchemy.load(tiny, "cpu", torch.float32), {}, [], []
        recorder, names = Recorder(sdxl, prompt, steps, full=full, **options), None
        names = list(attention.attentions(sdxl.unet))

        def follow(run):
            with attention.record_attention(sdxl.unet, names, lambda *call: pending.append(call)):
                for step in recorder.follow(run):
                    seen.update({(step.index, name): p for name, p in pending})
                    pending.clear()
                    kept.append(dataclasses.replace(step))
                    yield step

        image = pipeline.text_to_image(sdxl, prompt, progress=follow, steps=steps, **options)
        return recorder, kept, seen, image

    return make


# The recorder


def test_every_quantity_of_every_step_is_recorded(recorded, close):
    recorder, steps, _, _ = recorded(full=True)
    assert [s["t"] for s in recorder.steps] == [step.t for step in steps] and len(steps) == 4
    for name in QUANTITIES:
        expected = torch.cat([getattr(step, name) for step in steps])
        assert torch.equal(recorder.stacked(name), expected), name
    half = recorded()[0]
    assert half.latents["x_t"][0].dtype == torch.float16
    close(half.stacked("x_0"), recorder.stacked("x_0"), 1e-3)


@pytest.mark.parametrize(
    "sampler, eta, noisy",
    [("euler", None, False), ("ddpm", None, True), ("ddim", 0.5, True), ("lcm", None, True)],
)
def test_the_recorded_sigma_is_the_deviation_of_the_new_noise(recorded, sampler, eta, noisy):
    recorder, steps, _, _ = recorded(full=True, sampler=sampler, eta=eta)
    for numbers, step in zip(recorder.steps[:-1], steps[:-1], strict=True):
        sigma, ab = numbers["sigma"], step.alpha_bar_prev
        x_0 = step.x_0
        if sampler == "lcm":
            c = 400 * step.t * step.t + 1
            x_0 = step.x_t / c + 20 * step.t / c**0.5 * x_0
        rest = step.x_prev - ab**0.5 * x_0 - max(1 - ab - sigma**2, 0) ** 0.5 * step.eps
        assert (sigma > 0) == noisy
        assert abs(float(rest.std()) - sigma) <= 0.12 * sigma + 1e-5


def test_recorded_attention_is_the_cond_mean_over_heads_and_layers(recorded, close):
    recorder, steps, seen, _ = recorded()

    def mean(k, kind, positions, row):
        maps = []
        for (index, name), p in seen.items():
            if index == k and name.endswith(kind) and p.shape[2] == positions:
                maps.append(p[row].mean(0))
        return torch.stack(maps).mean(0)

    assert recorder.num_tokens == 5 + 2 and list(recorder.self_attention) == [0, 1, 2, 3]
    for k in range(len(steps)):
        for n, kept in recorder.cross[k].items():
            uncond, cond = (mean(k, "attn2", n, row) for row in (0, 1))
            close(kept.float(), cond[:, : recorder.num_tokens], 1e-3)
            assert (uncond - cond).abs().max() > 0.001
        for n, kept in recorder.self_attention[k].items():
            p = mean(k, "attn1", n, 1)
            assert (kept.float() - 255 * p / p.amax(1, keepdim=True)).abs().max() <= 0.501


def test_recording_changes_no_bit_and_leaves_no_hook(recorded, tiny):
    recorder, _, _, image = recorded()
    plain = alchemy.text_to_image(alchemy.load(tiny, "cpu"), "a dog on a beach", steps=4)
    assert same(np.asarray(image), np.asarray(plain))
    unet = recorder.sdxl.unet
    assert not unet._forward_pre_hooks
    assert all(not layer.callbacks for layer in attention.attentions(unet).values())


def test_of_a_long_run_100_steps_are_recorded_with_first_and_last(recorded):
    assert even_indices(5, 100) == [0, 1, 2, 3, 4]
    assert even_indices(1, 5) == [0] and even_indices(0, 5) == []
    kept = even_indices(1000, 100)
    assert len(kept) == 100 and kept[0] == 0 and kept[-1] == 999 and max(np.diff(kept)) == 11
    recorder, _, _, _ = recorded(steps=130, guidance=1)
    assert [s["index"] for s in recorder.steps] == even_indices(130, 100)
    shown = stage.frames(recorder, torch.eye(5, 3, dtype=torch.float64))
    assert len(shown["x_prev"]) == len(shown["x_t"]) == len(recorder.cross) == 100
    assert "guidance" not in shown


def test_levels_are_found_by_their_number_of_positions_for_odd_sides(tiny):
    sdxl = alchemy.load(tiny, "cpu", torch.float32)
    recorder = Recorder(sdxl, "a dog", 2)
    conditioning = sdxl.encode_prompt(["a dog"])
    steps = alchemy.denoise(sdxl, alchemy.noise((1, 4, 9, 6), [0]), conditioning, steps=2)
    assert len(list(recorder.follow(steps))) == 2 and recorder.latent_size == (9, 6)
    assert [list(levels) for levels in recorder.self_attention.values()] == [[15, 6]] * 2
    recorder.latent_size = (9, 14)
    assert [recorder.level_shape(n) for n in (126, 35, 12)] == [(9, 14), (5, 7), (3, 4)]


def test_a_tokens_share_counts_each_layer_once(tiny):
    recorder = Recorder(alchemy.load(tiny, "cpu"), "a dog", 1)
    coarse, fine = torch.full((4, 4), 0.5), torch.full((16, 4), 0.25)
    recorder.sums = {("attn2", 16): (fine, 1), ("attn2", 4): (3 * coarse, 3)}
    recorder.add(sampling.Step(0, 1, None, 0.5, 1.0, *[torch.zeros(1, 4, 8, 8)] * 6))
    assert stage.attention_share(recorder).tolist() == [[(0.25 + 3 * 0.5) / 4] * 4]


# Sprites and maps


def test_fit_colors_recovers_a_linear_map_and_preview_applies_it(close):
    colors = random(5, 3, seed=1).double() / 4
    latents = [random(4, 6, 8), random(4, 5, 5, seed=2)]
    small, pairs = [], []
    for x in latents:
        rgb = torch.einsum("chw,cd->dhw", x.double(), colors[:4]) + colors[4].view(3, 1, 1)
        small.append(rgb)
        pairs.append((x, F.interpolate(rgb[None], scale_factor=4, mode="nearest")[0]))
    found = fit_colors([*pairs, (torch.full((4, 2, 2), float("nan")), torch.zeros(3, 4, 4))])
    close(found, colors, 1e-9)
    expected = ((small[0].clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    assert same(preview(latents[0][None], found)[0], expected)


def test_sprite_sheets_hold_every_frame_bit_for_bit():
    for shape in ((7, 5, 9), (30, 16, 16, 3), (1, 3, 4)):
        frames = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        assert same(cut_frames(sprite_sheet(frames)), frames)
    values = torch.tensor([-1.0, 0, 0.5, 1, 9, float("nan")])
    assert to_uint8(values, 0, 1).tolist() == [0, 0, 128, 255, 255, 0]


def test_uncond_and_cond_are_shown_as_the_x_0_that_each_implies(recorded):
    recorder, steps, _, _ = recorded(full=True)
    colors = random(5, 3, seed=1).double() / 4
    shown, schedule = stage.frames(recorder, colors), recorder.sdxl.schedule
    for k, step in enumerate(steps):
        for name in ("uncond", "cond"):
            eps = getattr(step, f"eps_{name}")
            x_0, _ = schedule.to_x0_eps(eps, step.x_t, step.alpha_bar)
            off = shown[f"x_0_{name}"][k].astype(int) - preview(x_0, colors)[0]
            assert abs(off).max() <= 1
    every_x = torch.cat([recorder.stacked("x_t"), steps[-1].x_prev])
    assert "x_prev" not in shown and same(shown["x_t"], preview(every_x, colors))


def test_level_all_is_the_mean_of_the_levels_each_over_its_own_mean(recorded, close):
    levels = stage.attention_levels(recorded()[0])
    assert list(levels) == ["4 × 4", "2 × 2", "all"]
    fine, coarse = (x / x.mean((2, 3), keepdim=True) for x in list(levels.values())[:2])
    coarse = F.interpolate(coarse, (4, 4), mode="bilinear", align_corners=False)
    close(levels["all"], (fine + coarse) / 2, 1e-6)


@pytest.mark.parametrize("tokens, steps", [(26, 30), (27, 29), (77, 10)])
def test_maps_of_many_tokens_skip_steps_and_end_in_the_mean_of_all(tokens, steps):
    level = random(30, tokens, 4, 4).sigmoid()
    made = stage.token_sprites(level)
    assert len(made["at"]) == steps and made["at"][0] == 0 and made["at"][-1] == 29
    for token in (0, tokens - 1):
        low, high = made["range"][token]
        expected = torch.cat([level[made["at"], token], level[:, token].mean(0, keepdim=True)])
        expected = 255 * ((expected - low) / (high - low)).clamp(0, 1).numpy()
        assert abs(cut_frames(made["sprites"][token]) - expected).max() <= 0.501


def test_the_running_mean_skips_nan_and_has_no_startup_bias():
    means = sheets.running_mean([float("nan"), 2.0, 4.0, float("nan"), 1.0])
    weight, total = 0.95 + 1, 0.95 * 2 + 4
    assert means[:2] == [None, 2]
    assert means[2] == means[3] == pytest.approx(total / weight, rel=1e-12)
    assert means[4] == pytest.approx((0.95 * total + 1) / (0.95 * weight + 1), rel=1e-12)


# The page of an image


def test_inspect_generates_the_same_image_and_writes_page_and_arrays(tiny, tmp_path):
    sdxl = alchemy.load(tiny, "cpu", torch.float32)
    options = dict(steps=3, seed=5, negative_prompt="a cat", hook=lambda step: 0.9 * step.x_prev)
    image, paths = alchemy.inspect(sdxl, HOSTILE, tmp_path / "page", full=True, **options)
    assert [path.name for path in paths] == ["steps.safetensors", "index.html"]
    assert same(np.asarray(image), np.asarray(alchemy.text_to_image(sdxl, HOSTILE, **options)))
    arrays = load_file(paths[0])
    cond, uncond = sdxl.encode_prompt([HOSTILE]), sdxl.encode_prompt(["a cat"])
    noise = alchemy.noise((1, 4, 8, 8), [5])
    run = alchemy.denoise(sdxl, noise, cond, uncond, steps=3, hook=options["hook"])
    for k, step in enumerate(run):
        assert torch.equal(arrays["x_0"][k], step.x_0[0])
        assert torch.equal(arrays["eps_uncond"][k], step.eps_uncond[0])
    assert arrays["self_attention.16.step_1"].shape == (16, 16)
    assert arrays["alpha_bar"].dtype == torch.float64
    # A prompt cannot break out of the page, which loads nothing from the network.
    text = paths[-1].read_text(encoding="utf-8")
    assert text.count("</script") == 2 and "<script>alert" not in text and "{{" not in text
    assert "default-src 'none'" in text
    (shown,) = page_data(text)["stages"]
    assert shown["prompt"] == HOSTILE and shown["modifier"] == "hook"
    for tokenizer, split in zip(sdxl.tokenizers, shown["tokens"], strict=True):
        start = [tokenizer(HOSTILE)[0], "start"]
        tokens = map(list, tokenizer.tokens(HOSTILE))
        assert split["tokens"] == [start, *tokens, [49407, "end"]]
    # The folder is not empty any more: the next one is taken.
    again = alchemy.inspect(sdxl, "a dog", tmp_path / "page", steps=1)[1]
    assert again[-1] == tmp_path / "page-1/index.html"


def test_a_diverged_run_has_a_page(tiny, tmp_path):
    recorder = Recorder(alchemy.load(tiny, "cpu"), "a dog", 3)
    for index, value in enumerate((float("nan"), 0.5, 1e6)):
        latents = [torch.full((1, 4, 8, 8), value)] * 6
        recorder.add(sampling.Step(index, 3 - index, 2 - index, 0.5, 0.6, *latents))
    page.write_page(tmp_path / "nan", "a dog", [("", recorder, picture(32, 32))], {"seed": 0})
    (shown,) = read_page(tmp_path / "nan")["stages"]
    deviations = [step["std"] for step in shown["steps"]]
    assert deviations == [{"eps": None, "x_0": None}, {"eps": 0, "x_0": 0}, {"eps": 0, "x_0": 0}]
    frames = cut_frames(shown["sprites"]["x_0"])
    assert (frames[0] == 0).all() and (frames[1] > 0).any()


def test_sample_writes_one_page_per_image_in_a_folder_of_its_own(drawn, tmp_path):
    run = good(drawn("--inspect", "page", "--out", "a.png"))
    assert list(contents("page")) == ["index.html"]
    good(drawn("--out", "b.png"))
    assert same(pixels("a.png"), pixels("b.png"))
    assert png.read_metadata("a.png") == png.read_metadata("b.png")
    before = contents("page")
    good(drawn("--inspect", "page", "--inspect-full", "--count", 2))
    expected = [f"{name}/{file}" for name, file in product(("0000", "0001"), PAGE_FILES)]
    assert contents("page") == before and sorted(contents("page-1")) == expected
    run = good(drawn("--out", "clash/image.png", "--inspect", "clash"))
    assert "clash-1/index.html" in run.out


def test_without_inspect_the_recorder_is_not_imported(tiny):
    listing = "import atexit; atexit.register(lambda: print(*sys.modules, file=sys.stderr))"
    command = ("sample.py", "a dog", "--weights", tiny, "--steps", 2)
    assert "alchemy.extras.inspect" not in good(process(*command, before=listing)).err
    run = good(process(*command, "--inspect", "page", before=listing))
    assert "alchemy.extras.inspect.record" in run.err


@pytest.mark.parametrize("folder", ["/proc/foo", "/dev/null/page", "x" * 300, "file.png", ""])
def test_a_bad_folder_is_an_error_before_anything_is_computed(drawn, inserted, taught, folder):
    picture(8, 8).save("file.png")
    runs = (drawn("--inspect", folder), inserted("--inspect", folder))
    for run in (*runs, taught("--inspect", folder, "--out", "run")):
        message = refused(run, f"--inspect {folder}" if len(folder) > 8 else "--inspect")
        assert "name" in message and "stage" not in run.err
    assert nothing_written()


# The page of insert.py


@pytest.fixture
def watched(tiny, lora_file):
    """watched(image=..., mask=...): (sdxl, recorder, Insertion)."""

    def make(image=None, mask=None):
        sdxl = alchemy.load(tiny, "cpu", torch.float32)
        alchemy.load_lora(sdxl, lora_file)
        totals = [len(sdxl.schedule.timesteps(8, strength=s)) for s in (1.0, 0.5)]
        given = dict(image=image, mask=mask)
        recorder = insertion_page.InsertionRecorder(
            sdxl, SCENE, "dog", "sks", totals, full=True, **given
        )
        options = dict(steps=8, strength=0.5, seed=2, progress=recorder.follow)
        return sdxl, recorder, alchemy.insert(sdxl, SCENE, "dog", "sks", **given, **options)

    return make


@pytest.mark.parametrize("image", [None, picture(40, 60)])
def test_the_steps_of_the_mask_end_in_the_mask_that_was_used(watched, image):
    sdxl, recorder, made = watched(image)
    threshold = sdxl.defaults["threshold"]
    steps = insertion_page.mask_steps(recorder, made, threshold)
    shown = {name: m for name, _, m in steps}
    assert torch.equal(shown["guided filter"], made.soft)
    assert torch.equal(shown["thresholded"], (made.soft >= threshold).float())
    assert torch.equal(shown["dilated"], made.mask)
    assert torch.equal(shown["feathered"], made.feathered)
    assert not torch.equal(shown["cross-attention"], shown["times self-attention"])
    assert (shown["thresholded"] <= made.mask).all() or (shown["cleaned"] <= made.mask).all()


def test_a_given_mask_has_two_steps_and_a_given_image_one_stage(watched):
    mask = torch.zeros(40, 60)
    mask[10:20, 20:40] = 1
    _, recorder, made = watched(picture(40, 60), mask)
    assert [name for name, _, _ in insertion_page.mask_steps(recorder, made, 0.5)] == [
        "your mask",
        "feathered",
    ]
    assert len(recorder.stages) == 1 and recorder.stages[0][1].modifier == "mask"


def test_the_latent_mask_and_the_difference_are_those_of_the_insertion(watched):
    sdxl, recorder, made = watched()
    x_prev = recorder.stages[-1][1].stacked("x_prev")[-1]
    scene = sdxl.vae.encode(alchemy.pipeline.images.to_tensor(made.crop))[0][0]
    outside = insertion_page.latent_mask(made, sdxl.vae_scale_factor) == 0
    assert outside.any() and (x_prev - scene)[:, outside].abs().max() < 1e-5
    changed, largest_outside = insertion_page.difference(made)
    expected = np.abs(np.asarray(made.result).astype(int) - np.asarray(made.scene)).max(2)
    assert largest_outside == 0 and same(changed.numpy(), expected)
    planted = dataclasses.replace(made, feathered=torch.zeros_like(made.feathered))
    assert insertion_page.difference(planted)[1] == expected.max()


def test_insert_writes_its_page_and_the_same_result(inserted, tmp_path):
    common = ("--steps", 8, "--seed", 2, "--strength", 0.5)
    good(inserted(*common, "--out", "plain"))
    good(inserted(*common, "--inspect", "page"))
    assert same(pixels("plain/result.png"), pixels("out/insert/result.png"))
    data = read_page(tmp_path / "page")
    assert [s["prompt"] for s in data["stages"]] == [SCENE, SCENE.replace("dog", "sks dog")]
    assert data["insertion"]["difference_outside"] == 0
    assert {"scene", "crop"}.isdisjoint(data["insertion"])  # the stages show them
    shown = cut_frames(data["insertion"]["mask"][6]["sprite"])[0]
    assert same(shown, pixels("out/insert/mask.png")[:, :, 0])
    # At one noise level both stages have the same timesteps.
    first, second = ([*map(operator.itemgetter("t"), s["steps"])] for s in data["stages"])
    assert second == first[-len(second) :] and len(second) < len(first)
    assert [s["self_attention"]["4 × 4"]["at"][0] for s in data["stages"]] == [0, 0]


# The page of train.py


def test_a_layers_norm_is_that_of_its_change_over_its_weights(model, close):
    sdxl = model()
    recorder = training_page.TrainingRecorder(sdxl, 10)
    assert list(recorder.follow([(step, 0.5) for step in range(1, 11)]))[-1] == (10, 0.5)
    assert recorder.recorded_steps == list(range(11))
    for name, layer in lora.attention_layers(sdxl.unet).items():
        a = layer.lora["default"]
        change = 3.0 / 2 * a.up.double() @ a.down.double()
        expected = change.norm() / layer.weight.double().norm()
        close(torch.tensor(recorder.norms[name][3]), expected, 1e-5)
    blocks = training_page.group_by_block(recorder.norms)
    parts = [block.split(".")[0] for block, _ in blocks]
    assert parts == sorted(parts, key=["down_blocks", "mid_block", "up_blocks"].index)
    projections = ["to_q", "to_k", "to_v", "to_out"]
    for _, rows in blocks:
        assert [name.split(".")[0] for name in rows] == ["attn1"] * 4 + ["attn2"] * 4
        assert [name.split(".")[1] for name in rows] == 2 * projections


def test_train_writes_its_page_and_the_same_lora(taught, tmp_path):
    good(taught("--out", "plain/run", "--steps", 3))
    flags = ("--steps", 3, "--inspect", "page", "--inspect-full", "--preview-every", 2)
    good(taught("--out", "seen/run", *flags))
    assert contents("plain/run")["lora.safetensors"] == contents("seen/run")["lora.safetensors"]
    assert sorted(contents("page")) == ["index.html", "training.safetensors"]
    shown, arrays = read_page(tmp_path / "page")["training"], load_file("page/training.safetensors")
    assert shown["recorded_steps"] == arrays["recorded_steps"].tolist() == [0, 1, 2, 3]
    assert [step for step, _ in shown["previews"]] == [0, 2, 3]
    assert len(shown["losses"]) == len(arrays["losses"]) == 3
    assert all(math.isfinite(x) for x in shown["losses"])
    norms = [rows["attn2.to_v"] for _, rows in shown["network"]]
    assert all(row[0] == 0 < row[1] for row in norms)  # a new LoRA has moved nothing


def test_a_page_without_a_lora_has_no_norms(taught, tmp_path):
    good(taught("--method", "textual-inversion", "--inspect", "page"))
    shown = read_page(tmp_path / "page")["training"]
    assert shown["network"] == [] and shown["losses"]
