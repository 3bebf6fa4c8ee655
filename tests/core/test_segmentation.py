"""Planted attention in, soft masks out: every number against one computed by hand, or by the definition in float64."""

import numpy as np
import pytest
import torch

import alchemy
from alchemy import attention, insertion, segmentation
from alchemy.segmentation import AttentionMaps
from alchemy.unet import UNet, UNetConfig
from helpers.planted import HEADS, Planted, ellipse, grey, iou, noise_picture

SHAPES = {
    "square": (64, 64),
    "wide": (48, 84),
    "tall": (92, 44),
}  # pixels; latents 32 x 32, 24 x 42, 46 x 22, then 21 and 23, 11
PICTURES = {"square": (300, 300), "wide": (453, 701), "tall": (211, 97)}


# The word in the prompt


def test_a_word_of_several_tokens_is_all_of_them_and_each_occurrence_counts():
    sdxl = Planted({})
    assert segmentation.positions(sdxl, "a photo of a dog", "dog") == [5]
    assert segmentation.positions(sdxl, "a photo of a schnauzer", "schnauzer") == [5, 6]
    assert segmentation.positions(sdxl, "a teddy bear on a Teddy Bear", "teddy bear") == [
        2,
        3,
        6,
        7,
    ]


@pytest.mark.parametrize("word", ["cat", "do", "", "photo of dog"])
def test_a_word_that_is_not_in_the_prompt_is_named(word):
    with pytest.raises(
        ValueError, match=f"^the word '{word}' is not in the prompt 'a photo of a dogs dog'$"
    ):
        segmentation.positions(Planted({}), "a photo of a dogs dog", word)


@pytest.mark.parametrize(
    "prompt, wanted",
    [
        ("a dog on a beach", "a sks dog on a beach"),
        ("Dog and dog", "sks Dog and dog"),
        ("a hotdog, a dog.", "a hotdog, a sks dog."),
        ("dogs and dog-like dogs", "dogs and sks dog-like dogs"),
    ],
)
def test_the_token_stands_before_the_first_class_word(prompt, wanted):
    assert insertion.with_token(prompt, "dog", "sks") == wanted


def test_class_words_and_tokens_are_taken_literally():
    assert insertion.with_token("a (c.t) cat", "c.t", r"\1<x>") == r"a (\1<x> c.t) cat"
    assert insertion.with_token("a teddy bear", "teddy bear", "sks") == "a sks teddy bear"
    with pytest.raises(ValueError, match="the class word 'dog' is not in the prompt 'two dogs'"):
        insertion.with_token("two dogs", "dog", "sks")


# Collecting


def random_tables(sdxl, tokens=77):
    """(table function, what it returned): {(layer, t): probabilities (B, heads, N, M)}."""
    generator, made = torch.Generator().manual_seed(0), {}

    def table(name, t, batch):
        count = int(np.prod(sdxl.level(name)))
        shape = batch, HEADS, count, count if name.endswith("attn1") else tokens
        return made.setdefault((name, t), torch.rand(shape, generator=generator).softmax(-1))

    return table, made


def follow(sdxl, maps, timesteps, batch=2):
    def steps():
        for t in timesteps:
            sdxl.unet(
                torch.zeros(batch, 4, *sdxl.latent_size), t, torch.zeros(batch, 77, 4), None, None
            )
            yield type("Step", (), {"t": t})

    return [step.t for step in maps.follow(steps())]


