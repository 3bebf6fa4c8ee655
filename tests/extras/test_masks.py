"""Masks by themselves: to the picture's edges, cleaned, grown, feathered; and the box around one. All by hand or by the definition."""

from collections import deque

import numpy as np
import pytest
import torch

from alchemy import insertion, segmentation
from helpers.planted import Planted, cone, ellipse, grey, iou, noise_picture


def drawing(text):
    """A mask drawn in # and dots."""
    return torch.tensor([[c == "#" for c in line] for line in text.split()])


# To the picture's size and edges


def direct_means(x, radius):
    """By the definition: the window around each pixel, cut at the border."""
    means = np.empty(x.shape)
    for (y, x_), _ in np.ndenumerate(x):
        means[y, x_] = x[
            max(y - radius, 0) : y + radius + 1, max(x_ - radius, 0) : x_ + radius + 1
        ].mean()
    return means


@pytest.mark.parametrize(
    "size, radius", [((9, 14), 2), ((13, 5), 1), ((6, 6), 9), ((1, 7), 2), ((12, 8), 0)]
)
def test_guided_filter_is_the_paper_by_its_definition_in_float64(size, radius):
    rng = np.random.default_rng(radius)
    p, i, eps = rng.random(size), rng.random(size), 1e-3
    mean = lambda x: direct_means(x, radius)  # noqa: E731
    a = (mean(i * p) - mean(i) * mean(p)) / (mean(i * i) - mean(i) ** 2 + eps)
    wanted = np.clip(mean(a) * i + mean(mean(p) - a * mean(i)), 0, 1)
    assert (
        np.abs(
            segmentation.guided_filter(torch.tensor(p), torch.tensor(i), radius, eps).numpy()
            - wanted
        ).max()
        < 1e-10
    )
    assert (
        np.abs(
            segmentation.guided_filter(
                torch.tensor(p).float(), torch.tensor(i).float(), radius, eps
            ).numpy()
            - wanted
        ).max()
        < 1e-3
    )


def test_a_window_mean_costs_the_same_whatever_its_radius_and_keeps_a_constant():
    x = torch.full((40, 60), 0.7)
    assert (segmentation.box_mean(x, 1000) - 0.7).abs().max() < 1e-6


@pytest.mark.parametrize("edge", [53, 54, 58, 60])
def test_the_masks_edge_moves_to_the_pictures(edge):
    picture = np.full((128, 128), 40)
    picture[:, edge:] = 210
    heat = torch.zeros(16, 16)
    heat[:, 7:] = 1  # its own edge is at pixel 56, and blurred
    rise = segmentation.to_pixels(heat, grey(picture))[64].diff()
    assert int(rise.argmax()) == edge - 1 and rise.max() > 0.25
    flat = segmentation.to_pixels(heat, grey(np.full((128, 128), 40)))[64].diff()
    assert flat.max() < 0.1  # where the picture has none, it stays soft


@pytest.mark.parametrize(
    "height, width", [(300, 300), (453, 701), (211, 97)], ids=["square", "wide", "tall"]
)
def test_heat_lands_on_its_own_place_at_pixel_size(height, width):
    blob = ellipse(height, width, (0.4, 0.6), (0.3, 0.25))
    heat = torch.nn.functional.interpolate(blob[None, None], (24, 31), mode="area")[0, 0]
    soft = segmentation.to_pixels(heat, noise_picture(height, width))
    assert soft.shape == (height, width) and soft.min() >= 0 and soft.max() <= 1
    assert iou(soft > 0.5, blob > 0) > 0.9


# To a region


