"""Contact sheets and the loss curve."""

import numpy as np
import pytest
import torch
from helpers.planted import noise_picture
from PIL import Image

from alchemy.extras.inspect import sheets


def pixels(picture):
    return np.asarray(picture).tolist()


@pytest.mark.parametrize(
    "size, shown",
    [
        ((64, 64), (256, 256)),
        ((100, 150), (300, 450)),
        ((1024, 1024), (1024, 1024)),
        ((20, 400), (40, 800)),
        ((3000, 1500), (1024, 512)),
    ],
)
def test_a_sheet_shows_small_pictures_enlarged_sharply_and_huge_ones_reduced(size, shown):
    picture = noise_picture(*size[::-1])
    made = sheets.fit_for_sheet(picture)
    assert made.size == shown
    if shown > size:
        factor = shown[0] // size[0]
        middles = slice(factor // 2, None, factor)
        assert np.array_equal(np.asarray(made)[middles, middles], np.asarray(picture))


def test_a_sheet_holds_every_picture_under_its_label():
    red, green = (Image.new("RGB", (256, 256), colour) for colour in ("red", "green"))
    long = "a label much longer than its picture is wide, and cut"
    page = np.asarray(sheets.sheet([[("a", red), (long, green)], [("b", green)]]))
    for colour, count in (([255, 0, 0], 1), ([0, 128, 0], 2)):
        assert (page == colour).all(-1).sum() == count * 256**2
    dimmed = sheets.outlined(red, torch.eye(256))
    assert pixels(dimmed)[0][:2] == [[255, 0, 0], [89, 0, 0]]
    assert pixels(sheets.grey(torch.tensor([[0, 0.5, 1]]))) == [[0, 128, 255]]


def test_a_loss_curve_is_drawn_with_gaps_and_without_a_value():
    for values in ([], [float("nan")], [1.0], [0.5, float("inf"), 0.4, float("nan"), 0.3] * 20):
        assert sheets.curve(values).size == (512, 256)
