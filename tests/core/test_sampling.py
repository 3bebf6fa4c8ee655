"""The denoising loop against whole trajectories of the reference (tests/reference/{trajectories,img2img,masked}), state by state."""

import dataclasses
from functools import cache
from types import SimpleNamespace

import pytest
import torch

from alchemy import pipeline, sampling
from alchemy.schedule import Schedule
from alchemy.sdxl import Conditioning

SDXL = Schedule.from_config({})
V = Schedule.from_config({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True})
V_NOT_QUITE_ZERO = dataclasses.replace(
    V, alpha_bar=torch.cat([V.alpha_bar[:-1], torch.tensor([2.0**-24])])
)  # diffusers' Euler
ETAS = {"": None, "0": 0.0, "05": 0.5, "1": 1.0}
FILES = {
    "trajectories": [
        f"{s}_{g}"
        for s in ("ddpm", "euler", "euler_ancestral", "ddim_eta0", "ddim_eta05", "ddim_eta1")
        for g in ("leading", "trailing", "linspace")
    ]
    + [
        "ddim_eta0_trailing_25",
        "euler_trailing_v",
        "euler_trailing_v_exact",
        "ddim_eta0_trailing_v",
        "ddim_eta0_trailing_25_v",
        "ddim_eta1_trailing_v",
    ],
    "img2img": [
        f"{s}_leading_{n}_{strength}"
        for s in ("euler", "ddim_eta0")
        for n in (50, 30)
        for strength in (0.3, 0.8)
    ],
    "masked": [
        "euler_leading_0.8",
        "ddim_eta0_leading_0.8",
        "euler_ancestral_leading_0.5",
        "euler_trailing_0.6",
        "euler_leading_1.0",
    ],
}
ALL = [(file, name) for file, names in FILES.items() for name in names]


# First the loop alone, around a network of one line.


def toy(x, t, context, pooled, time_ids):
    return torch.sin(x * (1 + t / 1000)) * 0.7 + context.mean((1, 2)).view(-1, 1, 1, 1)


def told(*values):
    context = torch.tensor(values, dtype=torch.float64).view(-1, 1, 1).expand(-1, 5, 3)
    return Conditioning(context, context[:, 0], torch.zeros(len(values), 6))


MODEL, COND, UNCOND = SimpleNamespace(unet=toy, schedule=SDXL), told(0.3, -0.2), told(0.0, 0.1)
NOISE = sampling.noise((2, 4, 6, 5), [3, 4]).double()
PICTURE = sampling.noise((2, 4, 6, 5), [5, 6]).double()


def draw(*args, **options):
    return list(sampling.denoise(MODEL, *args, **{"steps": 8} | options))


def test_noise_depends_on_its_seed_alone():
    assert torch.equal(
        sampling.noise((3, 4, 6, 5), [9, 0, 4])[2], sampling.noise((2, 4, 6, 5), [3, 4])[1]
    )
    assert not torch.equal(*sampling.noise((2, 4, 6, 5), [0, 1]))
    assert torch.equal(
        sampling.noise((1, 4, 6, 5), [0])[0],
        torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0)),
    )


def test_a_seed_too_few_is_refused():
    with pytest.raises(ValueError, match="batch of 2"):
        sampling.noise((2, 4, 6, 5), [1])


def test_later_draws_depend_on_each_images_generator_alone(close):
    both = draw(NOISE, COND, UNCOND, sampler="ddpm", generators=sampling.generators([3, 4]))[
        -1
    ].x_prev
    for b, seed in enumerate((3, 4)):
        cond, uncond = (
            Conditioning(*(part[b : b + 1] for part in told.parts())) for told in (COND, UNCOND)
        )
        alone = draw(
            NOISE[b : b + 1], cond, uncond, sampler="ddpm", generators=sampling.generators([seed])
        )
        close(alone[-1].x_prev, both[b : b + 1], 1e-12)


def test_a_sampler_that_draws_noise_asks_for_generators():
    with pytest.raises(ValueError, match="generators"):
        draw(NOISE, COND, sampler="euler_ancestral")
    with pytest.raises(ValueError, match="generators"):
        draw(NOISE, COND, sampler="ddim", eta=0.5)


@pytest.mark.parametrize("schedule", [SDXL, V], ids=["epsilon", "v"])
def test_the_fields_of_a_step_agree_with_each_other(schedule, close):
    steps = list(
        sampling.denoise(
            SimpleNamespace(unet=toy, schedule=schedule),
            NOISE,
            COND,
            UNCOND,
            steps=8,
            grid="trailing",
            guidance=3.0,
        )
    )
    for s, after in zip(steps, steps[1:] + [None]):
        a, b = s.alpha_bar**0.5, (1 - s.alpha_bar) ** 0.5
        close(a * s.x_0 + b * s.eps, s.x_t, 1e-12)
        close(s.eps_uncond + 3.0 * (s.eps_cond - s.eps_uncond), s.eps, 1e-12)
        assert s.alpha_bar == schedule.alpha_bar_at(s.t) and (after or s).index == min(
            s.index + 1, 7
        )
        if after:
            assert (
                s.t_prev == after.t
                and s.alpha_bar_prev == after.alpha_bar
                and s.x_prev is after.x_t
            )
    assert (
        steps[-1].t_prev is None
        and steps[-1].alpha_bar_prev == 1.0
        and torch.equal(steps[-1].x_prev, steps[-1].x_0)
    )


