"""The seam figure: 1 for an untouched scene, higher the more visible the mask's edge is."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from alchemy import images
from alchemy.extras.inspect.seam import coherent_jump, jump_ratio, pairs, seam

SIZE = 96
Y, X = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
RADIUS = ((Y - SIZE / 2) ** 2 + (X - SIZE / 2) ** 2).sqrt()


def texture(contrast):
    """A random scene (3,96,96) of soft spots."""
    spots = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    return F.interpolate(spots * contrast, (SIZE, SIZE), mode="bicubic")[0].clamp(-1, 1)


def insertion(scene, generated, feather):
    """A disc of radius 28 in the scene is replaced by `generated`, all of it feather pixels in."""
    feathered = ((28 - RADIUS) / (feather + 1)).clamp(0, 1)
    before, after = images.to_image(scene), images.to_image(generated)
    result = images.composite(before, after, feathered)
    return SimpleNamespace(scene=before, result=result, feathered=feathered)


@pytest.mark.parametrize("contrast", [0.0, 0.1, 0.3])
def test_an_untouched_scene_has_seam_1(contrast):
    scene = texture(contrast)
    assert seam(insertion(scene, scene, 3)) == 1


@pytest.mark.parametrize("contrast", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("width, feather", [(3, 0), (6, 0), (6, 3), (28, 3)])
def test_a_plain_rim_around_the_mask_has_a_high_seam(contrast, width, feather):
    scene = texture(contrast)
    rim = torch.where(width > 28 - RADIUS, torch.tensor(0.3), scene)
    assert seam(insertion(scene, rim, feather)) > 1.5


def test_other_texture_without_an_edge_has_a_seam_near_1():
    scene = texture(0.2)
    other = torch.where(RADIUS > 20, scene, scene.flip(-1))
    assert seam(insertion(scene, other, 3)) < 1.05


def test_the_seam_grows_with_the_step_and_not_below_two_grey_levels():
    flat = torch.full((3, SIZE, SIZE), -0.5 / 127.5)  # grey level 127
    levels = [seam(insertion(flat, flat + step / 127.5, 0)) for step in (1, 2, 4, 20)]
    assert levels[:2] == [1, 1] and 1.2 < levels[2] < 2 and 5 < levels[3] <= 10


def test_each_side_of_the_mask_counts_by_its_own_texture():
    """A step on the smooth half is not hidden by the texture of the other half."""
    scene = torch.where(X < SIZE / 2, texture(0.5), torch.tensor(0.0))
    smooth_half = torch.where((X >= SIZE / 2) & (RADIUS < 28), scene + 0.3, scene)
    assert seam(insertion(scene, smooth_half, 0)) > 3


def test_the_jump_is_the_signed_mean_over_neighbouring_pairs():
    image = torch.tensor([[0.0, 1, 5], [2, 7, 9]]).expand(3, 2, 3)
    here, there = pairs(image, 0, 1)
    assert here[0].tolist() == [[0, 1], [2, 7]] and there[0].tolist() == [[1, 5], [7, 9]]
    here, there = pairs(image, 1, -1)
    assert here[0].tolist() == [[1, 5]] and there[0].tolist() == [[2, 7]]
    crossing = torch.tensor([[True, False], [False, True]])  # jumps of 1 and 2
    assert coherent_jump(image, crossing, (0, 1), 0) == pytest.approx(1.5)
    opposite = image * torch.tensor([[1.0], [-1]])  # jumps of 1 and -2
    assert coherent_jump(opposite, crossing, (0, 1), 0) == pytest.approx(1.5)
    assert coherent_jump(opposite, crossing, (0, 1), 1) == pytest.approx(0.5)


def test_a_mask_of_the_whole_image_has_no_boundary():
    scene = texture(0.1)
    everywhere = torch.ones(SIZE, SIZE, dtype=torch.bool)
    assert jump_ratio(scene.flip(-1), scene, everywhere, 4, 8) == 1
