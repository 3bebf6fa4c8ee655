"""The sheet of samplers: its formulas, each from its own paper, lead where the one step does, over a whole trajectory."""

import pytest
import torch
from PIL import Image

import alchemy
from alchemy.formats import png
from alchemy.extras.inspect import samplers
from conftest import ROOT

TITLES = [row[0] for row in samplers.ROWS]


@pytest.fixture(scope="module")
def found():
    """{title: (by the paper's formula, by alchemy.samplers)} of four steps on small latents."""
    return dict(
        zip(
            TITLES,
            samplers.trajectories(
                alchemy.load(ROOT / "weights" / "mini", "cpu", torch.float64), (8, 8), 4
            ),
        )
    )


@pytest.mark.parametrize("title", TITLES)
def test_the_formula_of_each_paper_leads_where_our_sampler_of_that_name_does(title, found, close):
    by_paper, ours = found[title]
    assert by_paper.shape == (4, 4, 8, 8)
    close(by_paper, ours, 1e-11)


@pytest.mark.parametrize(
    "title, other", [("Euler", "DDIM, eta 0"), ("DDIM, eta 1", "DDPM"), ("Euler ancestral", "DDPM")]
)
def test_those_that_are_one_step_draw_one_picture(title, other, found, close):
    assert samplers.ROWS[TITLES.index(title)][-1] == TITLES.index(other)
    close(found[title][0], found[other][0], 1e-11)


def test_fresh_noise_and_extrapolation_draw_others_from_the_same_start(found):
    ddim, others = (
        found["DDIM, eta 0"][0],
        [found[title][0] for title in ("DDPM", "DPM-Solver++(2M)")],
    )
    for x_0 in others:
        assert torch.equal(x_0[0], ddim[0]) and (x_0[-1] - ddim[-1]).abs().max() > 0.1


def test_the_sheet_that_ships_is_small_and_says_what_it_shows():
    path = ROOT / "alchemy" / "samplers.png"
    assert path.stat().st_size < 300_000
    assert png.facts_of(path) == {
        "prompt": samplers.PROMPT,
        "seed": samplers.SEED,
        "steps": samplers.STEPS,
        "weights": "weights/mini",
    }
    with Image.open(path) as sheet:
        assert sheet.width > 6 * 128 and sheet.height > 6 * 128


def test_a_sheet_that_is_no_png_is_refused_before_anything_is_drawn(tmp_path):
    with pytest.raises(ValueError, match="sheet.jpg: .* ends in .png"):
        samplers.main([str(tmp_path / "sheet.jpg")])
    assert not list(tmp_path.iterdir())
