"""The noise schedule against diffusers' tables and grids (tests/reference/schedule.safetensors) and against numbers known of SDXL."""

import dataclasses

import pytest
import torch

from alchemy.command import pace
from alchemy.schedule import Schedule

SPACINGS = ("leading", "trailing", "linspace")
COUNTS = (1, 7, 16, 20, 25, 30, 40, 50, 999, 1000)
SDXL = Schedule.from_config({})
V = Schedule.from_config(
    {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    }
)


def firsts(grid):
    return [t for t, _ in grid]


def sigma(ab):
    return ((1 - ab) / ab) ** 0.5


def test_alpha_bar_is_the_reference_in_float64(reference, close):
    close(SDXL.alpha_bar, reference("schedule")["alpha_bar"], 1e-12)
    close(V.alpha_bar, reference("schedule")["alpha_bar_zero_snr"], 1e-12)
    close(SDXL.alpha_bar, reference("schedule")["diffusers/alpha_bar"], 3e-5)


def test_alpha_bar_has_the_known_ends_of_sdxl():
    assert SDXL.alpha_bar_at(0) == pytest.approx(0.99915, abs=1e-9) and SDXL.alpha_bar_at(
        999
    ) == pytest.approx(0.0046601, abs=5e-8)
    assert sigma(SDXL.alpha_bar_at(999)) == pytest.approx(14.6146, abs=5e-5) and sigma(
        SDXL.alpha_bar_at(0)
    ) == pytest.approx(0.029167, abs=5e-7)


@pytest.mark.parametrize(
    "steps, t, level",
    [(20, 951, 11.028), (25, 961, 11.676), (30, 958, 11.477), (40, 976, 12.739), (50, 981, 13.120)],
)
def test_leading_grid_starts_at_the_known_t_and_sigma(steps, t, level):
    first = SDXL.timesteps(steps)[0][0]
    assert first == t and sigma(SDXL.alpha_bar_at(first)) == pytest.approx(level, abs=5e-4)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_are_those_of_diffusers(reference, spacing):
    for steps in COUNTS:
        theirs = reference("schedule")[f"timesteps/{spacing}_{steps}"].tolist()
        if (spacing, steps) == ("leading", 1000):
            theirs = [t - 1 for t in theirs]  # diffusers' begins at t = 1000, which no table has
        assert firsts(SDXL.timesteps(steps, spacing)) == theirs, steps


def test_fractional_timesteps_are_those_of_diffusers_euler_to_the_bit(reference):
    for steps in COUNTS:
        assert (
            firsts(SDXL.timesteps(steps, "linspace", fractional=True))
            == reference("schedule")[f"timesteps/linspace_fractional_{steps}"].tolist()
        )


def test_sigma_is_that_of_diffusers_euler_at_fractional_t_too(reference, close):
    for spacing in SPACINGS:
        for steps in (7, 30, 50):
            ours = torch.tensor(
                [
                    sigma(SDXL.alpha_bar_at(t))
                    for t in firsts(SDXL.timesteps(steps, spacing, fractional=True))
                ]
            )
            close(ours, reference("schedule")[f"sigmas/{spacing}_{steps}"][:-1], 2e-6)


def test_sigma_not_alpha_bar_is_what_is_interpolated():
    assert sigma(SDXL.alpha_bar_at(500.25)) == pytest.approx(
        0.75 * sigma(SDXL.alpha_bar_at(500)) + 0.25 * sigma(SDXL.alpha_bar_at(501)), rel=1e-13
    )


@pytest.mark.parametrize("spacing", SPACINGS)
def test_previous_timestep_is_the_next_grid_point_and_none_at_the_end(spacing):
    for steps in (*COUNTS, 61):
        grid = SDXL.timesteps(steps, spacing)
        assert [t_prev for _, t_prev in grid] == firsts(grid)[1:] + [None] and len(grid) == steps
        assert all(0 <= b < a <= 999 for a, b in grid[:-1])


def test_trailing_grid_starts_at_the_last_timestep_whatever_the_count():
    # diffusers' np.arange(1000, 0, -1000/N) has an element too many for N = 61, 103, ...
    assert all(
        firsts(SDXL.timesteps(n, "trailing"))[0] == 999 and len(SDXL.timesteps(n, "trailing")) == n
        for n in range(1, 1001)
    )


@pytest.mark.parametrize(
    "steps, timesteps",
    [
        (1, [999]),
        (4, [999, 759, 499, 259]),
        (8, [999, 879, 759, 639, 499, 379, 259, 139]),
        (50, [*range(999, 0, -20)]),
    ],
)
def test_lcms_grid_is_of_the_50_timesteps_that_it_was_distilled_at(steps, timesteps):
    assert firsts(SDXL.timesteps(steps, "lcm")) == timesteps
    with pytest.raises(ValueError, match="between 1 and 50"):
        SDXL.timesteps(51, "lcm")


