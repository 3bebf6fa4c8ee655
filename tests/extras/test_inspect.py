"""The recorder and its page: what it keeps is what the loop and the attention had, and keeping it changes nothing."""

import base64
import dataclasses
import io
import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import alchemy
from alchemy import attention, pipeline, sampling
from alchemy.formats import png
from alchemy.extras.inspect import page, stage
from alchemy.extras.inspect.pictures import bytes_of, film, fit, preview, spread
from alchemy.extras.inspect.record import QUANTITIES, Recorder
from helpers.checkpoints import vocabulary_read_once  # noqa: F401
from helpers.running import (
    contents,
    drawn,
    good,
    lora_file,
    picture,
    pixels,
    process,
    quick,
    same,
    tiny,
)  # noqa: F401

NASTY = "a dog </script><script>alert(1)</script> <!-- <b> & \"'"


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def data_of(text):
    """What the page holds, as a browser reads it: up to the first end of a script."""
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script', text, re.S)[1]
    )


def unpacked(made):
    """The frames of a film, cut apart again."""
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(made["src"].split(",")[1]))))
    w, h, columns = made["w"], made["h"], made["columns"]
    return np.stack(
        [
            sheet[
                k // columns * h : (k // columns + 1) * h, k % columns * w : (k % columns + 1) * w
            ]
            for k in range(made["n"])
        ]
    )


@pytest.fixture
def recorded(tiny):
    """recorded(prompt, steps, settings): (the recorder of a picture, every Step, {(step, layer): probabilities}, the picture)."""

    def make(prompt="a dog on a beach", steps=4, full=False, **options):
        sdxl, seen, kept, now = alchemy.load(tiny, "cpu", torch.float32), {}, [], []
        recorder = Recorder(sdxl, prompt, steps, full=full, **options)

        def follow(taken):
            with attention.record_attention(
                sdxl.unet,
                list(attention.attentions(sdxl.unet)),
                lambda name, p: now.append((name, p)),
            ):
                for step in recorder.follow(taken):
                    seen.update({(step.index, name): p for name, p in now})
                    now.clear(), kept.append(dataclasses.replace(step))
                    yield step

        return (
            recorder,
            kept,
            seen,
            pipeline.text_to_image(sdxl, prompt, progress=follow, steps=steps, **options),
        )

    return make


# What is kept


def test_every_quantity_of_every_step_is_kept(recorded, close):
    recorder, steps, _, _ = recorded(full=True)
    assert [s["t"] for s in recorder.steps] == [step.t for step in steps] and len(steps) == 4
    for name in QUANTITIES:
        assert torch.equal(
            recorder.stacked(name), torch.cat([getattr(step, name) for step in steps])
        ), name
    half = recorded()[0]
    assert half.latents["x_t"][0].dtype == torch.float16
    close(half.stacked("x_0"), recorder.stacked("x_0"), 1e-3)


@pytest.mark.parametrize(
    "sampler, eta, noisy",
    [("euler", None, False), ("ddpm", None, True), ("ddim", 0.5, True), ("lcm", None, True)],
)
def test_the_noise_drawn_anew_is_the_samplers(recorded, sampler, eta, noisy):
    recorder, steps, _, _ = recorded(full=True, sampler=sampler, eta=eta)
    for numbers, step in zip(recorder.steps[:-1], steps):
        rest = (
            step.x_prev
            - step.alpha_bar_prev**0.5 * step.x_0
            - max(1 - step.alpha_bar_prev - numbers["sigma"] ** 2, 0) ** 0.5 * step.eps
        )
        assert (numbers["sigma"] > 0) == noisy and abs(
            float(rest.std()) - numbers["sigma"]
        ) <= 0.12 * numbers["sigma"] + 1e-5


def mean(seen, k, kind, places, row):
    """Of what was seen at step k: the mean over the heads and over the layers of a kind with so many places."""
    return torch.stack(
        [
            p[row].mean(0)
            for (index, name), p in seen.items()
            if index == k and name.endswith(kind) and p.shape[2] == places
        ]
    ).mean(0)


