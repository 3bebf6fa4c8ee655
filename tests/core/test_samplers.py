"""The update functions against each paper's own formula, in its own variables, in float64."""

import math

import pytest
import torch

from alchemy.samplers import (
    SAMPLERS,
    Sampler,
    ddim_sigma,
    ddim_step,
    dpmpp_2m_step,
    find_sampler,
    lcm_step,
    renoise,
)
from alchemy.sampling import Step

LEVELS = [(0.0047, 0.02), (0.2, 0.21), (0.5, 0.9), (0.93, 0.99915), (0.99, 1.0)]  # (ᾱ, ᾱ_prev)
RNG = torch.Generator().manual_seed(1)
X_0, EPS, Z, OLD = torch.randn(4, 2, 4, 3, 5, dtype=torch.float64, generator=RNG)


def mix(x_0, eps, ab):
    return ab**0.5 * x_0 + (1 - ab) ** 0.5 * eps


def make_step(ab, ab_prev, t_prev=1, x_0=X_0, t=500):
    x_t = mix(x_0, EPS, ab)
    return Step(1, t, t_prev, ab, ab_prev, x_t, None, EPS, EPS, x_0)


def randn():
    return Z


def euler_on_the_ode(ab, ab_prev):
    """Karras et al. 2022, algorithm 1: y' = y + (s' − s) ε with y = x/√ᾱ, s = √((1−ᾱ)/ᾱ)."""
    s, s_prev = (math.sqrt((1 - a) / a) for a in (ab, ab_prev))
    y = mix(X_0, EPS, ab) / ab**0.5 + (s_prev - s) * EPS
    return y * ab_prev**0.5


def ancestral_step_of_k_diffusion(ab, ab_prev):
    s, s_prev = (math.sqrt((1 - a) / a) for a in (ab, ab_prev))
    up = math.sqrt(s_prev**2 * (s**2 - s_prev**2) / s**2)
    down = math.sqrt(s_prev**2 - up**2)
    y = mix(X_0, EPS, ab) / ab**0.5 + (down - s) * EPS + up * Z
    return y * ab_prev**0.5


def posterior_of_ddpm(ab, ab_prev):
    """Ho et al. 2020, eq. 6 and 7, with α = ᾱ/ᾱ_prev for a step of any length."""
    alpha = ab / ab_prev
    x_0_part = ab_prev**0.5 * (1 - alpha) * X_0
    mean = (x_0_part + alpha**0.5 * (1 - ab_prev) * mix(X_0, EPS, ab)) / (1 - ab)
    return mean + ((1 - ab_prev) / (1 - ab) * (1 - alpha)) ** 0.5 * Z


@pytest.mark.parametrize("ab, ab_prev", LEVELS)
@pytest.mark.parametrize(
    "eta, formula",
    [(0.0, euler_on_the_ode), (1.0, ancestral_step_of_k_diffusion), (1.0, posterior_of_ddpm)],
)
def test_ddim_is_euler_at_eta_0_and_ddpm_and_ancestral_at_eta_1(eta, formula, ab, ab_prev, close):
    close(ddim_step(make_step(ab, ab_prev), None, eta, randn), formula(ab, ab_prev), 1e-12)


@pytest.mark.parametrize(
    "before, ab, ab_prev", [(0.0047, 0.02, 0.11), (0.2, 0.21, 0.6), (0.5, 0.9, 0.99915)]
)
def test_dpmpp_2m_is_algorithm_2_of_its_paper(before, ab, ab_prev, close):
    """Lu et al. 2022: x = σ/σ_s x_s − α (e^−h − 1) D, D = (1 + 1/(2r)) x_0 − 1/(2r) x_0 before."""
    lam = [math.log(math.sqrt(a) / math.sqrt(1 - a)) for a in (before, ab, ab_prev)]
    h = lam[2] - lam[1]
    r = (lam[1] - lam[0]) / h
    towards = (1 + 1 / (2 * r)) * X_0 - 1 / (2 * r) * OLD
    expected = math.sqrt((1 - ab_prev) / (1 - ab)) * mix(X_0, EPS, ab)
    expected = expected - math.sqrt(ab_prev) * (math.exp(-h) - 1) * towards
    previous = make_step(before, ab, x_0=OLD)
    close(dpmpp_2m_step(make_step(ab, ab_prev), previous, 0.0, None), expected, 1e-12)


