"""The Python of the README, run as it stands there, and what the README says of it."""

import math
import re
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, deviation

import alchemy
from alchemy import samplers
from alchemy.schedule import Schedule
from alchemy.sdxl import Conditioning

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
SECTION = re.search(r"^## Hack on the sampler\n.*?(?=^## )", TEXT, re.M | re.S)[0]


def blocks(text):
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


@cache
def namespace():
    """What the blocks of the section leave behind, run one after another in one namespace; `pictures` is the image of each."""
    space, pictures = {}, []
    for block in blocks(SECTION):
        exec(compile(block, "README.md", "exec"), space)
        pictures.append(space.pop("image"))
    return space | {"pictures": pictures, "scope": space}


@pytest.fixture
def readme(monkeypatch):
    """The names of the namespace; `scope` is where its functions look them up."""
    monkeypatch.chdir(ROOT)
    return SimpleNamespace(**namespace())


def level(step):
    return (1 / step.alpha_bar - 1) ** 0.5


def states(steps):
    return torch.cat([step.x_t for step in steps] + [steps[-1].x_prev])


def test_the_first_example_draws_a_picture_in_30_steps(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    [block] = blocks(TEXT.replace(SECTION, ""))
    exec(compile(block, "README.md", "exec"), found := {})
    assert (
        found["image"].shape == (1, 3, 128, 128) and len(capsys.readouterr().out.splitlines()) == 30
    )


def test_the_sampler_is_complete_in_at_most_20_lines():
    first = blocks(SECTION)[0]
    assert len([line for line in first.splitlines() if line.strip()]) <= 20
    assert all(
        used in first
        for used in (
            "alchemy.load",
            ".encode_prompt",
            ".unet",
            ".schedule",
            "alchemy.noise",
            ".vae.decode",
        )
    )


def test_each_block_draws_a_picture(readme):
    assert len(readme.pictures) == 3
    for picture in readme.pictures:
        assert picture.shape == (1, 3, 128, 128) and picture.abs().max() < 2 and picture.std() > 0.1


def test_20_steps_of_heun_lead_to_within_a_tenth_of_where_60_of_euler_do(readme):
    noise = alchemy.noise((1, 4, 8, 8), [0])
    *_, last = alchemy.denoise(
        readme.sdxl, noise, readme.told, readme.untold, spacing="linspace", steps=60
    )
    assert (
        deviation(readme.heun(noise, 20), last.x_prev) < 0.1
    )  # of the miniature, as it is trained: 0.06


def test_of_steps_half_as_long_heun_keeps_a_quarter_of_the_error_and_euler_half(
    readme, monkeypatch
):
    """On an ODE that is known, that of unit Gaussian pictures: ε = √(1−ᾱ) x, by which x keeps its length; at the end x_0 is √ᾱ x."""
    schedule, told = (
        Schedule.from_config({}),
        Conditioning(torch.zeros(1, 1, 1), torch.zeros(1, 1), torch.zeros(1, 6)),
    )
    toy = SimpleNamespace(
        unet=lambda x, t, *_: (1 - schedule.alpha_bar_at(t)) ** 0.5 * x, schedule=schedule
    )
    for name, value in {"sdxl": toy, "told": told, "untold": told}.items():
        monkeypatch.setitem(readme.scope, name, value)
    noise = torch.ones(1, 4, 2, 2, dtype=torch.float64)
    exact = (schedule.alpha_bar_at(0) * (1 - schedule.alpha_bar_at(999))) ** 0.5 * noise
    heun, euler = [], []
    for steps in (50, 100):
        *_, last = alchemy.denoise(toy, noise, told, spacing="linspace", steps=steps)
        (
            heun.append(deviation(readme.heun(noise, steps), exact)),
            euler.append(deviation(last.x_prev, exact)),
        )
    assert 3.5 < heun[0] / heun[1] < 4.5 and 1.8 < euler[0] / euler[1] < 2.2, (heun, euler)


def test_guidance_in_an_interval_is_none_outside_it_and_all_of_it_inside(readme):
    inside = [0.3 < level(step) <= 5.0 for step in readme.steps]
    assert sorted(set(inside)) == [False, True] and not inside[0] and not inside[-1]
    for step, mixed in zip(readme.steps, inside):
        cond, uncond = (
            readme.sdxl.unet(step.x_t, step.t, *c.parts()) for c in (readme.told, readme.untold)
        )
        assert torch.equal(step.eps, uncond + 5.0 * (cond - uncond) if mixed else cond)


@pytest.mark.parametrize("low, high, guidance", [(0.0, math.inf, 5.0), (0.0, 0.0, 1.0)])
def test_an_interval_of_all_levels_is_plain_guidance_and_one_of_none_is_no_guidance(
    low, high, guidance, readme, close
):
    noise, drawing = alchemy.noise((1, 4, 8, 8), [0]), dict(sampler="dpmpp_2m", steps=5)
    model = SimpleNamespace(
        unet=partial(readme.guided, low=low, high=high), schedule=readme.sdxl.schedule
    )
    plain = alchemy.denoise(
        readme.sdxl, noise, readme.told, readme.untold, guidance=guidance, **drawing
    )
    close(
        states(list(alchemy.denoise(model, noise, readme.told, **drawing))),
        states(list(plain)),
        1e-4,
    )


def test_outside_the_interval_the_network_is_called_once_a_step(readme, monkeypatch):
    calls = []
    monkeypatch.setitem(
        readme.scope,
        "sdxl",
        SimpleNamespace(unet=lambda x, t, *_: calls.append(t) or x, schedule=readme.sdxl.schedule),
    )
    steps = list(alchemy.denoise(readme.model, readme.noise, readme.told, steps=12))
    assert len(calls) == 12 + sum(0.3 < level(step) <= 5.0 for step in steps)


def test_the_hook_pulls_the_mean_colour_by_a_tenth_of_what_it_lacks(readme, close):
    for step in readme.pulled:
        plain = samplers.renoise(step.x_0, step.eps, step.alpha_bar_prev)
        lacks = readme.goal - step.x_0.mean((2, 3), keepdim=True)
        close(step.x_prev, plain + 0.1 * step.alpha_bar_prev**0.5 * lacks, 1e-6)
    *_, plain = alchemy.denoise(readme.sdxl, readme.noise, readme.told, readme.untold, steps=12)
    before, after = (
        (latents.mean((2, 3), keepdim=True) - readme.goal).norm()
        for latents in (plain.x_prev, readme.pulled[-1].x_prev)
    )
    assert after < 0.8 * before, (before, after)