def test_the_attention_kept_is_the_mean_of_heads_and_layers_of_the_half_that_is_told(
    recorded, close
):
    recorder, steps, seen, _ = recorded()
    words = recorder.words
    assert (
        words == 5 + 2 and recorder.looks == [0, 1, 2, 3] and list(recorder.own) == recorder.looks
    )
    for k in range(len(steps)):
        for n, kept in recorder.cross[k].items():
            both = [mean(seen, k, "attn2", n, row) for row in (0, 1)]
            close(kept.float(), both[1][:, :words], 1e-3)
            assert (both[0] - both[1]).abs().max() > 0.001  # the other half sees something else
    for k, levels in recorder.own.items():
        for n, kept in levels.items():
            own = mean(seen, k, "attn1", n, 1)
            assert (kept.float() - 255 * own / own.amax(1, keepdim=True)).abs().max() <= 0.501


def test_recording_changes_no_bit_and_leaves_no_trace(recorded, tiny):
    recorder, _, _, made = recorded()
    sdxl = alchemy.load(tiny, "cpu", torch.float32)
    assert same(
        np.asarray(made), np.asarray(alchemy.text_to_image(sdxl, "a dog on a beach", steps=4))
    )
    assert all(layer.callbacks == () for layer in attention.attentions(recorder.sdxl.unet).values())


def test_of_a_long_run_a_hundred_steps_are_kept_with_the_first_and_the_last(recorded):
    assert spread(5, 100) == [0, 1, 2, 3, 4] and spread(1, 5) == [0] and spread(0, 5) == []
    kept = spread(1000, 100)
    assert len(kept) == 100 and kept[0] == 0 and kept[-1] == 999 and max(np.diff(kept)) == 11
    recorder, steps, _, _ = recorded(steps=130, guidance=1)
    assert [s["index"] for s in recorder.steps] == spread(130, 100) and len(recorder.cross) == 100
    shown = stage.frames(recorder, torch.eye(5, 3, dtype=torch.float64))
    assert len(shown["x_prev"]) == len(shown["x_t"]) == 100 and "guidance" not in shown


def test_places_are_told_apart_by_their_number_odd_sides_too(tiny):
    recorder = Recorder(alchemy.load(tiny, "cpu"), "a dog", 3)
    recorder.size = (9, 14)
    assert [recorder.shape(n) for n in (126, 35, 12)] == [(9, 14), (5, 7), (3, 4)]


# Pictures