@pytest.mark.parametrize("size", SHAPES.values(), ids=SHAPES)
def test_maps_are_means_over_layers_heads_tokens_and_steps_of_the_conditional_half(size):
    sdxl = Planted({"": grey(np.zeros(size))})
    sdxl.encode_prompt([""], size)
    sdxl.tables["attn1"], own = random_tables(sdxl)
    sdxl.tables["attn2"], cross = random_tables(sdxl)
    maps = AttentionMaps(sdxl.unet, [3, 4, 9], sdxl.latent_size, T=1000, window=(0.1, 0.7))
    assert follow(sdxl, maps, [950.0, 700.0, 430.5, 100.0, 99.0]) == [
        950.0,
        700.0,
        430.5,
        100.0,
        99.0,
    ]  # the bounds belong to it

    layers = {"down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0", "up_blocks.1"}
    for shape in {sdxl.level(name) for name in layers}:
        rows = [
            cross[f"{name}.attn2", t][1].double().numpy()
            for name in layers
            if sdxl.level(name) == shape
            for t in (700.0, 430.5, 100.0)
        ]
        wanted = np.mean(
            [p[head][:, place] for p in rows for head in range(HEADS) for place in (3, 4, 9)],
            axis=0,
        )
        total, count = maps.cross[shape]
        assert np.abs((total / count).numpy() - wanted).max() < 1e-7
    finest = sdxl.level("down_blocks.1")
    wanted = np.mean(
        [
            own[f"{name}.attn1", t][1].double().numpy()[head]
            for name in ("down_blocks.1", "up_blocks.1")
            for t in (700.0, 430.5, 100.0)
            for head in range(HEADS)
        ],
        axis=0,
    )
    total, count = maps.own[finest]
    assert np.abs((total / count).numpy() - wanted).max() < 1e-7
    assert len(maps.cross) == 2 and len(maps.own) == 1


def test_without_guidance_the_one_row_counts():
    sdxl = Planted({"": grey(np.zeros((64, 64)))})
    sdxl.encode_prompt([""], (64, 64))
    sdxl.tables["attn2"], cross = random_tables(sdxl)
    maps = AttentionMaps(sdxl.unet, [5], sdxl.latent_size)
    follow(sdxl, maps, [400.0], batch=1)
    total, count = maps.cross[(16, 16)]
    wanted = sum(
        cross[f"{block}.attn2", 400.0][0, :, :, 5].mean(0)
        for block in ("down_blocks.1", "up_blocks.1")
    )
    assert count == 2 and (total - wanted).abs().max() < 1e-7


def test_no_layer_is_watched_after_the_last_step_or_a_stop():
    sdxl = Planted(
        {"": grey(np.zeros((64, 64)))},
        cross=lambda *_: torch.ones(2, HEADS, 4, 77),
        own=lambda *_: torch.ones(2, HEADS, 4, 4),
    )
    sdxl.encode_prompt([""], (64, 64))
    watched = lambda: [layer for layer in attention.attentions(sdxl.unet).values() if layer.callbacks]  # noqa: E731
    follow(sdxl, AttentionMaps(sdxl.unet, [1], sdxl.latent_size), [1.0])
    assert not watched()
    steps = AttentionMaps(sdxl.unet, [1], sdxl.latent_size).follow(
        iter([type("Step", (), {"t": 1.0})])
    )
    next(steps)
    assert watched()
    steps.close()
    assert not watched()


@pytest.mark.parametrize("latents", [(16, 16), (13, 18), (7, 25)])
def test_shapes_are_those_of_the_real_unet_at_odd_sides(latents):
    sizes = dict(
        block_out_channels=(8, 8, 8),
        attention_head_dim=(1, 2, 2),
        transformer_layers_per_block=(1, 1, 1),
        cross_attention_dim=4,
        layers_per_block=1,
        addition_time_embed_dim=2,
        projection_class_embeddings_input_dim=16,
        norm_num_groups=4,
    )
    unet = UNet(UNetConfig(**sizes))
    maps, seen = AttentionMaps(unet, [1], latents), {}
    with (
        torch.no_grad(),
        attention.record_attention(
            unet, attention.attentions(unet), lambda name, p: seen.update({name: p.shape[2]})
        ),
    ):
        unet(
            torch.zeros(1, 4, *latents),
            5,
            torch.zeros(1, 77, 4),
            torch.zeros(1, 4),
            torch.zeros(1, 6),
        )
    assert len(seen) == 2 * 7 and all(
        np.prod(maps.shape(name)) == count for name, count in seen.items()
    )


