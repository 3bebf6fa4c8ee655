"""The denoising loop: its options on a toy network, then whole reference trajectories."""

import dataclasses
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from helpers.references import read_reference

import alchemy
from alchemy import pipeline, sampling
from alchemy.samplers import Sampler, renoise
from alchemy.schedule import Schedule
from alchemy.sdxl import Conditioning

SDXL = Schedule.from_config({})
V = Schedule.from_config({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True})
V_NOT_QUITE_ZERO = dataclasses.replace(  # diffusers' Euler
    V, alpha_bar=torch.cat([V.alpha_bar[:-1], torch.tensor([2.0**-24])])
)
ETAS = {"": None, "0": 0.0, "05": 0.5, "1": 1.0}
CASES = []
for file in ("trajectories", "img2img", "masked"):
    CASES += [(file, name) for name in read_reference(file).header["cases"]]


# The loop alone, around a network of one line.


def toy(x, t, context, pooled, time_ids):
    return torch.sin(x * (1 + t / 1000)) * 0.7 + context.mean((1, 2)).view(-1, 1, 1, 1)


def conditioning(*values):
    context = torch.tensor(values, dtype=torch.float64).view(-1, 1, 1).expand(-1, 5, 3)
    return Conditioning(context, context[:, 0], torch.zeros(len(values), 6))


MODEL = SimpleNamespace(unet=toy, schedule=SDXL)
COND, UNCOND = conditioning(0.3, -0.2), conditioning(0.0, 0.1)
NOISE = sampling.noise((2, 4, 6, 5), [3, 4]).double()
IMAGE = sampling.noise((2, 4, 6, 5), [5, 6]).double()


def run_toy(*args, schedule=SDXL, **options):
    model = SimpleNamespace(unet=toy, schedule=schedule)
    return list(alchemy.denoise(model, *args, **{"steps": 8} | options))


def test_the_noise_of_an_image_depends_on_its_seed_alone():
    three, two = sampling.noise((3, 4, 6, 5), [9, 0, 4]), sampling.noise((2, 4, 6, 5), [3, 4])
    assert torch.equal(three[2], two[1]) and not torch.equal(*two)
    expected = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(three[1], expected)
    with pytest.raises(ValueError, match="1 seeds for a batch of 2"):
        sampling.noise((2, 4, 6, 5), [1])


def test_later_noise_depends_on_each_images_generator_alone(close):
    options = dict(sampler="ddpm")
    both = run_toy(NOISE, COND, UNCOND, **options, generators=sampling.generators([3, 4]))
    for b, seed in enumerate((3, 4)):
        cond = Conditioning(*(part[b : b + 1] for part in COND.parts()))
        uncond = Conditioning(*(part[b : b + 1] for part in UNCOND.parts()))
        rng = sampling.generators([seed])
        alone = run_toy(NOISE[b : b + 1], cond, uncond, **options, generators=rng)
        close(alone[-1].x_prev, both[-1].x_prev[b : b + 1], 1e-12)


@pytest.mark.parametrize("options", [{"sampler": "euler_ancestral"}, {"sampler": "ddim", "eta": 1}])
def test_a_sampler_that_draws_noise_needs_generators(options):
    with pytest.raises(ValueError, match="generators"):
        run_toy(NOISE, COND, **options)


@pytest.mark.parametrize("schedule", [SDXL, V], ids=["epsilon", "v"])
def test_the_fields_of_a_step_are_consistent(schedule, close):
    steps = run_toy(NOISE, COND, UNCOND, schedule=schedule, spacing="trailing", guidance=3.0)
    assert [step.index for step in steps] == list(range(8))
    for step, after in zip(steps, steps[1:] + [None], strict=True):
        close(
            step.alpha_bar**0.5 * step.x_0 + (1 - step.alpha_bar) ** 0.5 * step.eps, step.x_t, 1e-12
        )
        close(step.eps_uncond + 3.0 * (step.eps_cond - step.eps_uncond), step.eps, 1e-12)
        assert step.alpha_bar == schedule.alpha_bar_at(step.t)
        if after:
            assert (step.t_prev, step.alpha_bar_prev) == (after.t, after.alpha_bar)
            assert step.x_prev is after.x_t
    assert steps[-1].t_prev is None and steps[-1].alpha_bar_prev == 1.0
    assert torch.equal(steps[-1].x_prev, steps[-1].x_0)