def test_the_map_to_colours_is_found_where_there_is_one_and_the_preview_is_it(close):
    colours = draw(5, 3, seed=1).double() / 4
    latents = [draw(4, 6, 8), draw(4, 5, 5, seed=2)]  # of two stages, of two sizes
    small = [
        torch.einsum("chw,cd->dhw", x.double(), colours[:4]) + colours[4].view(3, 1, 1)
        for x in latents
    ]
    found = fit(
        [
            (x, F.interpolate(p[None], scale_factor=4, mode="nearest")[0])
            for x, p in zip(latents, small)
        ]
    )
    close(found, colours, 1e-9)
    assert same(
        preview(latents[0][None], found)[0],
        ((small[0].clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy(),
    )


def test_a_film_holds_every_frame_to_the_bit():
    for shape in ((7, 5, 9), (30, 16, 16, 3), (1, 3, 4)):
        frames = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        assert same(unpacked(film(frames)), frames)
    assert bytes_of(torch.tensor([-1.0, 0, 0.5, 1, 9, float("nan")]), 0, 1).tolist() == [
        0,
        0,
        128,
        255,
        255,
        0,
    ]


def test_the_unguided_and_the_guided_prediction_are_shown_as_the_x_0_each_would_mean(recorded):
    recorder, steps, _, _ = recorded(full=True)
    colours = draw(5, 3, seed=1).double() / 4
    shown, schedule = stage.frames(recorder, colours), recorder.sdxl.schedule
    for k, step in enumerate(steps):
        for name in ("uncond", "cond"):
            x_0, _ = schedule.to_x0_eps(getattr(step, f"eps_{name}"), step.x_t, step.alpha_bar)
            off = shown[f"x_0_{name}"][k].astype(int) - preview(x_0, colours)[0]
            assert abs(off).max() <= 1
    # x_prev is the next x_t, and is told once.
    assert "x_prev" not in shown and same(
        shown["x_t"], preview(torch.cat([recorder.stacked("x_t"), steps[-1].x_prev]), colours)
    )


def test_the_mean_of_the_levels_counts_each_by_its_own_mean(recorded, close):
    recorder, _, _, _ = recorded()
    levels = stage.maps(recorder)
    assert list(levels) == ["4 × 4", "2 × 2", "all"]
    fine, coarse = (
        levels[key] / levels[key].mean((2, 3), keepdim=True) for key in ("4 × 4", "2 × 2")
    )
    coarse = F.interpolate(coarse, (4, 4), mode="bilinear", align_corners=False)
    close(levels["all"], (fine + coarse) / 2, 1e-6)
    made = stage.films_of(levels["4 × 4"])
    token, (low, high) = unpacked(made["films"][3]), made["range"][3]
    expected = torch.cat([levels["4 × 4"][:, 3], levels["4 × 4"][:, 3].mean(0, keepdim=True)])
    assert (
        len(token) == 5
        and abs(token - 255 * ((expected - low) / (high - low)).clamp(0, 1).numpy()).max() <= 0.501
    )


# The page


def test_one_call_draws_writes_the_page_and_the_arrays(tiny, tmp_path):
    from safetensors.torch import load_file

    sdxl = alchemy.load(tiny, "cpu", torch.float32)
    made, paths = alchemy.inspect(sdxl, NASTY, tmp_path / "page", steps=3, seed=5, full=True)
    assert [path.name for path in paths] == [
        "steps.png",
        "steps.safetensors",
        "index.html",
    ] and all(path.exists() for path in paths)
    assert same(np.asarray(made), np.asarray(alchemy.text_to_image(sdxl, NASTY, steps=3, seed=5)))
    arrays = load_file(paths[1])
    told, untold = sdxl.encode_prompt([NASTY]), sdxl.encode_prompt([None])
    for k, step in enumerate(
        alchemy.denoise(sdxl, alchemy.noise((1, 4, 8, 8), [5]), told, untold, steps=3)
    ):
        assert torch.equal(arrays["x_0"][k], step.x_0[0]) and torch.equal(
            arrays["eps_uncond"][k], step.eps_uncond[0]
        )
    assert (
        arrays["self_attention.16.step_1"].shape == (16, 16)
        and arrays["alpha_bar"].dtype == torch.float64
    )


def test_no_prompt_can_break_out_of_the_page_and_it_asks_nothing_of_the_network(tiny, tmp_path):
    sdxl = alchemy.load(tiny, "cpu", torch.float32)
    _, paths = alchemy.inspect(sdxl, NASTY, tmp_path, steps=2, negative_prompt=NASTY)
    text = paths[-1].read_text(encoding="utf-8")
    assert text.count("</script") == 2 and "<script>alert" not in text and "{{" not in text
    data = data_of(text)
    assert data["title"] == data["stages"][0]["prompt"] == data["stages"][0]["negative"] == NASTY
    assert (
        set(re.findall(r"https?://[^\"' ]*", text)) == {"http://www.w3.org/2000/svg"}
        and "default-src 'none'" in text
    )
    assert not re.search(r"\bfetch\(|XMLHttpRequest|import\(|url\(", text)
    cut = data["stages"][0]["tokens"]
    assert [c["pieces"] for c in cut] == [
        [[t(NASTY)[0], "start"], *map(list, t.tokens(NASTY)), [49407, "end"]]
        for t in sdxl.tokenizers
    ]


# sample.py


def test_sample_writes_a_page_for_each_picture_and_takes_no_folder_that_has_one(drawn):
    run = good(drawn("--inspect", "page", "--out", "a.png"))
    assert sorted(contents("page")) == ["index.html", "steps.png"]
    assert [p.as_posix() for p in run.wrote] == ["a.png", "page/steps.png", "page/index.html"]
    good(drawn("--out", "b.png"))
    assert same(pixels("a.png"), pixels("b.png")) and png.facts_of("a.png") == png.facts_of("b.png")
    before = contents("page")
    good(drawn("--inspect", "page", "--inspect-full", "--count", 2))
    assert contents("page") == before
    names = ("index.html", "steps.png", "steps.safetensors")
    assert sorted(contents("page-1")) == [f"{k}/{name}" for k in ("0000", "0001") for name in names]


def test_without_inspect_nothing_of_the_recorder_is_so_much_as_imported(tiny):
    listing = "import atexit; atexit.register(lambda: print(*(name for name in sys.modules if 'report' in name), file=sys.stderr))"
    run = good(process("sample.py", "a dog", "--weights", tiny, "--steps", 2, before=listing))
    assert "alchemy.extras.inspect" not in run.err
    run = good(
        process(
            "sample.py",
            "a dog",
            "--weights",
            tiny,
            "--steps",
            2,
            "--inspect",
            "page",
            before=listing,
        )
    )
    assert "alchemy.extras.inspect.record" in run.err