@pytest.mark.parametrize(
    "size, own", [((128, 128), (32, 32)), ((160, 160), (40, 40)), ((512, 512), None)]
)
def test_self_attention_is_watched_at_one_level_that_fits_in_memory(size, own):
    # As SDXL at 1024 and 1280: of 64 x 64 and 32 x 32 places the coarser, of 80 x 80 and 40 x 40 too; at 4096, none.
    sdxl = Planted({"": grey(np.zeros(size))})
    sdxl.encode_prompt([""], size)
    maps = AttentionMaps(sdxl.unet, [1], (size[0], size[1]))
    with maps.watch():
        watched = [name for name, layer in attention.attentions(sdxl.unet).items() if layer.callbacks]
    assert sum(name.endswith("attn2") for name in watched) == 5
    assert {maps.shape(name) for name in watched if name.endswith("attn1")} == (
        {own} if own else set()
    )


# From maps to heat


def stretched(x):
    low, high = np.quantile(x, [0.01, 0.99])
    return np.clip((x - low) / (high - low), 0, 1)


def bilinear(x, size):
    """Half-pixel centres, the border repeated."""
    for axis, n in enumerate(size):
        at = np.clip((np.arange(n) + 0.5) * x.shape[axis] / n - 0.5, 0, x.shape[axis] - 1)
        low = np.minimum(at.astype(int), max(x.shape[axis] - 2, 0))
        share = (at - low).reshape([-1, 1][:: 1 if axis == 0 else -1])
        x = (
            np.take(x, low, axis) * (1 - share)
            + np.take(x, np.minimum(low + 1, x.shape[axis] - 1), axis) * share
        )
    return x


def maps_with(cross, own=None):
    maps = AttentionMaps(None, [1], (9, 9))
    maps.cross = {
        shape: (torch.tensor(m, dtype=torch.float32).flatten(), 1) for shape, m in cross.items()
    }
    maps.own = {
        shape: (torch.tensor(p, dtype=torch.float32), 1) for shape, p in (own or {}).items()
    }
    return maps


def test_heat_spreads_by_powers_of_the_normalised_self_attention():
    cross = np.array([[6.0, 1.0], [3.0, 2.0]])  # mean 3
    own = np.array(
        [[2, 2, 0, 0], [0, 1, 0, 3], [0, 0, 1, 0], [1, 1, 1, 1]]
    )  # rows are not of sum 1
    by_hand = {0: [2, 1 / 3, 1, 2 / 3], 1: [7 / 6, 7 / 12, 1, 1]}
    by_hand[2] = [(7 / 6 + 7 / 12) / 2, (7 / 12 + 3) / 4, 1, (7 / 6 + 7 / 12 + 1 + 1) / 4]
    for power, wanted in by_hand.items():
        heat = maps_with({(2, 2): cross}, {(2, 2): own}).heat(power)
        assert (
            heat.shape == (2, 2)
            and np.abs(heat.flatten().numpy() - stretched(np.array(wanted))).max() < 1e-6
        )


def test_levels_count_alike_whatever_their_scale_and_are_brought_to_the_finest():
    rng = np.random.default_rng(0)
    fine, coarse = (
        rng.random((7, 11)),
        50 * rng.random((4, 6)),
    )  # odd sides, as halved and rounded up
    heat = maps_with({(4, 6): coarse, (7, 11): fine}).heat(0)
    wanted = (fine / fine.mean() + bilinear(coarse / coarse.mean(), (7, 11))) / 2
    assert heat.shape == (7, 11) and np.abs(heat.numpy() - stretched(wanted)).max() < 1e-5


def test_self_attention_of_a_coarser_level_spreads_there_and_power_0_leaves_the_detail():
    fine, own = np.random.default_rng(1).random((8, 4)), np.random.default_rng(2).random((8, 8))
    areas = (
        (fine / fine.mean()).reshape(4, 2, 2, 2).mean(axis=(1, 3)).flatten()
    )  # the mean of 2 x 2 places
    wanted = bilinear((own / own.sum(1, keepdims=True) @ areas).reshape(4, 2), (8, 4))
    maps = maps_with({(8, 4): fine}, {(4, 2): own})
    assert np.abs(maps.heat(1).numpy() - stretched(wanted)).max() < 1e-5
    assert np.abs(maps.heat(0).numpy() - stretched(fine)).max() < 1e-6