def test_dpmpp_2m_does_not_extrapolate_at_its_ends_or_from_pure_noise(close):
    previous, at_noise = make_step(0.1, 0.2, x_0=OLD), make_step(0.0, 0.2, x_0=OLD)
    for step, before in (
        (make_step(0.2, 0.4), None),
        (make_step(0.2, 1.0, t_prev=None), previous),
        (make_step(0.2, 0.4), at_noise),
    ):
        close(dpmpp_2m_step(step, before, 0.0, None), ddim_step(step, None, 0.0, None), 1e-14)


@pytest.mark.parametrize("ab, ab_prev", LEVELS)
@pytest.mark.parametrize("t", [1, 19, 999])
def test_lcm_adds_new_noise_to_the_consistency_functions_x_0(ab, ab_prev, t, close):
    """Luo et al. 2023, eq. 9 and algorithm 2; diffusers: timestep_scaling 10, sigma_data 0.5."""
    step = make_step(ab, ab_prev, t=t)
    c_skip = 0.25 / ((10 * t) ** 2 + 0.25)
    c_out = 10 * t / ((10 * t) ** 2 + 0.25) ** 0.5
    x_0 = c_skip * step.x_t + c_out * X_0
    close(lcm_step(step, None, 1.0, randn), mix(x_0, Z, ab_prev), 1e-7)  # 1 − ᾱ − σ² is rounded
    half = (1 - ab_prev - (0.5 * (1 - ab_prev) ** 0.5) ** 2) ** 0.5 * EPS
    expected = ab_prev**0.5 * x_0 + half + 0.5 * (1 - ab_prev) ** 0.5 * Z
    close(lcm_step(step, None, 0.5, randn), expected, 1e-12)


def test_sigma_is_zero_without_eta_and_at_the_clean_end():
    assert ddim_sigma(0.1, 0.5, 0.0) == 0 and ddim_sigma(0.9, 1.0, 1.0) == 0
    assert ddim_sigma(0.0, 0.25, 1.0) == pytest.approx(0.75**0.5)  # no division by ᾱ
    assert torch.equal(renoise(X_0, EPS, 1.0), X_0)  # bit for bit


def test_a_root_that_rounding_takes_below_zero_is_zero():
    one = torch.ones(1, dtype=torch.float64)
    sigma = 0.7**0.5 * (1 + 1e-15)  # at zero terminal SNR σ² is 1 − ᾱ_prev
    assert 1 - 0.3 - sigma**2 < 0
    assert torch.equal(renoise(one, 1e9 * one, 0.3, sigma, lambda: one), 0.3**0.5 * one + sigma)


def test_the_table_matches_diffusers_samplers_for_sdxl():
    columns = (
        ("ddpm", ddim_step, 1.0, None, False, False, 1.0),
        ("ddim", ddim_step, 0.0, None, False, False, None),  # set_alpha_to_one: false
        ("euler", ddim_step, 0.0, None, True, True, 1.0),
        ("euler_ancestral", ddim_step, 1.0, None, True, True, 1.0),
        ("dpmpp_2m", dpmpp_2m_step, 0.0, None, False, False, 1.0),
        ("lcm", lcm_step, 1.0, "lcm", False, False, 1.0),
    )
    assert SAMPLERS == {name: Sampler(*values) for name, *values in columns}


def test_a_sampler_is_found_by_name_or_is_ones_own():
    own = Sampler(ddim_step)
    assert find_sampler("euler") is SAMPLERS["euler"] and find_sampler(own) is own
    with pytest.raises(ValueError, match="sampler is 'heun'; known are ddpm, .*euler_ancestral"):
        find_sampler("heun")
