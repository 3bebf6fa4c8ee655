"""README.md, WALK.md, CLI.md and the notebook agree with the code, and their Python runs."""

import itertools
import json
import math
import re
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
from helpers import flags
from helpers.comparison import ROOT, deviation
from helpers.notebook import NOTEBOOK, run

import alchemy
from alchemy.extras import other_tools
from alchemy.schedule import Schedule
from alchemy.sdxl import Conditioning

README = (ROOT / "README.md").read_text(encoding="utf-8")
WALK = (ROOT / "alchemy" / "WALK.md").read_text(encoding="utf-8")
STOPS = re.findall(r"\[([\w/]+\.py)\]\([\w/]+\.py\) `(\w+)`", WALK)
DOCUMENTS = ("README.md", "alchemy/WALK.md", "alchemy/GUIDE.md", "alchemy/CLI.md")


@pytest.mark.parametrize("file, name", STOPS)
def test_every_function_that_the_walk_names_is_defined_in_that_file(file, name):
    text = (ROOT / "alchemy" / file).read_text(encoding="utf-8")
    assert re.search(rf"^\s*(def|class) {name}\b", text, re.M)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_relative_link_leads_to_a_file(document):
    path = ROOT / document
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text(encoding="utf-8"))
    missing = [link for link in links if not (path.parent / link).exists()]
    assert not missing


def test_the_readme_has_at_most_150_lines():
    assert len(README.splitlines()) <= 150


def test_the_flags_of_other_tools_in_the_readme_are_answered():
    [table] = re.findall(r"^\| there \|.*?\n\n", README, re.M | re.S)
    known = set(itertools.chain(*other_tools.FLAGS.values()))
    cells = [row.split("|") for row in table.strip().splitlines()[2:]]
    flags = re.findall(r"--([\w-]+)", " ".join(row[1] + row[3] for row in cells))
    assert len(flags) > 20 and set(flags) <= known


def test_the_table_of_flags_is_that_of_the_parsers():
    assert flags.CLI_MD.read_text(encoding="utf-8") == flags.document()


# The Python of README.md and WALK.md


def blocks(text):
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


@cache
def run_walk():
    """Run the blocks of WALK.md in one namespace; `images` holds the image of each."""
    scope, images = {}, []
    for block in blocks(WALK):
        exec(compile(block, "WALK.md", "exec"), scope)
        images.append(scope.pop("image"))
    return scope | {"images": images, "scope": scope}


@pytest.fixture
def walk(monkeypatch):
    """The names that the blocks define; `scope` is where their functions look names up."""
    monkeypatch.chdir(ROOT)
    return SimpleNamespace(**run_walk())


def noise_level(step):
    return (1 / step.alpha_bar - 1) ** 0.5


def test_the_readme_example_generates_an_image_in_30_steps(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    [block] = blocks(README)
    exec(compile(block, "README.md", "exec"), scope := {})
    assert scope["image"].shape == (1, 3, 128, 128)
    assert len(capsys.readouterr().out.splitlines()) == 30


def test_each_block_of_the_walk_generates_an_image(walk):
    assert len(walk.images) == 3
    for image in walk.images:
        assert image.shape == (1, 3, 128, 128)
        assert image.abs().max() < 2 and image.std() > 0.1


def test_halving_the_step_divides_the_error_of_heun_by_four_and_of_euler_by_two(walk, monkeypatch):
    """On the ODE of unit Gaussian images, ε = √(1−ᾱ) x, whose solution is known."""
    schedule = Schedule.from_config({})
    cond = Conditioning(torch.zeros(1, 1, 1), torch.zeros(1, 1), torch.zeros(1, 6))

    def unet(x, t, *_):
        return (1 - schedule.alpha_bar_at(t)) ** 0.5 * x

    model = SimpleNamespace(unet=unet, schedule=schedule)
    for name, value in {"sdxl": model, "cond": cond, "uncond": cond}.items():
        monkeypatch.setitem(walk.scope, name, value)
    noise = torch.ones(1, 4, 2, 2, dtype=torch.float64)
    exact = (schedule.alpha_bar_at(0) * (1 - schedule.alpha_bar_at(999))) ** 0.5 * noise
    heun, euler = [], []
    for steps in (50, 100):
        *_, last = alchemy.denoise(model, noise, cond, spacing="linspace", steps=steps)
        heun.append(deviation(walk.heun(noise, steps), exact))
        euler.append(deviation(last.x_prev, exact))
    assert 3.5 < heun[0] / heun[1] < 4.5
    assert 1.8 < euler[0] / euler[1] < 2.2


def test_guidance_in_an_interval_is_applied_inside_and_only_there(walk):
    inside = [0.3 < noise_level(step) <= 5.0 for step in walk.steps]
    assert set(inside) == {False, True}
    for step, guided in zip(walk.steps, inside):
        cond = walk.sdxl.unet(step.x_t, step.t, *walk.cond.parts())
        uncond = walk.sdxl.unet(step.x_t, step.t, *walk.uncond.parts())
        assert torch.equal(step.eps, uncond + 5.0 * (cond - uncond) if guided else cond)


@pytest.mark.parametrize("low, high, guidance", [(0.0, math.inf, 5.0), (0.0, 0.0, 1.0)])
def test_an_interval_of_all_levels_is_plain_guidance_and_an_empty_one_none(
    low, high, guidance, walk, close
):
    noise = alchemy.noise((1, 4, 8, 8), [0])
    unet = partial(walk.guided, low=low, high=high)
    model = SimpleNamespace(unet=unet, schedule=walk.sdxl.schedule)
    options = {"sampler": "dpmpp_2m", "steps": 5}
    plain = alchemy.denoise(walk.sdxl, noise, walk.cond, walk.uncond, guidance=guidance, **options)
    *_, ours = alchemy.denoise(model, noise, walk.cond, **options)
    *_, expected = plain
    close(ours.x_prev, expected.x_prev, 1e-4)


def test_the_hook_pulls_the_mean_colour_by_a_tenth_of_the_difference(walk, close):
    for step in walk.pulled:
        ab = step.alpha_bar_prev
        plain = ab**0.5 * step.x_0 + (1 - ab) ** 0.5 * step.eps
        difference = walk.goal - step.x_0.mean((2, 3), keepdim=True)
        close(step.x_prev, plain + 0.1 * ab**0.5 * difference, 1e-6)


# The notebook


def test_every_cell_of_the_notebook_runs_and_each_section_ends_in_an_image():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    images = [image for _, _, image in run(notebook) if image is not None]
    sections = [c for c in notebook["cells"] if "".join(c["source"]).startswith("## ")]
    assert len(sections) == 7
    assert len(images) >= 7


def test_the_notebook_is_stored_with_the_image_of_each_section():
    assert NOTEBOOK.read_text(encoding="utf-8").count('"image/png":') >= 7