def test_guidance_leads_from_unconditional_to_conditional():
    first = draw(NOISE, COND, UNCOND, guidance=4.0)[0]
    assert torch.equal(first.eps_uncond, toy(NOISE, first.t, *UNCOND.parts()))
    assert torch.equal(first.eps_cond, toy(NOISE, first.t, *COND.parts()))


def test_guidance_1_is_no_guidance_to_the_bit():
    plain, one = draw(NOISE, COND), draw(NOISE, COND, UNCOND, guidance=1.0)
    assert (
        torch.equal(plain[-1].x_prev, one[-1].x_prev)
        and one[0].eps_uncond is None
        and one[0].eps is one[0].eps_cond
    )


@pytest.mark.parametrize("schedule", [SDXL, V], ids=["epsilon", "v"])
def test_lcm_noises_the_boundary_conditions_x_0_anew_at_each_step(schedule, close):
    """Luo et al. 2023, eq. 9 and algorithm 2, written out with diffusers' constants: timestep_scaling 10, sigma_data 0.5."""
    given, drawn = sampling.generators([3, 4]), sampling.generators([3, 4])
    steps = list(
        sampling.denoise(
            SimpleNamespace(unet=toy, schedule=schedule),
            NOISE,
            COND,
            sampler="lcm",
            steps=50,
            generators=given,
        )
    )
    x, grid = NOISE, [999 - 20 * k for k in range(50)]
    for s, t, t_prev in zip(steps, grid, grid[1:] + [None]):
        ab, after = (
            float(schedule.alpha_bar[t]),
            1.0 if t_prev is None else float(schedule.alpha_bar[t_prev]),
        )
        said = toy(x, t, *COND.parts())
        x_0 = (
            (x - (1 - ab) ** 0.5 * said) / ab**0.5
            if schedule is SDXL
            else ab**0.5 * x - (1 - ab) ** 0.5 * said
        )
        x_0 = 0.25 / ((10 * t) ** 2 + 0.25) * x + 10 * t / ((10 * t) ** 2 + 0.25) ** 0.5 * x_0
        close(s.x_0, x_0, 1e-12)
        z = torch.stack([torch.randn(4, 6, 5, generator=g) for g in drawn]) if t_prev else 0
        close(s.x_prev, after**0.5 * x_0 + (1 - after) ** 0.5 * z, 3e-7)
        x = s.x_prev
    assert len(steps) == 50 and torch.equal(steps[-1].x_prev, steps[-1].x_0)


def test_a_picture_has_no_part_at_strength_1():
    assert torch.equal(
        draw(NOISE, COND, image=PICTURE, strength=1.0)[-1].x_prev, draw(NOISE, COND)[-1].x_prev
    )


def test_image_to_image_starts_from_the_picture_at_the_first_level():
    steps = draw(NOISE, COND, image=PICTURE, steps=50, strength=0.58)
    ab = SDXL.alpha_bar_at(561)
    assert (
        len(steps) == 29
        and steps[0].t == 561
        and torch.equal(steps[0].x_t, ab**0.5 * PICTURE + (1 - ab) ** 0.5 * NOISE)
    )


def test_strength_means_nothing_without_a_picture():
    assert len(draw(NOISE, COND, strength=0.5)) == 8


def test_a_hook_replaces_x_prev_and_none_leaves_it():
    seen = []
    plain, looked = draw(NOISE, COND), draw(NOISE, COND, hook=seen.append)
    assert torch.equal(plain[-1].x_prev, looked[-1].x_prev) and [s.index for s in seen] == list(
        range(8)
    )
    changed = draw(NOISE, COND, hook=lambda s: s.x_prev + 1 if s.index == 2 else None)
    assert (
        torch.equal(changed[2].x_prev, plain[2].x_prev + 1) and changed[3].x_t is changed[2].x_prev
    )


def test_whoever_iterates_can_stop_and_nothing_more_is_computed():
    calls = []
    model = SimpleNamespace(
        unet=lambda x, t, *rest: calls.append(t) or toy(x, t, *rest), schedule=SDXL
    )
    for step in sampling.denoise(model, NOISE, COND, steps=20):
        if step.index == 2:
            break
    assert len(calls) == 3


