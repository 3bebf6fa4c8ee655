"""Each paper's formula follows the same trajectory as alchemy's sampler of that name."""

import pytest
import samplers_sheet
import torch
from helpers.comparison import ROOT
from samplers_sheet import ROWS

import alchemy
from alchemy.formats import png

TITLES = [row[0] for row in ROWS]


@pytest.fixture(scope="module")
def found():
    """{title: (by the paper's formula, by alchemy.samplers)} of four steps on small latents."""
    sdxl = alchemy.load(ROOT / "weights" / "mini", "cpu", torch.float64)
    return samplers_sheet.trajectories(sdxl, (8, 8), 4)


@pytest.mark.parametrize("title", TITLES)
def test_each_papers_formula_follows_the_trajectory_of_our_sampler(title, found, close):
    by_paper, ours = found[title]
    assert by_paper.shape == (4, 4, 8, 8)
    close(by_paper, ours, 1e-11)


@pytest.mark.parametrize(
    "title, other", [("Euler", "DDIM, eta 0"), ("DDIM, eta 1", "DDPM"), ("Euler ancestral", "DDPM")]
)
def test_samplers_that_are_one_step_give_one_image(title, other, found, close):
    assert ROWS[TITLES.index(title)][-1] == TITLES.index(other)
    close(found[title][0], found[other][0], 1e-11)


def test_new_noise_and_extrapolation_differ_from_ddim_after_the_same_start(found):
    ddim = found["DDIM, eta 0"][0]
    for title in ("DDPM", "DPM-Solver++(2M)"):
        x_0 = found[title][0]
        assert torch.equal(x_0[0], ddim[0]) and (x_0[-1] - ddim[-1]).abs().max() > 0.1


def test_the_sheet_in_the_repository_names_its_settings():
    path = ROOT / "alchemy" / "samplers.png"
    expected = {"prompt": samplers_sheet.PROMPT, "seed": samplers_sheet.SEED}
    expected |= {"steps": samplers_sheet.STEPS, "weights": "weights/mini"}
    assert path.stat().st_size < 300_000 and png.read_metadata(path) == expected
