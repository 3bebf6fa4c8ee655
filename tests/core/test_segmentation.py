"""Planted attention in, masks out: against numbers computed by hand or by definition in float64."""

from itertools import product

import numpy as np
import pytest
import torch
from helpers.planted import HEADS, Planted, ellipse, grey, iou, noise_picture

import alchemy
from alchemy import attention, segmentation
from alchemy.segmentation import AttentionMaps, binarize, remove_specks_and_holes
from alchemy.unet import UNet, UNetConfig

SIZES = {"square": (64, 64), "wide": (48, 84), "tall": (92, 44)}
IMAGE_SIZES = {"square": (300, 300), "wide": (453, 701), "tall": (211, 97)}


def planted(size=(64, 64), **more):
    sdxl = Planted({"": grey(np.zeros(size))}, **more)
    sdxl.encode_prompt([""], size)
    return sdxl


# The word in the prompt


def test_all_tokens_of_every_occurrence_of_a_word_are_found():
    for prompt, word, positions in (
        ("a photo of a schnauzer", "schnauzer", [5, 6]),  # two tokens
        ("a teddy bear on a Teddy Bear", "teddy bear", [2, 3, 6, 7]),
    ):
        assert segmentation.token_positions(planted(), prompt, word) == positions
    with pytest.raises(ValueError, match="^the word 'do' is not in the prompt 'a dogs dog'$"):
        segmentation.token_positions(planted(), "a dogs dog", "do")


# Recording


def random_attention(size=(64, 64)):
    """A planted model, and {(layer, t): the random probabilities (B, heads, N, M) it showed}."""
    rng, shown, sdxl = torch.Generator().manual_seed(0), {}, planted(size)

    def table(name, t, batch):
        count = int(np.prod(sdxl.level(name)))
        shape = batch, HEADS, count, count if name.endswith("attn1") else 77
        return shown.setdefault((name, t), torch.rand(shape, generator=rng).softmax(-1))

    sdxl.tables = {"attn1": table, "attn2": table}
    return sdxl, shown


def follow(sdxl, maps, timesteps, batch=2):
    def steps():
        for t, t_prev in zip(timesteps, [*timesteps[1:], None], strict=True):
            latents, context = torch.zeros(batch, 4, *sdxl.latent_size), torch.zeros(batch, 77, 4)
            sdxl.unet(latents, t, context, None, None)
            yield type("Step", (), {"t": t, "t_prev": t_prev})

    return [step.t for step in maps.follow(steps())]


def mean(values):
    return torch.stack(values).double().mean(0)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("batch", [1, 2])
def test_maps_are_means_over_layers_heads_tokens_and_the_windows_steps(size, batch):
    sdxl, tables = random_attention(size)
    maps = AttentionMaps(sdxl.unet, [3, 4, 9], sdxl.latent_size, window=(0.1, 0.7))
    timesteps = [950.0, 700.0, 430.5, 100.0, 99.0]
    assert follow(sdxl, maps, timesteps, batch) == timesteps
    inside = (700.0, 430.5, 100.0)  # the bounds belong to the window

    layers = {"down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0", "up_blocks.1"}
    assert set(maps.cross) == {sdxl.level(layer) for layer in layers} and len(maps.cross) == 2
    for level, (total, count) in maps.cross.items():
        names = [f"{layer}.attn2" for layer in layers if sdxl.level(layer) == level]
        conditional = [tables[key][-1] for key in product(names, inside)]
        expected = mean([p[:, :, [3, 4, 9]].mean((0, 2)) for p in conditional])
        assert (total / count - expected).abs().max() < 1e-7

    ((level, (total, count)),) = maps.self_attn.items()
    assert level == sdxl.level("down_blocks.1")
    names = ("down_blocks.1.attn1", "up_blocks.1.attn1")
    expected = mean([tables[key][-1].mean(0) for key in product(names, inside)])
    assert (total / count - expected).abs().max() < 1e-7


def test_attention_is_computed_only_for_the_first_step_and_the_windows():
    sdxl, tables = random_attention()
    maps = AttentionMaps(sdxl.unet, [3], sdxl.latent_size, window=(0.1, 0.7))
    follow(sdxl, maps, [950.0, 800.0, 500.0, 300.0, 50.0, 20.0])
    assert {t for _, t in tables} == {950.0, 500.0, 300.0}


