"""The one step of all samplers against each paper's own formula, in its own variables, in float64."""

import math
from types import SimpleNamespace

import pytest
import torch

from alchemy import samplers

LEVELS = [(0.0047, 0.02), (0.2, 0.21), (0.5, 0.9), (0.93, 0.99915), (0.99, 1.0)]  # (ᾱ, ᾱ_prev)


@pytest.fixture(scope="module")
def parts():
    """x_0, eps, z."""
    return torch.randn(
        3, 2, 4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    ).unbind()


def mixed(x_0, eps, ab):
    return ab**0.5 * x_0 + (1 - ab) ** 0.5 * eps


@pytest.mark.parametrize("ab, ab_prev", LEVELS)
def test_eta_0_is_eulers_step_on_the_variance_exploding_ode(ab, ab_prev, parts, close):
    """Karras et al. 2022, algorithm 1, its first half: y' = y + (s' - s) eps on y = x/√ᾱ, s = √((1-ᾱ)/ᾱ)."""
    x_0, eps, _ = parts
    s, s_prev = (math.sqrt((1 - a) / a) for a in (ab, ab_prev))
    y = mixed(x_0, eps, ab) / ab**0.5 + (s_prev - s) * eps
    close(samplers.step(x_0, eps, ab_prev), y * ab_prev**0.5, 1e-12)


@pytest.mark.parametrize("ab, ab_prev", LEVELS)
def test_eta_1_is_the_posterior_of_ddpm(ab, ab_prev, parts, close):
    """Ho et al. 2020, eq. 6 and 7, alpha_t = ᾱ/ᾱ_prev for a step of any length."""
    x_0, eps, z = parts
    alpha = ab / ab_prev
    mean = (ab_prev**0.5 * (1 - alpha) * x_0 + alpha**0.5 * (1 - ab_prev) * mixed(x_0, eps, ab)) / (
        1 - ab
    )
    variance = (1 - ab_prev) / (1 - ab) * (1 - alpha)
    sigma = samplers.sigma(ab, ab_prev, 1.0)
    assert sigma == pytest.approx(variance**0.5, rel=1e-12)
    close(samplers.step(x_0, eps, ab_prev, sigma, z), mean + variance**0.5 * z, 1e-12)


@pytest.mark.parametrize("ab, ab_prev", LEVELS)
def test_eta_1_is_the_ancestral_step_of_k_diffusion(ab, ab_prev, parts, close):
    x_0, eps, z = parts
    s, s_prev = (math.sqrt((1 - a) / a) for a in (ab, ab_prev))
    up = math.sqrt(s_prev**2 * (s**2 - s_prev**2) / s**2)
    down = math.sqrt(s_prev**2 - up**2)
    y = mixed(x_0, eps, ab) / ab**0.5 + (down - s) * eps + up * z
    close(
        samplers.step(x_0, eps, ab_prev, samplers.sigma(ab, ab_prev, 1.0), z),
        y * ab_prev**0.5,
        1e-12,
    )


@pytest.mark.parametrize(
    "before, ab, ab_prev", [(0.0047, 0.02, 0.11), (0.2, 0.21, 0.6), (0.5, 0.9, 0.99915)]
)
def test_the_extrapolated_step_is_dpm_solver_pp_2m(before, ab, ab_prev, parts, close):
    """Lu et al. 2022 (DPM-Solver++), algorithm 2: x = σ/σ_s x_s - α (e^-h - 1) D, D = (1 + 1/(2r)) x_0 - 1/(2r) x_0 of the step before."""
    x_0, eps, old = parts
    lam = [math.log(math.sqrt(a) / math.sqrt(1 - a)) for a in (before, ab, ab_prev)]
    h, r, x_t = lam[2] - lam[1], (lam[1] - lam[0]) / (lam[2] - lam[1]), mixed(x_0, eps, ab)
    towards = (1 + 1 / (2 * r)) * x_0 - 1 / (2 * r) * old
    expected = (
        math.sqrt((1 - ab_prev) / (1 - ab)) * x_t
        - math.sqrt(ab_prev) * (math.exp(-h) - 1) * towards
    )
    last = SimpleNamespace(alpha_bar=before, x_0=old)
    close(
        samplers.step(*samplers.extrapolate(last, x_0, x_t, ab, ab_prev), ab_prev), expected, 1e-12
    )


def test_after_a_step_from_pure_noise_nothing_is_extrapolated(parts):
    x_0, eps, old = parts
    assert torch.equal(
        samplers.extrapolate(
            SimpleNamespace(alpha_bar=0.0, x_0=old), x_0, mixed(x_0, eps, 0.1), 0.1, 0.4
        )[0],
        x_0,
    )


