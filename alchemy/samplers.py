"""The samplers: update functions x_t -> x_prev, and a table of named ones.

With x_t = √ᾱ x_0 + √(1−ᾱ) ε, most samplers of the field are one formula, `renoise`:

    x_prev = √ᾱ_prev · x_0 + √(1 − ᾱ_prev − σ²) · ε + σ · z        DDIM (Song et al. 2021), eq. 12

- DDIM takes σ from its eq. 16, scaled by η.
- DDPM's ancestral step (Ho et al. 2020, algorithm 2, the smaller variance) is η = 1.
- Euler (Karras et al. 2022, algorithm 1 without the correction) is η = 0: with y = x/√ᾱ and
  s = √((1−ᾱ)/ᾱ) the formula reads y_prev = y + (s_prev − s) · ε, an Euler step of the
  probability-flow ODE dy/ds = ε. Euler ancestral is η = 1 by the same substitution.
- DPM-Solver++(2M) steps towards an x_0 extrapolated from the last two predictions.
- LCM replaces all of the noise, σ = √(1 − ᾱ_prev).

They still differ in timesteps, initial scale and final ᾱ: the fields of Sampler.

A sampler of your own is Sampler(update=my_step), with
my_step(step, previous, eta, randn) -> x_prev, and goes to denoise(..., sampler=...).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line reads the table and does not wait for torch
    from torch import Tensor

    from .sampling import Step
    from .schedule import Schedule

Randn = Callable[[], "Tensor"]  # unit Gaussian noise of x_t's shape
# (step, the step before or None, eta, randn) -> x_prev
Update = Callable[["Step", "Step | None", float, Randn], "Tensor"]


def ddim_sigma(alpha_bar: float, alpha_bar_prev: float, eta: float) -> float:
    """The standard deviation of the noise that DDIM draws anew: Song et al. 2021, eq. 16."""
    if eta == 0:
        return 0.0
    variance_ratio = (1 - alpha_bar_prev) / (1 - alpha_bar)
    return eta * variance_ratio**0.5 * (1 - alpha_bar / alpha_bar_prev) ** 0.5


def renoise(
    x_0: Tensor,
    eps: Tensor,
    alpha_bar: float,
    sigma: float = 0.0,
    randn: Randn | None = None,
) -> Tensor:
    """x at noise level alpha_bar from a prediction (x_0, ε); noise of deviation sigma is new."""
    direction = max(1 - alpha_bar - sigma**2, 0.0) ** 0.5 * eps  # rounding can go below 0
    x_prev = alpha_bar**0.5 * x_0 + direction
    return x_prev + sigma * randn() if sigma > 0 else x_prev


def ddim_step(step: Step, previous: Step | None, eta: float, randn: Randn) -> Tensor:
    """DDIM (Song et al. 2021), eq. 12 and 16. eta = 1 is DDPM; eta = 0 is Euler on the ODE."""
    sigma = ddim_sigma(step.alpha_bar, step.alpha_bar_prev, eta)
    return renoise(step.x_0, step.eps, step.alpha_bar_prev, sigma, randn)


def dpmpp_2m_step(step: Step, previous: Step | None, eta: float, randn: Randn) -> Tensor:
    """DPM-Solver++(2M), Lu et al. 2022, algorithm 2. λ = log(√ᾱ / √(1−ᾱ)).

    The first step has no predecessor and the last one ends at λ = ∞: both are DDIM's.
    """
    if previous is None or step.t_prev is None:
        return ddim_step(step, previous, eta, randn)

    # Extrapolate x_0 linearly in λ to the middle of the step.
    before = half_log_snr(previous.alpha_bar)
    now = half_log_snr(step.alpha_bar)
    then = half_log_snr(step.alpha_bar_prev)
    x_0 = step.x_0 + (step.x_0 - previous.x_0) * (then - now) / (now - before) / 2

    # The ε that belongs to this x_0.
    noise = step.x_t - step.alpha_bar**0.5 * x_0
    eps = noise / (1 - step.alpha_bar) ** 0.5
    sigma = ddim_sigma(step.alpha_bar, step.alpha_bar_prev, eta)
    return renoise(x_0, eps, step.alpha_bar_prev, sigma, randn)


def half_log_snr(alpha_bar: float) -> float:
    """λ = log(ᾱ/(1−ᾱ))/2; −∞ at pure noise."""
    return math.log(alpha_bar / (1 - alpha_bar)) / 2 if alpha_bar else -math.inf


def lcm_step(step: Step, previous: Step | None, eta: float, randn: Randn) -> Tensor:
    """Latent consistency models (Luo et al. 2023), algorithm 2: predict x_0, add new noise to it.

    x_0 = c_skip · x_t + c_out · x_0 (eq. 9) with diffusers' constants: time times 10, σ_data 0.5.
    """
    scaled_time = 400 * step.t * step.t + 1  # (10 t)² / σ_data² + 1
    x_0 = step.x_t / scaled_time + 20 * step.t / scaled_time**0.5 * step.x_0
    sigma = eta * (1 - step.alpha_bar_prev) ** 0.5
    return renoise(x_0, step.eps, step.alpha_bar_prev, sigma, randn)


@dataclass(frozen=True)
class Sampler:
    """An update function and what else distinguishes a sampler.

    update: (step, previous, eta, randn) -> x_prev; previous is the Step before, None at first.
    eta: how much of the noise is drawn anew at each step, from 0 to 1.
    spacing: its own timesteps; None is the checkpoint's.
    fractional: "linspace" timesteps are not rounded.
    scaled_start: "trailing" and "linspace" start at √(1−ᾱ) · noise, as x_T in the papers,
        instead of at unit noise.
    final_alpha_bar: where the last step ends: 1 (clean), or None for ᾱ[0], as DDIM is published
        for SDXL (set_alpha_to_one false).
    """

    update: Update
    eta: float = 0.0
    spacing: str | None = None
    fractional: bool = False
    scaled_start: bool = False
    final_alpha_bar: float | None = 1.0

    def timesteps(
        self, schedule: Schedule, steps: int, spacing: str | None = None, strength: float = 1.0
    ) -> list[tuple[float, float | None]]:
        """The pairs (t, t_prev) that this sampler runs: see Schedule.timesteps."""
        return schedule.timesteps(steps, spacing or self.spacing, strength, self.fractional)

    def start(self, noise: Tensor, alpha_bar: float, spacing: str) -> Tensor:
        """x at the first timestep, from unit Gaussian noise, for text-to-image."""
        if self.scaled_start and spacing != "leading":
            return (1 - alpha_bar) ** 0.5 * noise
        return noise

    def target_alpha_bar(self, schedule: Schedule, t_prev: float | None) -> float:
        """ᾱ that a step to timestep t_prev reaches; t_prev None is the end."""
        if t_prev is not None:
            return schedule.alpha_bar_at(t_prev)
        if self.final_alpha_bar is None:
            return float(schedule.alpha_bar[0])
        return self.final_alpha_bar


SAMPLERS = {
    "ddpm": Sampler(ddim_step, eta=1.0),
    "ddim": Sampler(ddim_step, final_alpha_bar=None),
    "euler": Sampler(ddim_step, fractional=True, scaled_start=True),
    "euler_ancestral": Sampler(ddim_step, eta=1.0, fractional=True, scaled_start=True),
    "dpmpp_2m": Sampler(dpmpp_2m_step),
    "lcm": Sampler(lcm_step, eta=1.0, spacing="lcm"),
}


def find_sampler(sampler: str | Sampler) -> Sampler:
    """The Sampler of that name; a Sampler is returned as it is. Raises ValueError."""
    if isinstance(sampler, Sampler):
        return sampler
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler is {sampler!r}; known are {', '.join(SAMPLERS)}")
    return SAMPLERS[sampler]