def test_no_layer_is_recorded_after_the_last_step_or_a_break():
    sdxl, _ = random_attention()

    def recorded():
        return [layer for layer in attention.attentions(sdxl.unet).values() if layer.callbacks]

    maps = AttentionMaps(sdxl.unet, [1], sdxl.latent_size)
    follow(sdxl, maps, [2.0, 1.0])
    assert not recorded()
    steps = maps.follow(iter([type("Step", (), {"t": 1.0, "t_prev": 0.5})]))
    next(steps)
    assert recorded()
    steps.close()
    assert not recorded()


@pytest.mark.parametrize("latents", [(16, 16), (13, 18), (7, 25)])
def test_layer_sizes_are_those_of_the_real_unet_at_odd_sides(latents):
    config = UNetConfig(
        block_out_channels=(8, 8, 8),
        attention_head_dim=(1, 2, 2),
        transformer_layers_per_block=(1, 1, 1),
        cross_attention_dim=4,
        layers_per_block=1,
        addition_time_embed_dim=2,
        projection_class_embeddings_input_dim=16,
        norm_num_groups=4,
    )
    unet, seen = UNet(config), {}
    maps = AttentionMaps(unet, [1], latents)

    def see(name, probabilities):
        seen[name] = probabilities.shape[2]

    with torch.no_grad(), attention.record_attention(unet, attention.attentions(unet), see):
        context, pooled, time_ids = torch.zeros(1, 77, 4), torch.zeros(1, 4), torch.zeros(1, 6)
        unet(torch.zeros(1, 4, *latents), 5, context, pooled, time_ids)
    assert len(seen) == 2 * 7
    assert {name: np.prod(maps.layer_size(name)) for name in seen} == seen


@pytest.mark.parametrize(
    "size, level", [((128, 128), (32, 32)), ((160, 160), (40, 40)), ((512, 512), None)]
)
def test_self_attention_is_recorded_at_one_level_that_fits_in_memory(size, level):
    # As SDXL at 1024 and 1280: the coarser of two levels; at 4096, none.
    maps = AttentionMaps(planted().unet, [1], size)
    layers = maps.layers()
    assert sum(name.endswith("attn2") for name in layers) == 5
    sizes = {maps.layer_size(name) for name in layers if name.endswith("attn1")}
    assert sizes == ({level} if level else set())


# From maps to the heatmap


def normalized(x):
    low, high = np.quantile(x, [0.01, 0.99])
    return np.clip((x - low) / (high - low), 0, 1)


def bilinear(x, size):
    return segmentation.resize(torch.tensor(x), size, "bilinear").numpy()


def maps_with(cross, self_attn=None):
    maps = AttentionMaps(None, [1], (9, 9))
    maps.cross = {size: (torch.tensor(m).float().flatten(), 1) for size, m in cross.items()}
    for size, m in (self_attn or {}).items():
        maps.self_attn[size] = torch.tensor(m).float(), 1
    return maps


def test_the_heatmap_walks_along_the_normalized_self_attention():
    cross = np.array([[6.0, 1.0], [3.0, 2.0]])  # mean 3
    self_attn = np.array([[2, 2, 0, 0], [0, 1, 0, 3], [0, 0, 1, 0], [1, 1, 1, 1]])
    by_hand = {0: [2, 1 / 3, 1, 2 / 3], 1: [7 / 6, 7 / 12, 1, 1]}
    by_hand[2] = [(7 / 6 + 7 / 12) / 2, (7 / 12 + 3) / 4, 1, (7 / 6 + 7 / 12 + 1 + 1) / 4]
    for iterations, expected in by_hand.items():
        heat = maps_with({(2, 2): cross}, {(2, 2): self_attn}).heatmap(iterations)
        assert heat.shape == (2, 2)
        assert np.abs(heat.flatten().numpy() - normalized(np.array(expected))).max() < 1e-6


def test_levels_count_alike_whatever_their_scale_at_the_finest_size():
    rng = np.random.default_rng(0)
    fine, coarse = rng.random((7, 11)), 50 * rng.random((4, 6))  # odd sides, halved, rounded up
    heat = maps_with({(4, 6): coarse, (7, 11): fine}).heatmap(0)
    expected = (fine / fine.mean() + bilinear(coarse / coarse.mean(), (7, 11))) / 2
    assert np.abs(heat.numpy() - normalized(expected)).max() < 1e-5


def test_the_walk_is_at_the_size_of_the_self_attention():
    fine = np.random.default_rng(1).random((8, 4))
    self_attn = np.random.default_rng(2).random((8, 8))
    areas = (fine / fine.mean()).reshape(4, 2, 2, 2).mean(axis=(1, 3)).flatten()
    walked = self_attn / self_attn.sum(1, keepdims=True) @ areas
    maps = maps_with({(8, 4): fine}, {(4, 2): self_attn})
    expected = normalized(bilinear(walked.reshape(4, 2), (8, 4)))
    assert np.abs(maps.heatmap(1).numpy() - expected).max() < 1e-5
    assert np.abs(maps.heatmap(0).numpy() - normalized(fine)).max() < 1e-6


