"""The noise schedule of SDXL: diffusers' tables and timesteps, and one step of each sampler.

The steps are written from the papers, in float64 and each in its own variables. They share nothing
with diffusers: they are the reference where it computes in float32 or leaves its own timesteps.
"""

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)
from storage import write

OFFICIAL = dict(
    num_train_timesteps=1000,
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    steps_offset=1,
)
CLASSES = {
    "ddpm": DDPMScheduler,
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_ancestral": EulerAncestralDiscreteScheduler,
}
SPACINGS = ("leading", "trailing", "linspace")


def scheduler(sampler, spacing, steps, prediction="epsilon", zero_snr=False):
    """diffusers' scheduler, configured as SDXL's."""
    # the defaults would clip x_0 to [-1, 1]
    extra = {
        "ddpm": dict(clip_sample=False),
        "ddim": dict(clip_sample=False, set_alpha_to_one=False),
    }
    made = CLASSES[sampler](
        **OFFICIAL,
        timestep_spacing=spacing,
        prediction_type=prediction,
        rescale_betas_zero_snr=zero_snr,
        **extra.get(sampler, {}),
    )
    made.set_timesteps(steps)
    return made


def alpha_bars(zero_snr=False):
    """ᾱ_t, t = 0 .. 999, float64; zero terminal SNR by Lin et al. 2023, Alg. 1."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    roots = np.sqrt(np.cumprod(1 - betas))
    if zero_snr:
        roots = (roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))
    return torch.from_numpy(roots**2)


def alpha_bar_at(table, t):
    """ᾱ at fractional t: σ = √((1 - ᾱ) / ᾱ) is interpolated linearly, as in diffusers' Euler."""
    if t == int(t):
        return table[int(t)].item()
    sigma = np.interp(t, np.arange(1000), ((1 - table) / table).sqrt().numpy())
    return 1 / (1 + sigma**2)


def make_schedule(path):
    tensors = {"alpha_bar": alpha_bars(), "alpha_bar_zero_snr": alpha_bars(True)}
    for name, zero_snr in (("alpha_bar", False), ("alpha_bar_zero_snr", True)):
        made = scheduler("ddim", "trailing", 1, zero_snr=zero_snr)
        tensors[f"diffusers/{name}"] = made.alphas_cumprod
    for steps in (1, 7, 16, 20, 25, 30, 40, 50, 999, 1000):
        for spacing in SPACINGS:
            made = (scheduler(sampler, spacing, steps) for sampler in CLASSES)
            ddpm, ddim, euler, ancestral = made
            assert torch.equal(ddim.timesteps, ddpm.timesteps)
            assert torch.equal(euler.timesteps, ancestral.timesteps)
            tensors[f"timesteps/{spacing}_{steps}"] = ddim.timesteps
            tensors[f"sigmas/{spacing}_{steps}"] = euler.sigmas
            if spacing == "linspace":
                tensors[f"timesteps/linspace_fractional_{steps}"] = euler.timesteps
            else:
                assert torch.equal(ddim.timesteps.float(), euler.timesteps)
    write(path, tensors, {"official": OFFICIAL})


# One step from ᾱ to ᾱ_prev on the variance-preserving x_t. z is a unit Gaussian.


def ddim(eta):
    def step(x_t, x_0, eps, ab, ab_prev, z):
        """Song et al. 2021, eq. 12 and 16."""
        sigma = eta * ((1 - ab_prev) / (1 - ab) * (1 - ab / ab_prev)) ** 0.5
        # Rounding may fall below 0 where ᾱ = 0 and eta = 1.
        direction = max(1 - ab_prev - sigma**2, 0.0) ** 0.5
        return ab_prev**0.5 * x_0 + direction * eps + sigma * z

    return step


def ddpm(x_t, x_0, eps, ab, ab_prev, z):
    """Ho et al. 2020, eq. 6 and 7: the posterior of x_prev given x_t and x_0, for any step."""
    alpha = ab / ab_prev
    mean = ab_prev**0.5 * (1 - alpha) / (1 - ab) * x_0 + alpha**0.5 * (1 - ab_prev) / (1 - ab) * x_t
    return mean + ((1 - ab_prev) / (1 - ab) * (1 - alpha)) ** 0.5 * z


def euler(x_t, x_0, eps, ab, ab_prev, z):
    """Karras et al. 2022: dx/dσ = eps for x = x_t / √ᾱ."""
    sigma, sigma_prev = ((1 - ab) / ab) ** 0.5, ((1 - ab_prev) / ab_prev) ** 0.5
    return ab_prev**0.5 * (x_t / ab**0.5 + (sigma_prev - sigma) * eps)


def euler_ancestral(x_t, x_0, eps, ab, ab_prev, z):
    """k-diffusion: Euler down to σ_down, then noise up to σ_prev."""
    sigma, sigma_prev = ((1 - ab) / ab) ** 0.5, ((1 - ab_prev) / ab_prev) ** 0.5
    up = sigma_prev * (1 - sigma_prev**2 / sigma**2) ** 0.5
    down = sigma_prev**2 / sigma
    return ab_prev**0.5 * (x_t / ab**0.5 + (down - sigma) * eps + up * z)
