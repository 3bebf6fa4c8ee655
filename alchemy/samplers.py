"""The samplers: one step, and a table that says how each uses it.

On the variance-preserving x_t = √ᾱ x_0 + √(1−ᾱ) ε, the samplers of the field are one formula (DDIM, Song et al. 2021, eq. 12):

    x_prev = √ᾱ_prev · x_0 + √(1 − ᾱ_prev − σ²) · ε + σ · z

    σ = η · √((1 − ᾱ_prev)/(1 − ᾱ)) · √(1 − ᾱ/ᾱ_prev)                                        (eq. 16)

DDPM's ancestral step (Ho et al. 2020, algorithm 2, with the smaller of its two variances) is η = 1.
Euler (Karras et al. 2022, algorithm 1 without its correction) is η = 0: with y = x/√ᾱ and s = √((1−ᾱ)/ᾱ) the formula reads
y_prev = y + (s_prev − s) · ε, an Euler step on the probability-flow ODE dy/ds = ε. Euler ancestral is η = 1 by the same substitution.
What still differs is the grid, the start and the last ᾱ: the columns of SAMPLERS. DPM-Solver++(2M) is this step too, towards an x_0
that is extrapolated from the last two predictions. So is LCM's (Luo et al. 2023, algorithm 2), with all of the noise drawn anew,
σ = √(1 − ᾱ_prev), on timesteps of its distillation.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Sampler:
    """eta: how much of the noise is drawn anew at each step. fractional: linspace timesteps stay unrounded.
    scaled_start: trailing and linspace grids start at √(1−ᾱ) z, as in the papers' x_T, not at z itself.
    last: ᾱ that the last step goes to: 1 (clean), or None for ᾱ[0], as DDIM is published for SDXL (set_alpha_to_one false).
    """

    eta: float
    order: int = 1  # 2: extrapolates
    fresh: bool = False  # all noise is drawn anew, and x_0 is what a consistency model says of it
    grid: str | None = None  # where it has one of its own
    fractional: bool = False
    scaled_start: bool = False
    last: float | None = 1.0

    def start(self, z, alpha_bar, spacing):
        """x at the first timestep from unit Gaussian z, in the text-to-image case."""
        return (1 - alpha_bar) ** 0.5 * z if self.scaled_start and spacing != "leading" else z


SAMPLERS = {
    "ddpm": Sampler(eta=1.0),
    "ddim": Sampler(eta=0.0, last=None),
    "euler": Sampler(eta=0.0, fractional=True, scaled_start=True),
    "euler_ancestral": Sampler(eta=1.0, fractional=True, scaled_start=True),
    "dpmpp_2m": Sampler(eta=0.0, order=2),
    "lcm": Sampler(eta=1.0, fresh=True, grid="lcm"),
}


def find(name):
    """The Sampler of that name. Raises ValueError, naming those that exist."""
    if name not in SAMPLERS:
        raise ValueError(f"sampler is {name!r}; known are {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def sigma(alpha_bar, alpha_bar_prev, eta, fresh=False):
    """The standard deviation σ of the noise drawn anew: DDIM eq. 16, or, fresh, that share of all noise. Floats in, float out."""
    if fresh or eta == 0:
        return eta * (1 - alpha_bar_prev) ** 0.5
    return (
        eta
        * ((1 - alpha_bar_prev) / (1 - alpha_bar)) ** 0.5
        * (1 - alpha_bar / alpha_bar_prev) ** 0.5
    )


def step(x_0, eps, alpha_bar_prev, sigma=0.0, z=None):
    """DDIM eq. 12: from the prediction (x_0, ε) to x at the level alpha_bar_prev. z: unit Gaussian, needed where sigma > 0."""
    x_prev = alpha_bar_prev**0.5 * x_0 + max(1 - alpha_bar_prev - sigma**2, 0.0) ** 0.5 * eps
    return x_prev + sigma * z if sigma else x_prev


def extrapolate(last, x_0, x_t, alpha_bar, alpha_bar_prev):
    """DPM-Solver++(2M), Lu et al. 2022, algorithm 2: (x_0, ε) to step towards, by this prediction of x_0 and that of the last Step."""
    before, now, then = (
        math.log(ab / (1 - ab)) / 2 if ab else -math.inf
        for ab in (last.alpha_bar, alpha_bar, alpha_bar_prev)
    )  # the λ
    x_0 = x_0 + (x_0 - last.x_0) * (then - now) / (now - before) / 2
    return x_0, (x_t - alpha_bar**0.5 * x_0) / (1 - alpha_bar) ** 0.5