@pytest.mark.parametrize("sampler", ["euler", "ddim"])
def test_the_kept_region_is_at_the_level_just_reached_and_clean_at_the_end(sampler):
    mask = torch.zeros(1, 1, 6, 5, dtype=torch.float64)
    mask[..., 2:4, 1:3] = 1
    steps, kept = (
        draw(
            NOISE,
            COND,
            image=PICTURE,
            strength=0.75,
            sampler=sampler,
            hook=sampling.keep_background(PICTURE, NOISE, mask),
        ),
        mask.expand(2, 4, 6, 5) == 0,
    )
    for step in steps:
        ab = SDXL.alpha_bar_at(step.t_prev) if step.t_prev is not None else 1.0
        assert torch.equal(step.x_prev[kept], (ab**0.5 * PICTURE + (1 - ab) ** 0.5 * NOISE)[kept])
    assert (
        torch.equal(steps[-1].x_prev[kept], PICTURE[kept])
        and not torch.isclose(steps[-1].x_prev, PICTURE)[~kept].any()
    )


def test_no_masked_pixel_is_lost_in_the_latent_mask():
    mask = torch.zeros(16, 24)
    mask[5, 17], mask[9:12, 2] = 0.5, 1
    expected = torch.zeros(1, 1, 4, 6)
    expected[0, 0, 1, 4], expected[0, 0, 2, 0] = 0.5, 1
    assert torch.equal(pipeline.latent_mask(mask, 4), expected)


def test_a_size_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="multiples of 8"):
        pipeline.sample(SimpleNamespace(vae_scale_factor=8), COND, UNCOND, 0, (64, 60))


# Then whole trajectories of a network.


@pytest.fixture(scope="module")
def unet(network):
    return cache(lambda dtype: network("unet_a", dtype))


@pytest.fixture
def run(reference, unet, monkeypatch):
    """run(file, name, dtype): our Steps for a case of the reference, fed its noise. A generator here is an iterator of tensors."""
    monkeypatch.setattr(torch, "randn", lambda shape, generator: next(generator))

    def steps(file, name, dtype=torch.float64):
        stored = reference(file)
        case, given = (
            stored.facts["cases"][name],
            {k: v.to(dtype) for k, v in stored.group("inputs/").items()},
        )
        sampler, _, eta = case["sampler"].partition("_eta")
        euler = sampler == "euler" and not case["exact_zero"]
        schedule = (V_NOT_QUITE_ZERO if euler else V) if case["zero_snr"] else SDXL
        cond, uncond = (
            Conditioning(given[h + "/context"], given[h + "/pooled"], given["time_ids"].float())
            for h in ("cond", "uncond")
        )
        picture = (
            {"image": given["image"], "strength": case["strength"]} if case["strength"] else {}
        )
        hook = (
            sampling.keep_background(given["image"], given["noise"], given["mask"])
            if case["masked"]
            else None
        )
        z = stored["inputs/z"]
        return list(
            sampling.denoise(
                SimpleNamespace(unet=unet(dtype), schedule=schedule),
                given["noise"],
                cond,
                uncond,
                **picture,
                sampler=sampler,
                grid=case["spacing"],
                steps=case["steps"],
                guidance=float(stored.facts["guidance"]),
                eta=ETAS[eta],
                generators=[iter(z[:, b]) for b in range(z.shape[1])],
                hook=hook,
            )
        )

    return steps


def states(steps):
    return [step.x_t for step in steps] + [steps[-1].x_prev]


@pytest.mark.parametrize("file, name", ALL, ids=map("-".join, ALL))
def test_every_state_of_a_trajectory(file, name, reference, run, close, exact):
    """Float64 against the formulas at 1e-9; the same against diffusers' schedulers, which ran in float32, at 1e-5."""
    stored, steps = reference(file), run(file, name)
    assert [step.t for step in steps] == stored[f"timesteps/{name}"].tolist()
    levels = [step.alpha_bar for step in steps] + [steps[-1].alpha_bar_prev]
    assert levels == pytest.approx(stored[f"alpha_bar/{name}"].tolist(), rel=1e-12)
    for ours, theirs in zip(states(steps), stored[f"x/{name}"], strict=True):
        close(ours, theirs, exact)
    if f"diffusers/{name}" in stored:
        for ours, theirs in zip(states(steps), stored[f"diffusers/{name}"], strict=True):
            close(ours, theirs, 1e-5)


@pytest.mark.parametrize(
    "name", ["ddpm_leading", "euler_leading", "euler_ancestral_linspace", "ddim_eta05_trailing"]
)
def test_a_float32_trajectory_agrees_to_1e_5(name, reference, run, close):
    for ours, theirs in zip(
        states(run("trajectories", name, torch.float32)),
        reference("trajectories")[f"x/{name}"],
        strict=True,
    ):
        close(ours, theirs, 1e-5)


def test_every_case_of_the_reference_is_run(reference):
    for file, names in FILES.items():
        assert set(reference(file).facts["cases"]) == set(names)
