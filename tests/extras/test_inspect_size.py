"""How large a page of insert.py becomes, the largest there is: both stages, thirty steps, a prompt that fills all 77 tokens."""

import functools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import alchemy
from alchemy import sampling
from alchemy.insertion import Insertion
from alchemy.extras.inspect import page, placing, stage
from alchemy.extras.inspect.record import Recorder
from helpers.checkpoints import vocabulary_read_once  # noqa: F401
from helpers.running import picture, tiny  # noqa: F401
from test_inspect import data_of, draw, unpacked


def attention(words, side, seed):
    """Cross-attention (side², words): soft spots, somewhat noisy."""
    coarse = F.interpolate(
        draw(1, words, side // 4, side // 4, seed=seed), (side, side), mode="bilinear"
    )
    return (
        (2 * coarse + 0.3 * draw(1, words, side, side, seed=seed + 1)).flatten(2)[0].T.softmax(-1)
    )


def recorded(sdxl, latent, levels, looked):
    """A Recorder of thirty steps; nothing of what it kept can be told from noise, so that no real run needs more room."""
    recorder = Recorder(sdxl, "dog " * 75, 30)
    recorder.size = (latent, latent)
    own = (2 * draw(looked**2, looked**2)).softmax(1)
    for index, (t, t_prev) in enumerate(sdxl.schedule.timesteps(30)):
        latents, ab = (
            [draw(1, 4, latent, latent, seed=8 * index + k) for k in range(6)],
            sdxl.schedule.alpha_bar_at(t),
        )
        recorder.seen = {
            ("attn2", side**2): (attention(recorder.words, side, index), 1) for side in levels
        }
        recorder.seen |= {("attn1", looked**2): (own, 1)} if index in recorder.looks else {}
        recorder.take(sampling.Step(index, t, t_prev, ab, ab, *latents))
    return recorder


@pytest.mark.parametrize(
    "size, latent, levels, looked, most",
    [(1024, 128, (64, 32), 32, 25e6), (128, 32, (16, 8), 16, 3e6)],
)
def test_the_page_of_both_stages_stays_small_however_long_the_prompt(
    tiny, tmp_path, monkeypatch, size, latent, levels, looked, most
):
    sdxl, described = alchemy.load(tiny, "cpu", torch.float32), []
    sdxl.loaded["vae"] = SimpleNamespace(
        decode=lambda x: F.interpolate(x[:, :3], scale_factor=size // latent)
    )
    recorder, describe = recorded(sdxl, latent, levels, looked), stage.describe

    def once(
        *of,
    ):  # both stages are of the same numbers, which are told twice; only the second picture is another
        described.append(
            describe(*of) if not described else described[0] | {"picture": stage.uri(of[2], False)}
        )
        return described[-1]

    monkeypatch.setattr(stage, "describe", once)
    monkeypatch.setattr(page, "sheet", lambda *of, **more: scene)
    for name in ("decoded", "frames", "maps"):
        monkeypatch.setattr(stage, name, functools.cache(getattr(stage, name)))
    soft = F.interpolate(draw(1, 1, 8, 8), (size, size), mode="bicubic")[0, 0].sigmoid()
    scene, drawn = (grainy(size, seed) for seed in (0, 1))
    made = Insertion(
        scene,
        soft,
        (soft > 0.5).float(),
        soft * (soft > 0.5),
        (0, 0, size, size),
        scene,
        drawn,
        drawn,
    )
    maps = SimpleNamespace(heat=lambda power: draw(levels[0], levels[0], seed=power).sigmoid())
    watcher = SimpleNamespace(sdxl=sdxl, maps=maps, stages=[("1", recorder), ("2", recorder)])
    *_, written = placing.write_page(
        tmp_path,
        watcher,
        made,
        {"prompt": recorder.prompt, "threshold": 0.5, "seam": 1.0, "seed": 0},
    )
    assert 0.3 * most < written.stat().st_size < (0.85 if size == 1024 else 0.95) * most
    data = data_of(written.read_text())
    assert (
        len(data["stages"]) == 2
        and len(data["insertion"]["mask"]) == 8
        and {"scene", "crop", "drawn"}.isdisjoint(data["insertion"])
    )
    assert all(len(own["at"]) == 5 for s in data["stages"] for own in s["own"].values())


def grainy(size, seed):
    return Image.blend(
        picture(size, size, seed), Image.effect_noise((size, size), 64).convert("RGB"), 0.1
    )


def test_of_many_tokens_some_steps_have_maps_and_the_mean_is_of_all():
    level = draw(30, 77, 4, 4).sigmoid()
    made = stage.films_of(level)
    assert made["at"] == [0, 3, 6, 10, 13, 16, 19, 23, 26, 29] and made["films"][0]["n"] == 11
    for token in (0, 76):
        low, high = made["range"][token]
        expected = torch.cat([level[made["at"], token], level[:, token].mean(0, keepdim=True)])
        assert (
            abs(
                unpacked(made["films"][token])
                - 255 * ((expected - low) / (high - low)).clamp(0, 1).numpy()
            ).max()
            <= 0.501
        )
    assert (
        stage.films_of(level[:, :26])["at"] == list(range(30))
        and len(stage.films_of(level[:, :27])["at"]) == 29
    )