@pytest.mark.parametrize("ab, ab_prev", LEVELS)
def test_a_fresh_step_is_lcms_which_noises_x_0_anew(ab, ab_prev, parts, close):
    """Luo et al. 2023 (LCM), algorithm 2: x' = α x_0 + σ z; what the network said of the noise has no part."""
    x_0, eps, z = parts
    sigma = samplers.sigma(ab, ab_prev, 1.0, fresh=True)
    assert (
        sigma == pytest.approx((1 - ab_prev) ** 0.5, rel=1e-14)
        and samplers.sigma(ab, ab_prev, 0.5, fresh=True) == sigma / 2
    )
    close(
        samplers.step(x_0, eps, ab_prev, sigma, z),
        ab_prev**0.5 * x_0 + (1 - ab_prev) ** 0.5 * z,
        1e-7,
    )  # 1 - ᾱ - σ² is 0 but for rounding


def test_a_step_computed_by_hand():
    # ᾱ 0.36 -> 0.64, x_0 = 1, eps = 2, z = -1, eta 0.5: sigma = 0.5 * √(0.36/0.64) * √(1 - 0.5625)
    sigma = samplers.sigma(0.36, 0.64, 0.5)
    assert sigma == pytest.approx(0.5 * 0.75 * 0.4375**0.5, rel=1e-14)
    got = samplers.step(torch.tensor(1.0, dtype=torch.float64), 2.0, 0.64, sigma, -1.0)
    assert got.item() == pytest.approx(0.8 + 2 * (0.36 - sigma**2) ** 0.5 - sigma, rel=1e-14)


def test_sigma_is_zero_without_eta_and_at_the_clean_end():
    assert samplers.sigma(0.1, 0.5, 0.0) == 0 and samplers.sigma(0.9, 1.0, 1.0) == 0
    assert samplers.sigma(0.0, 0.25, 1.0) == pytest.approx(
        0.75**0.5
    )  # zero terminal SNR: no division by ᾱ


def test_the_last_step_to_alpha_bar_1_is_x_0_to_the_bit(parts):
    x_0, eps, _ = parts
    assert torch.equal(samplers.step(x_0, eps, 1.0), x_0)


def test_no_noise_is_needed_where_sigma_is_zero(parts):
    x_0, eps, z = parts
    assert torch.equal(samplers.step(x_0, eps, 0.5), samplers.step(x_0, eps, 0.5, 0.0, z))


def test_an_argument_is_not_changed_in_place(parts):
    copies = [part.clone() for part in parts]
    samplers.step(*copies[:2], 0.5, 0.3, copies[2])
    assert all(torch.equal(a, b) for a, b in zip(copies, parts))


def test_a_root_that_rounding_takes_below_zero_is_zero():
    one, sigma = (
        torch.ones(1, dtype=torch.float64),
        0.7**0.5 * (1 + 1e-15),
    )  # at zero terminal SNR sigma² is 1 - ᾱ_prev
    assert 1 - 0.3 - sigma**2 < 0
    assert torch.equal(samplers.step(one, 1e9 * one, 0.3, sigma, one), 0.3**0.5 * one + sigma)


def test_the_table_says_what_diffusers_does_for_sdxl():
    rows = samplers.SAMPLERS
    assert {name: row.eta for name, row in rows.items()} == {
        "ddpm": 1,
        "ddim": 0,
        "euler": 0,
        "euler_ancestral": 1,
        "dpmpp_2m": 0,
        "lcm": 1,
    }
    assert [name for name, row in rows.items() if row.order == 2] == ["dpmpp_2m"]
    assert (
        [name for name, row in rows.items() if row.fresh]
        == [name for name, row in rows.items() if row.grid == "lcm"]
        == ["lcm"]
    )
    assert [name for name, row in rows.items() if row.last is None] == [
        "ddim"
    ]  # set_alpha_to_one: false
    assert [name for name, row in rows.items() if row.scaled_start and row.fractional] == [
        "euler",
        "euler_ancestral",
    ]


@pytest.mark.parametrize(
    "name, spacing, factor",
    [
        ("euler", "leading", 1),
        ("euler", "trailing", 0.8),
        ("euler", "linspace", 0.8),
        ("euler_ancestral", "trailing", 0.8),
        ("ddim", "trailing", 1),
        ("ddpm", "linspace", 1),
    ],
)
def test_only_euler_off_the_leading_grid_starts_below_unit_noise(name, spacing, factor):
    assert samplers.find(name).start(
        torch.ones(1, dtype=torch.float64), 0.36, spacing
    ).item() == pytest.approx(factor, rel=1e-15)


def test_an_unknown_sampler_is_refused_and_the_known_named():
    with pytest.raises(ValueError, match="euler_ancestral"):
        samplers.find("heun")