def test_no_step_in_the_window_is_said():
    sdxl = Planted({"": grey(np.zeros((64, 64)))}, where={"dog": ellipse(64, 64)})
    sdxl.encode_prompt(["a dog"], (64, 64))
    maps = AttentionMaps(sdxl.unet, [2], sdxl.latent_size, window=(0.1, 0.7))
    follow(sdxl, maps, [999.0, 1.0])
    with pytest.raises(
        ValueError, match="no step lies between timesteps 100 and 700, .* raise --steps"
    ):
        maps.heat(1)


def test_an_even_map_is_no_division_by_zero():
    assert segmentation.stretch(torch.ones(3, 3)).isfinite().all()


# The whole way, for a picture of one's own


@pytest.mark.parametrize("height, width", PICTURES.values(), ids=PICTURES)
@pytest.mark.parametrize("centre", [(0.5, 0.5), (0.3, 0.14), (0.86, 0.6)])
def test_segment_finds_a_planted_blob_where_it_is(height, width, centre):
    blob = ellipse(height, width, centre, (0.2, 0.15))
    sdxl = Planted(
        {"dog": None}, where={"dog": blob}, size=(128, 128)
    )  # attention at about 32 x 32 places
    soft = alchemy.segment(
        sdxl, noise_picture(height, width), "dog", prompt="a photo of a dog on the grass"
    )
    assert soft.shape == (height, width) and iou(soft > 0.5, blob > 0) > 0.85
    edge = ellipse(height, width, centre, (0.26, 0.21)) > 0
    assert (
        soft[~edge].max() < 0.25
    )  # and nowhere else: all of the picture was looked at, each place stands for its own


def test_segment_looks_once_at_the_whole_picture_noised_to_its_level():
    sdxl = Planted({"dog": None}, where={"dog": ellipse(64, 64)}, look=0.3)
    picture = noise_picture(64, 64)
    alchemy.segment(sdxl, picture, "dog", seed=7)
    (call,) = sdxl.unet.calls
    assert (
        sdxl.prompts == ["a photo of a dog"]
        and call["t"] == 299
        and call["time_ids"].tolist() == [[64, 64, 0, 0, 64, 64]]
    )
    ab = float(sdxl.schedule.alpha_bar[299])
    wanted = ab**0.5 * sdxl.vae.seen + (1 - ab) ** 0.5 * alchemy.noise((1, 4, 32, 32), [7])
    assert (call["x_t"] - wanted).abs().max() < 1e-6
    alchemy.segment(sdxl, picture, "dog", look=0.5)
    assert sdxl.unet.calls[-1]["t"] == 499


# The whole way, while a scene is drawn


def test_the_scenes_attention_counts_within_the_checkpoints_window_and_is_sharpened_as_it_says():
    blob, other = ellipse(64, 64, (0.5, 0.3), (0.2, 0.2)), ellipse(64, 64, (0.5, 0.7), (0.2, 0.2))

    def misled(name, t, batch):
        sdxl.where = {"dog": blob if 300 <= t <= 600 else other}
        return sdxl.look_at_words(name, t, batch)

    for sharpening in (0, 1):
        sdxl = Planted(
            {"dog": noise_picture(64, 64)},
            window=(0.3, 0.6),
            sharpening=sharpening,
            cross=misled,
            own=lambda name, t, batch: torch.ones(batch, 1, 16 * 16, 16 * 16),
        )  # every place looks everywhere
        sdxl.where = {"dog": blob}
        if sharpening:
            with pytest.raises(ValueError, match="the mask is empty"):
                alchemy.insert(sdxl, "a dog", "dog", "sks")
        else:
            assert iou(alchemy.insert(sdxl, "a dog", "dog", "sks").soft > 0.5, blob > 0) > 0.8