def test_no_step_in_the_window_is_an_error_and_an_even_map_is_not():
    maps = AttentionMaps(planted().unet, [2], (32, 32), window=(0.1, 0.7))
    maps.accumulate(999.0)
    with pytest.raises(ValueError, match="between timesteps 100 and 700, .* raise --steps"):
        maps.heatmap(1)
    assert segmentation.normalize_percentile(torch.ones(3, 3)).isfinite().all()


# To the image's resolution


def window_means(x, radius):
    """By definition: the window around each pixel, cut at the border."""
    means = np.empty(x.shape)
    for i, j in np.ndindex(x.shape):
        rows = slice(max(i - radius, 0), i + radius + 1)
        means[i, j] = x[rows, max(j - radius, 0) : j + radius + 1].mean()
    return means


@pytest.mark.parametrize(
    "size, radius", [((9, 14), 2), ((13, 5), 1), ((6, 6), 9), ((1, 7), 2), ((12, 8), 0)]
)
def test_the_guided_filter_is_its_papers_by_definition(size, radius):
    rng = np.random.default_rng(radius)
    p, i = rng.random(size), rng.random(size)
    mean_p, mean_i = window_means(p, radius), window_means(i, radius)
    variance = window_means(i * i, radius) - mean_i**2
    a = (window_means(i * p, radius) - mean_i * mean_p) / (variance + 1e-3)
    b = mean_p - a * mean_i
    expected = np.clip(window_means(a, radius) * i + window_means(b, radius), 0, 1)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-3)):
        p_, i_ = torch.tensor(p, dtype=dtype), torch.tensor(i, dtype=dtype)
        ours = segmentation.guided_filter(p_, i_, radius).numpy()
        assert np.abs(ours - expected).max() < tolerance


@pytest.mark.parametrize("edge", [53, 54, 58, 60])
def test_the_masks_edge_moves_to_the_images(edge):
    array = np.full((128, 128), 40)
    array[:, edge:] = 210
    heat = torch.zeros(16, 16)
    heat[:, 7:] = 1  # its own edge is at pixel 56, and blurred
    rise = segmentation.to_pixels(heat, grey(array))[64].diff()
    assert int(rise.argmax()) == edge - 1 and rise.max() > 0.25
    flat = segmentation.to_pixels(heat, grey(np.full((128, 128), 40)))[64].diff()
    assert flat.max() < 0.1


# To a region


def drawing(text):
    rows = [list(line) for line in text.split()]
    return torch.tensor(np.array(rows) == "#")


def test_specks_and_holes_go_and_parts_from_a_fifth_of_the_largest_stay():
    before = """
        ####......#
        #..#.......
        #..#...###.
        ####...#.#.
        .......###.
        #..........
        #....#.....
        ##........."""
    after = """
        ####.......
        ####.......
        ####...###.
        ####...###.
        .......###.
        #..........
        #..........
        ##........."""
    assert torch.equal(remove_specks_and_holes(drawing(before)), drawing(after))
    bay = drawing("##### #...# #...#")  # opens to the border: no hole
    assert torch.equal(remove_specks_and_holes(bay), bay)


def test_large_masks_keep_their_own_edges():
    blob = ellipse(613, 1001, (0.45, 0.5), (0.3, 0.2)) > 0
    mask = blob.clone()
    mask[20:30, 900:910], mask[600:, 40:50] = True, True  # specks, one at the border
    mask[250:275, 480:505] = False  # a hole
    assert torch.equal(remove_specks_and_holes(mask), blob)


@pytest.mark.parametrize("size", [(40, 40), (23, 60), (61, 20)])
def test_a_region_grows_by_a_square_of_a_share_of_the_shorter_side(size):
    soft, expected = torch.zeros(size), torch.zeros(size)
    soft[5:9, 6:9] = 0.4
    r = round(0.1 * min(size))
    expected[5 - r : 9 + r, 6 - r : 9 + r] = 1
    assert torch.equal(binarize(soft, 0.4, 0.1), expected)
    assert torch.equal(binarize(soft, 0.4, 0), (soft > 0).float())


def test_an_empty_and_a_full_mask_are_errors_that_name_the_flag():
    soft = torch.linspace(0, 0.9, 10000).view(100, 100)
    with pytest.raises(ValueError, match="the mask is empty.*lower --threshold, or give --mask"):
        binarize(soft, 0.95, 0.03)
    with pytest.raises(ValueError, match="the mask covers the whole image; raise --threshold"):
        binarize(soft, 0.0, 0.03)


