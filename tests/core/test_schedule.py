"""The noise schedule against diffusers' tables (tests/reference/schedule.safetensors)."""

import pytest
import torch

from alchemy.schedule import Schedule, noise_ratio

SPACINGS = ("leading", "trailing", "linspace")
COUNTS = (1, 7, 16, 20, 25, 30, 40, 50, 999, 1000)
SDXL = Schedule.from_config({})
ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
V = Schedule.from_config(ZERO_SNR | {"timestep_spacing": "trailing"})


def first_of(pairs):
    return [t for t, _ in pairs]


def test_alpha_bar_matches_the_reference(reference, close):
    stored = reference("schedule")
    close(SDXL.alpha_bar, stored["alpha_bar"], 1e-12)
    close(V.alpha_bar, stored["alpha_bar_zero_snr"], 1e-12)
    close(SDXL.alpha_bar, stored["diffusers/alpha_bar"], 3e-5)
    assert V.alpha_bar[-1] == 0 and noise_ratio(V.alpha_bar_at(999)) == float("inf")


def test_linear_betas_are_linear():
    beta = torch.linspace(0.1, 0.2, 5, dtype=torch.float64)
    config = dict(beta_schedule="linear", beta_start=0.1, beta_end=0.2, num_train_timesteps=5)
    assert torch.equal(Schedule.from_config(config).alpha_bar, torch.cumprod(1 - beta, 0))


@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_match_diffusers_and_each_step_leads_to_the_next(reference, spacing):
    for steps in COUNTS:
        expected = reference("schedule")[f"timesteps/{spacing}_{steps}"].tolist()
        if (spacing, steps) == ("leading", 1000):
            expected = [t - 1 for t in expected]  # diffusers' begins at t = 1000, beyond the table
        pairs = SDXL.timesteps(steps, spacing)
        assert pairs == list(zip(expected, [*expected[1:], None], strict=True)), steps


def test_fractional_timesteps_and_their_sigmas_are_those_of_diffusers_euler(reference, close):
    stored = reference("schedule")
    for steps in COUNTS:
        expected = stored[f"timesteps/linspace_fractional_{steps}"].tolist()
        assert first_of(SDXL.timesteps(steps, "linspace", fractional=True)) == expected
    for spacing in SPACINGS:
        for steps in (7, 30, 50):
            ts = first_of(SDXL.timesteps(steps, spacing, fractional=True))
            sigmas = torch.tensor([noise_ratio(SDXL.alpha_bar_at(t)) for t in ts])
            close(sigmas, stored[f"sigmas/{spacing}_{steps}"][:-1], 2e-6)


def test_between_timesteps_sigma_is_interpolated_not_alpha_bar():
    low, high = (noise_ratio(SDXL.alpha_bar_at(t)) for t in (500, 501))
    between = noise_ratio(SDXL.alpha_bar_at(500.25))
    assert between == pytest.approx(0.75 * low + 0.25 * high, rel=1e-13)


def test_trailing_starts_at_the_last_timestep_for_any_count():
    # diffusers' np.arange(1000, 0, -1000/N) has an element too many for N = 61, 103, ...
    for steps in range(1, 1001):
        ts = first_of(SDXL.timesteps(steps, "trailing"))
        assert ts[0] == 999 and len(ts) == steps


def test_lcm_timesteps_are_among_the_50_of_its_distillation():
    assert first_of(SDXL.timesteps(1, "lcm")) == [999]
    assert first_of(SDXL.timesteps(4, "lcm")) == [999, 759, 499, 259]
    assert first_of(SDXL.timesteps(8, "lcm")) == [999, 879, 759, 639, 499, 379, 259, 139]
    assert first_of(SDXL.timesteps(50, "lcm")) == [*range(999, 0, -20)]


def test_offset_and_spacing_come_from_the_checkpoint_unless_given():
    assert SDXL.timesteps(50)[-1] == (1, None)
    assert Schedule.from_config({"steps_offset": 0}).timesteps(50)[-1] == (0, None)
    assert V.timesteps(30) == V.timesteps(30, "trailing") != V.timesteps(30, "leading")