def test_steps_offset_comes_from_the_checkpoint():
    assert SDXL.timesteps(50)[-1] == (1, None) and Schedule.from_config(
        {"steps_offset": 0}
    ).timesteps(50)[-1] == (0, None)


def test_spacing_comes_from_the_checkpoint_unless_given():
    assert V.timesteps(30) == V.timesteps(30, "trailing") != V.timesteps(30, "leading")


@pytest.mark.parametrize(
    "steps, strength, runs",
    [(50, 0.58, 29), (100, 0.29, 29), (50, 0.3, 15), (30, 0.8, 24), (30, 1.0, 30), (10, 0.99, 9)],
)
def test_strength_is_not_truncated_in_floating_point(steps, strength, runs):
    assert SDXL.timesteps(steps, strength=strength) == SDXL.timesteps(steps)[steps - runs :]


def test_what_cannot_run_is_refused():
    for wrong in (
        dict(steps=0),
        dict(steps=1001),
        dict(steps=3, strength=0.3),
        dict(steps=9, strength=0.0),
        dict(steps=9, strength=1.1),
        dict(steps=9, spacing="karras"),
    ):
        with pytest.raises(ValueError):
            SDXL.timesteps(**wrong)
    for wrong in (
        {"prediction_type": "sample"},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"timestep_spacing": "log"},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Schedule.from_config(wrong)


def test_zero_terminal_snr_ends_in_zero_keeps_its_first_and_needs_v():
    assert V.alpha_bar[-1] == 0 and float(V.alpha_bar[0]) == pytest.approx(
        SDXL.alpha_bar_at(0), rel=1e-14
    )
    with pytest.raises(ValueError, match="v-prediction"):
        Schedule.from_config({"rescale_betas_zero_snr": True})


def test_epsilon_is_turned_into_x_0_by_hand():
    x_0, eps = SDXL.to_x0_eps(torch.tensor([0.5]), torch.tensor([2.0]), 0.64)
    assert torch.allclose(x_0, torch.tensor([(2.0 - 0.6 * 0.5) / 0.8])) and eps.item() == 0.5


@pytest.mark.parametrize("schedule", [SDXL, V], ids=["epsilon", "v"])
@pytest.mark.parametrize("t", [0, 500, 998])
def test_target_and_to_x0_eps_are_inverse(schedule, t, close):
    x_0, eps = torch.randn(
        2, 3, 4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(t)
    )
    ts = torch.tensor([t] * 3)
    back = schedule.to_x0_eps(
        schedule.target(x_0, eps, ts), schedule.add_noise(x_0, eps, ts), schedule.alpha_bar_at(t)
    )
    close(back[0], x_0, 1e-9)
    close(back[1], eps, 1e-9)


def test_v_is_salimans_and_hos_and_needs_no_division_at_zero_snr():
    x_0, eps, last = (
        torch.full((1, 1, 1, 1), 3.0),
        torch.full((1, 1, 1, 1), 2.0),
        torch.tensor([999]),
    )
    assert V.target(x_0, eps, last).item() == -3.0 and V.add_noise(x_0, eps, last).item() == 2.0
    assert [part.item() for part in V.to_x0_eps(-x_0, eps, 0.0)] == [3.0, 2.0]


def test_noise_is_added_by_each_images_own_timestep():
    ts, one = torch.tensor([10, 900]), torch.ones(2, 1, 1, 1, dtype=torch.float64)
    for given, t in zip(SDXL.add_noise(one, 2 * one, ts).flatten().tolist(), ts.tolist()):
        assert given == pytest.approx(
            SDXL.alpha_bar_at(t) ** 0.5 + 2 * (1 - SDXL.alpha_bar_at(t)) ** 0.5, rel=1e-14
        )
    assert SDXL.snr(ts).tolist() == pytest.approx(
        [sigma(SDXL.alpha_bar_at(t)) ** -2 for t in (10, 900)], rel=1e-12
    )


def test_what_really_runs_is_said_in_a_line():
    grid = SDXL.timesteps(50, strength=0.58)
    assert (
        pace.ran(SDXL, grid, 50)
        == f"29 of 50 steps, first t 561 (sigma {sigma(SDXL.alpha_bar_at(561)):.2f})"
    )
    assert "infinite" in pace.ran(V, V.timesteps(30), 30)


def test_a_schedule_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SDXL.spacing = "trailing"