def test_guidance_goes_from_unconditional_to_conditional_and_1_is_none():
    first = run_toy(NOISE, COND, UNCOND, guidance=4.0)[0]
    assert torch.equal(first.eps_uncond, toy(NOISE, first.t, *UNCOND.parts()))
    assert torch.equal(first.eps_cond, toy(NOISE, first.t, *COND.parts()))
    plain, one = run_toy(NOISE, COND), run_toy(NOISE, COND, UNCOND, guidance=1.0)
    assert torch.equal(plain[-1].x_prev, one[-1].x_prev)
    assert one[0].eps_uncond is None and one[0].eps is one[0].eps_cond


def test_strength_1_and_strength_without_an_image_are_text_to_image():
    plain = run_toy(NOISE, COND)
    for options in (dict(image=IMAGE, strength=1.0), dict(strength=0.5)):
        steps = run_toy(NOISE, COND, **options)
        assert len(steps) == 8 and torch.equal(steps[-1].x_prev, plain[-1].x_prev)


def test_a_hook_replaces_x_prev_and_none_keeps_it():
    seen = []
    plain, observed = run_toy(NOISE, COND), run_toy(NOISE, COND, hook=seen.append)
    assert torch.equal(plain[-1].x_prev, observed[-1].x_prev) and len(seen) == 8
    changed = run_toy(NOISE, COND, hook=lambda s: s.x_prev + 1 if s.index == 2 else None)
    assert torch.equal(changed[2].x_prev, plain[2].x_prev + 1)
    assert changed[3].x_t is changed[2].x_prev


def test_a_sampler_of_ones_own_sees_each_step_and_the_one_before():
    seen = []

    def my_step(step, previous, eta, randn):
        seen.append((step, previous, eta, randn().shape))
        return renoise(step.x_0, step.eps, step.alpha_bar_prev)

    own = Sampler(my_step, eta=0.25, fractional=True, scaled_start=True)
    steps = run_toy(NOISE, COND, sampler=own, generators=sampling.generators([0, 1]))
    assert torch.equal(steps[-1].x_prev, run_toy(NOISE, COND, sampler="euler")[-1].x_prev)
    assert [s[1] for s in seen] == [None, *steps[:-1]]
    assert {s[2:] for s in seen} == {(0.25, NOISE.shape)}


def test_after_a_break_nothing_more_is_computed():
    calls = []

    def unet(x, t, *rest):
        calls.append(t)
        return toy(x, t, *rest)

    for step in alchemy.denoise(SimpleNamespace(unet=unet, schedule=SDXL), NOISE, COND, steps=20):
        if step.index == 2:
            break
    assert len(calls) == 3


@pytest.mark.parametrize("sampler", ["euler", "ddim"])
def test_the_background_is_at_the_level_just_reached_and_clean_at_the_end(sampler):
    mask = torch.zeros(1, 1, 6, 5, dtype=torch.float64)
    mask[..., 2:4, 1:3] = 1
    outside = mask.expand(2, 4, 6, 5) == 0
    hook = alchemy.keep_background(IMAGE, NOISE, mask)
    steps = run_toy(NOISE, COND, image=IMAGE, strength=0.75, sampler=sampler, hook=hook)
    for step in steps:
        ab = SDXL.alpha_bar_at(step.t_prev) if step.t_prev is not None else 1.0
        known = ab**0.5 * IMAGE + (1 - ab) ** 0.5 * NOISE
        assert torch.equal(step.x_prev[outside], known[outside])
    assert torch.equal(steps[-1].x_prev[outside], IMAGE[outside])
    assert not torch.isclose(steps[-1].x_prev, IMAGE)[~outside].any()