@pytest.mark.parametrize(
    "steps, strength, runs",
    [(50, 0.58, 29), (100, 0.29, 29), (50, 0.3, 15), (30, 0.8, 24), (30, 1.0, 30), (10, 0.99, 9)],
)
def test_strength_keeps_the_last_steps_without_rounding_errors(steps, strength, runs):
    assert SDXL.timesteps(steps, strength=strength) == SDXL.timesteps(steps)[steps - runs :]


@pytest.mark.parametrize(
    "call, options, message",
    [
        (SDXL.timesteps, dict(steps=0), "steps is 0"),
        (SDXL.timesteps, dict(steps=1001), "steps is 1001"),
        (SDXL.timesteps, dict(steps=51, spacing="lcm"), "between 1 and 50"),
        (SDXL.timesteps, dict(steps=3, strength=0.3), "is no step"),
        (SDXL.timesteps, dict(steps=9, strength=0.0), "strength is 0.0"),
        (SDXL.timesteps, dict(steps=9, strength=1.1), "strength is 1.1"),
        (SDXL.timesteps, dict(steps=9, spacing="karras"), "timestep spacing is 'karras'"),
        (Schedule.from_config, {"prediction_type": "sample"}, "prediction_type is 'sample'"),
        (Schedule.from_config, {"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule"),
        (Schedule.from_config, {"timestep_spacing": "log"}, "timestep_spacing"),
        (Schedule.from_config, {"trained_betas": [0.1, 0.2]}, "trained_betas"),
        (Schedule.from_config, {"_class_name": "FlowMatchEulerDiscrete"}, "flow matching"),
        (Schedule.from_config, {"use_flow_sigmas": True}, "flow matching"),
        (Schedule.from_config, {"rescale_betas_zero_snr": True}, "needs v-prediction"),
    ],
)
def test_options_out_of_range_and_unsupported_configs_are_errors(call, options, message):
    with pytest.raises(ValueError, match=message):
        call(**options) if call == SDXL.timesteps else call(options)


@pytest.mark.parametrize("schedule", [SDXL, V], ids=["epsilon", "v"])
@pytest.mark.parametrize("t", [0, 500, 998])
def test_target_and_to_x0_eps_are_inverse(schedule, t, close):
    rng = torch.Generator().manual_seed(t)
    x_0, eps = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64, generator=rng)
    ts = torch.tensor([t] * 3)
    target, x_t = schedule.target(x_0, eps, ts), schedule.add_noise(x_0, eps, ts)
    back = schedule.to_x0_eps(target, x_t, schedule.alpha_bar_at(t))
    close(back[0], x_0, 1e-9)
    close(back[1], eps, 1e-9)


def test_v_prediction_needs_no_division_at_zero_snr():
    """v = √ᾱ ε − √(1−ᾱ) x_0, Salimans & Ho 2022; at ᾱ = 0 it is −x_0."""
    x_0, eps = torch.full((1, 1, 1, 1), 3.0), torch.full((1, 1, 1, 1), 2.0)
    last = torch.tensor([999])
    assert V.target(x_0, eps, last).item() == -3.0
    assert V.add_noise(x_0, eps, last).item() == 2.0
    assert [part.item() for part in V.to_x0_eps(-x_0, eps, 0.0)] == [3.0, 2.0]


def test_each_image_of_a_batch_is_noised_to_its_own_timestep():
    ts, one = torch.tensor([10, 900]), torch.ones(2, 1, 1, 1, dtype=torch.float64)
    x_t, snr = SDXL.add_noise(one, 2 * one, ts).flatten(), SDXL.snr(ts)
    for i, t in enumerate((10, 900)):
        ab = SDXL.alpha_bar_at(t)
        assert x_t[i].item() == pytest.approx(ab**0.5 + 2 * (1 - ab) ** 0.5, rel=1e-14)
        assert snr[i].item() == pytest.approx(noise_ratio(ab) ** -2, rel=1e-12)