def flood(mask):
    """The parts of a bool array by walking through them, diagonals too: a set of frozensets of pixels."""
    left, parts = {tuple(p) for p in np.argwhere(mask)}, set()
    while left:
        part, ahead = set(), deque([left.pop()])
        while ahead:
            y, x = ahead.popleft()
            part.add((y, x))
            near = {(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= near
            ahead.extend(near)
        parts.add(frozenset(part))
    return parts


@pytest.mark.parametrize(
    "size, share", [((1, 1), 1.0), ((9, 13), 0.4), ((20, 7), 0.3), ((15, 15), 0.6), ((5, 5), 0.0)]
)
def test_components_are_what_a_walk_finds(size, share):
    mask = np.random.default_rng(3).random(size) < share
    labels = segmentation.components(torch.tensor(mask)).numpy()
    assert ((labels > 0) == mask).all()
    assert {
        frozenset(map(tuple, np.argwhere(labels == n))) for n in np.unique(labels) if n
    } == flood(mask)


def test_specks_go_holes_are_filled_and_shapes_at_the_border_stay():
    mask = drawing("""
        ####......#
        #..#.......
        #..#...###.
        ####...#.#.
        .......###.
        #..........
        #....#.....
        ##.........""")
    assert torch.equal(
        segmentation.clean(mask),
        drawing("""
        ####.......
        ####.......
        ####...###.
        ####...###.
        .......###.
        #..........
        #..........
        ##........."""),
    )


def test_a_bay_that_opens_to_the_border_is_no_hole():
    mask = drawing("#####  #...#  #...#".replace("  ", "\n"))
    assert torch.equal(segmentation.clean(mask), mask)


def test_a_part_counts_from_a_fifth_of_the_largest():
    mask = torch.zeros(20, 40, dtype=torch.bool)
    mask[2:12, 2:12] = True  # 100
    mask[2:6, 20:25] = True  # 20
    mask[12:13, 20:39] = True  # 19
    wanted = mask.clone()
    wanted[12:13, 20:39] = False
    assert torch.equal(segmentation.clean(mask), wanted)


def test_large_masks_are_cleaned_on_a_coarse_grid_to_their_own_edges():
    blob = ellipse(613, 1001, (0.45, 0.5), (0.3, 0.2)) > 0
    mask = blob.clone()
    mask[20:30, 900:910], mask[600:, 40:50] = True, True  # specks, one at the border
    mask[250:275, 480:505] = False  # a hole
    assert torch.equal(segmentation.clean(mask), blob)


@pytest.mark.parametrize("size", [(40, 40), (23, 60), (61, 20)])
def test_a_region_is_grown_by_a_square_of_a_share_of_the_shorter_side(size):
    mask = torch.zeros(size)
    mask[5:9, 6:9] = 0.4
    wanted = torch.zeros(size)
    r = round(0.1 * min(size))
    wanted[5 - r : 9 + r, 6 - r : 9 + r] = 1
    assert torch.equal(segmentation.to_mask(mask, 0.4, 0.1), wanted)
    assert torch.equal(segmentation.to_mask(mask, 0.4, 0), (mask > 0).float())


def test_an_empty_mask_and_one_that_covers_everything_are_errors_that_name_the_flag():
    soft = torch.linspace(0, 0.9, 10000).view(100, 100)
    with pytest.raises(ValueError, match="the mask is empty.*lower --threshold, or give --mask"):
        segmentation.to_mask(soft, 0.95, 0.03)
    with pytest.raises(ValueError, match="the mask covers the whole picture; raise --threshold"):
        segmentation.to_mask(soft, 0.0, 0.03)
    assert segmentation.to_mask(soft, 0.5, 0.03).max() == 1


# The feather


@pytest.mark.parametrize("width", [1, 2, 5])
@pytest.mark.parametrize("size", [(17, 17), (12, 23), (25, 9)])
def test_feather_is_the_lowest_cone_over_every_pixel_and_lies_within(size, width):
    rng = np.random.default_rng(width)
    hard = ellipse(*size, (0.5, 0.4), (0.4, 0.4)).numpy()
    for mask in (hard, hard * rng.random(size), rng.random(size), np.ones(size)):
        made = insertion.feather(torch.tensor(mask, dtype=torch.float32), width).numpy()
        assert np.abs(made - cone(mask, width)).max() < 1e-6
        assert (
            (made <= mask.astype(np.float32)).all()
            and (made[mask == 0] == 0).all()
            and (made[mask > 0] > 0).all()
        )


def test_feather_falls_off_linearly_to_the_first_pixel_outside():
    mask = torch.zeros(30, 30)
    mask[5:25, :20] = 1  # reaches the picture's left edge, where nothing is to be hidden
    made = insertion.feather(mask, 3)
    assert made[15, 14:22].tolist() == [1, 1, 1, 0.75, 0.5, 0.25, 0, 0]
    assert made[3:10, 8].tolist() == [0, 0, 0.25, 0.5, 0.75, 1, 1] and made[15, 0] == 1


def test_a_mask_thinner_than_its_feather_keeps_its_peak():
    mask = torch.zeros(20, 40)
    mask[9:12] = 0.8
    made = insertion.feather(mask, 10)
    assert torch.allclose(made[8:13, 20], torch.tensor([0, 0.4, 0.8, 0.4, 0]))
    line = torch.zeros(9, 9)
    line[4, 2:7] = 1
    assert torch.equal(insertion.feather(line, 4), line)
    assert insertion.feather(torch.zeros(5, 5), 2).max() == 0


# The box, and the size to work at in it


@pytest.mark.parametrize(
    "size, wanted",
    [
        ((64, 64), (64, 64)),
        ((48, 84), (48, 84)),
        ((46, 82), (46, 82)),  # a scene's own size stays, odd latent sides too
        ((65, 64), (64, 64)),
        ((640, 640), (64, 64)),
        ((16, 16), (64, 64)),
        ((400, 1000), (40, 104)),
        ((3000, 1500), (88, 48)),
        ((128, 128), (64, 64)),
        ((32, 32), (64, 64)),
        ((3, 3000), (16, 2024)),
    ],
)
def test_working_size_has_the_trained_area_and_fits_the_latents(size, wanted):
    assert segmentation.working_size(Planted({}), size) == wanted


def boxes():
    for name, (height, width) in {
        "portrait": (1200, 800),
        "landscape": (453, 701),
        "panorama": (300, 2400),
        "tower": (1999, 260),
        "small": (50, 61),
    }.items():
        for place, (top, left) in {
            "middle": (0.4, 0.45),
            "corner": (0, 0),
            "far corner": (0.75, 0.75),
            "border": (0.3, 0.75),
        }.items():
            for share, (down, across) in {
                "part": (0.25, 0.25),
                "flat": (0.03, 0.2),
                "upright": (0.25, 0.02),
                "tiny": (0, 0),
            }.items():
                yield pytest.param(
                    (height, width), (top, left), (down, across), id=f"{name}-{place}-{share}"
                )


@pytest.mark.parametrize("picture, corner, extent", list(boxes()))
@pytest.mark.parametrize("crop", [True, False])
def test_the_box_holds_the_mask_and_has_the_working_sizes_aspect_ratio(
    picture, corner, extent, crop
):
    sdxl, mask = Planted({}), torch.zeros(picture)
    first = [int(side * c) for side, c in zip(picture, corner)]
    end = [min(f + max(1, round(side * e)), side) for f, side, e in zip(first, picture, extent)]
    mask[first[0] : end[0], first[1] : end[1]] = 1
    (top, left, height, width), work = insertion.work_box(sdxl, mask, crop)
    assert 0 <= top and 0 <= left and top + height <= picture[0] and left + width <= picture[1]
    scale = max(height / work[0], width / work[1])
    assert (
        abs(work[0] * scale - height) <= 1 and abs(work[1] * scale - width) <= 1
    )  # nothing is stretched
    assert (
        all(side % sdxl.vae_scale_factor == 0 for side in work)
        and 0.4 * 64**2 < work[0] * work[1] <= 1.5 * 64**2
    )
    for start, length, a, b, side, other, whole in zip(
        (top, left), (height, width), first, end, picture, (width, height), picture[::-1]
    ):
        if b - a <= length:
            assert start <= a and b <= start + length
        else:
            assert (
                other == whole
            )  # as far as the aspect ratio lets it: the other side takes all there is
        if crop and other < whole:
            assert length >= min(2 * (b - a), side)  # half its size again around it
    if crop and extent == (0, 0):
        assert (
            min(height, width) <= 40
            and max(height, width) >= 16
            and height * width < 0.6 * mask.numel()
        )
    if not crop:
        assert height == picture[0] or width == picture[1]


@pytest.mark.parametrize("size", [(64, 64), (48, 84), (92, 44), (46, 82), (56, 60)])
def test_a_picture_of_a_size_that_is_drawn_is_worked_on_as_it_is(size):
    mask = torch.zeros(size)
    mask[10:20, 10:20] = 1
    assert insertion.work_box(Planted({}), mask, False) == ((0, 0, *size), size)