def test_no_masked_pixel_is_lost_in_the_latent_mask():
    mask = torch.zeros(16, 24)
    mask[5, 17], mask[9:12, 2] = 0.5, 1
    expected = torch.zeros(1, 1, 4, 6)
    expected[0, 0, 1, 4], expected[0, 0, 2, 0] = 0.5, 1
    assert torch.equal(pipeline.latent_mask(mask, 4), expected)


# Whole trajectories of a network.


@pytest.fixture(scope="module")
def unet(network):
    return cache(lambda dtype: network("unet_a", dtype))


@pytest.fixture
def run(reference, unet, monkeypatch):
    """run(file, name, dtype): our Steps for a reference case. A generator is an iterator here."""
    monkeypatch.setattr(torch, "randn", lambda shape, generator: next(generator))

    def steps(file, name, dtype=torch.float64):
        stored = reference(file)
        case = stored.header["cases"][name]
        inputs = {key: value.to(dtype) for key, value in stored.group("inputs/").items()}
        sampler, _, eta = case["sampler"].partition("_eta")
        schedule = SDXL
        if case["zero_snr"]:
            euler = sampler == "euler" and not case["exact_zero"]
            schedule = V_NOT_QUITE_ZERO if euler else V
        ids = inputs["time_ids"].float()
        cond = Conditioning(inputs["cond/context"], inputs["cond/pooled"], ids)
        uncond = Conditioning(inputs["uncond/context"], inputs["uncond/pooled"], ids)
        options = {}
        if case["strength"]:
            options |= {"image": inputs["image"], "strength": case["strength"]}
        if case["masked"]:
            known = inputs["image"], inputs["noise"], inputs["mask"]
            options["hook"] = sampling.keep_background(*known)
        z = stored["inputs/z"]
        steps = sampling.denoise(
            SimpleNamespace(unet=unet(dtype), schedule=schedule),
            inputs["noise"],
            cond,
            uncond,
            sampler=sampler,
            spacing=case["spacing"],
            steps=case["steps"],
            guidance=float(stored.header["guidance"]),
            eta=ETAS[eta],
            generators=[iter(z[:, b]) for b in range(z.shape[1])],
            **options,
        )
        return list(steps)

    return steps


def states(steps):
    return [step.x_t for step in steps] + [steps[-1].x_prev]


@pytest.mark.parametrize("file, name", CASES, ids=map("-".join, CASES))
def test_every_state_of_a_trajectory_matches_the_reference(
    file, name, reference, run, close, exact
):
    """At 1e-9 against the formulas in float64; at 1e-5 against diffusers, which ran in float32."""
    stored, steps = reference(file), run(file, name)
    assert [step.t for step in steps] == stored[f"timesteps/{name}"].tolist()
    levels = [step.alpha_bar for step in steps] + [steps[-1].alpha_bar_prev]
    assert levels == pytest.approx(stored[f"alpha_bar/{name}"].tolist(), rel=1e-12)
    for key, tolerance in ((f"x/{name}", exact), (f"diffusers/{name}", 1e-5)):
        if key in stored:
            for ours, theirs in zip(states(steps), stored[key], strict=True):
                close(ours, theirs, tolerance)


@pytest.mark.parametrize(
    "name", ["ddpm_leading", "euler_leading", "euler_ancestral_linspace", "ddim_eta05_trailing"]
)
def test_a_float32_trajectory_agrees_to_1e_5(name, reference, run, close):
    stored = reference("trajectories")[f"x/{name}"]
    for ours, theirs in zip(states(run("trajectories", name, torch.float32)), stored, strict=True):
        close(ours, theirs, 1e-5)