# The whole way


@pytest.mark.parametrize("height, width", IMAGE_SIZES.values(), ids=IMAGE_SIZES)
@pytest.mark.parametrize("center", [(0.5, 0.5), (0.3, 0.14), (0.86, 0.6)])
def test_segment_finds_a_planted_blob_and_nothing_else(height, width, center):
    blob = ellipse(height, width, center, (0.2, 0.15))
    sdxl = Planted({"dog": None}, where={"dog": blob}, size=(128, 128))
    image = noise_picture(height, width)
    soft = alchemy.segment(sdxl, image, "dog", prompt="a photo of a dog on the grass")
    assert soft.shape == (height, width) and iou(soft > 0.5, blob > 0) > 0.85
    assert soft[ellipse(height, width, center, (0.26, 0.21)) == 0].max() < 0.25


def test_segment_runs_the_unet_once_at_its_noise_level():
    sdxl = Planted({"dog": None}, where={"dog": ellipse(64, 64)}, noise_level=0.3)
    image = noise_picture(64, 64)
    alchemy.segment(sdxl, image, "dog", seed=7)
    (call,) = sdxl.unet.calls
    assert sdxl.prompts == ["a photo of a dog"] and call["t"] == 299
    assert call["time_ids"].tolist() == [[64, 64, 0, 0, 64, 64]]
    ab = float(sdxl.schedule.alpha_bar[299])
    expected = ab**0.5 * sdxl.vae.encoded + (1 - ab) ** 0.5 * alchemy.noise((1, 4, 32, 32), [7])
    assert (call["x_t"] - expected).abs().max() < 1e-6
    alchemy.segment(sdxl, image, "dog", noise_level=0.5)
    assert sdxl.unet.calls[-1]["t"] == 499


@pytest.mark.parametrize("walk_iterations", [0, 1])
def test_a_scenes_mask_follows_the_checkpoints_window_and_walk(walk_iterations):
    blob = ellipse(64, 64, (0.5, 0.3), (0.2, 0.2))
    other = ellipse(64, 64, (0.5, 0.7), (0.2, 0.2))

    def misleading(name, t, batch):
        sdxl.where = {"dog": blob if 300 <= t <= 600 else other}
        return sdxl.attend_to_words(name, t, batch)

    def uniform(name, t, batch):  # every position attends to all: a walk makes the map even
        return torch.ones(batch, 1, 16 * 16, 16 * 16)

    chosen = dict(window=(0.3, 0.6), walk_iterations=walk_iterations)
    sdxl = Planted(
        {"dog": noise_picture(64, 64)}, cross_attention=misleading, self_attention=uniform, **chosen
    )
    sdxl.where = {"dog": blob}
    if walk_iterations:
        with pytest.raises(ValueError, match="the mask is empty"):
            alchemy.insert(sdxl, "a dog", "dog", "sks")
    else:
        assert iou(alchemy.insert(sdxl, "a dog", "dog", "sks").soft > 0.5, blob > 0) > 0.8


@pytest.mark.parametrize(
    "size, expected",
    [
        ((64, 64), (64, 64)),
        ((48, 84), (48, 84)),
        ((46, 82), (46, 82)),  # a scene's own size stays, odd latent sides too
        ((65, 64), (64, 64)),
        ((640, 640), (64, 64)),
        ((16, 16), (64, 64)),
        ((400, 1000), (40, 104)),
        ((3000, 1500), (88, 48)),
        ((3, 3000), (16, 2024)),
    ],
)
def test_the_model_resolution_has_the_trained_area_and_fits_the_latents(size, expected):
    assert segmentation.model_resolution(Planted({}), size) == expected


@pytest.mark.parametrize("peak, warned", [(0.3, False), (0.05, True)])
def test_a_word_that_attention_hardly_reacts_to_is_a_warning(peak, warned, recwarn):
    sdxl = Planted({"dog": noise_picture(64, 64)}, where={"dog": ellipse(64, 64)})

    def scaled(name, t, batch):
        return sdxl.attend_to_words(name, t, batch) * peak / 0.3

    sdxl.tables["attn2"] = scaled
    alchemy.segment(sdxl, noise_picture(64, 64), "dog")
    alchemy.insert(sdxl, "a dog", "dog", "sks")
    messages = [str(warning.message) for warning in recwarn]
    strength = f"hardly reacts to 'dog' (attention {77 * peak:.1f} times uniform"
    assert [strength in message for message in messages] == [True, True] * warned
