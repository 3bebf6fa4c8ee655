"""The denoising loop: the one through which every picture goes, from noise or from a picture, with a mask or without.

denoise(...) is a generator of Steps. Who iterates can look, keep, stop; a hook can change x_prev. Progress bars, previews, masks and
recorders are all one or the other.
"""

from dataclasses import dataclass

import torch

from . import samplers
from .sdxl import to_device


@dataclass
class Step:
    """One step from timestep t to t_prev (None: the end). All tensors (B,4,h,w); eps is the guided mix of eps_uncond and eps_cond."""

    index: int
    t: float
    t_prev: float | None
    alpha_bar: float
    alpha_bar_prev: float
    x_t: torch.Tensor
    eps_uncond: torch.Tensor | None
    eps_cond: torch.Tensor
    eps: torch.Tensor
    x_0: torch.Tensor
    x_prev: torch.Tensor


def generators(seeds):
    """A CPU generator for each seed: the draws of a picture depend on its seed alone, not on batch, device or neighbours."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def noise(shape, seeds):
    """Unit Gaussian (B,4,h,w) float32 on the CPU. seeds: B integers, or generators, which then go on from there."""
    made = generators(seeds) if isinstance(seeds[0], int) else seeds
    if len(made) != shape[0]:
        raise ValueError(f"{len(made)} seeds for a batch of {shape[0]}")
    return torch.stack([torch.randn(shape[1:], generator=g) for g in made])


@torch.no_grad()
def denoise(
    sdxl,
    noise,
    conditioning,
    unconditional=None,
    *,
    image=None,
    strength=1.0,
    sampler="euler",
    grid=None,
    steps=30,
    guidance=5.0,
    eta=None,
    generators=None,
    hook=None,
):
    """Yield a Step for each pair of the grid, from noise (B,4,h,w), unit Gaussian, to clean latents (the last x_prev).

    sdxl: anything with a .unet and a .schedule. unconditional: what guidance leads away from, or None for no guidance; guidance 1 is
    none either. image: clean latents (B,4,h,w) to start from (Img2Img), noised to the level of `strength` in (0, 1]; at 1 it has no
    part. grid: leading, trailing or linspace (None: the checkpoint's). eta: None is the sampler's own. generators: one per image,
    needed where the sampler draws noise. hook(step) -> x_prev to use instead, or None.
    """
    schedule, row = sdxl.schedule, samplers.find(sampler)
    eta = row.eta if eta is None else eta
    if eta and generators is None:
        raise ValueError(
            f"sampler {sampler!r} with eta {eta} draws noise at each step: give generators=alchemy.generators(seeds)"
        )
    pairs = schedule.timesteps(
        steps, grid or row.grid, strength if image is not None else 1.0, row.fractional
    )
    guided = unconditional is not None and guidance != 1
    told = (
        type(conditioning).cat([unconditional, conditioning]) if guided else conditioning
    )  # one batch of 2B

    ab = schedule.alpha_bar_at(pairs[0][0])
    if image is None or strength == 1:
        x = row.start(noise, ab, grid or schedule.spacing)
    else:
        x = ab**0.5 * image + (1 - ab) ** 0.5 * noise
    for index, (t, t_prev) in enumerate(pairs):
        ab = schedule.alpha_bar_at(t)
        ab_prev = (
            schedule.alpha_bar_at(t_prev)
            if t_prev is not None
            else row.last or float(schedule.alpha_bar[0])
        )

        prediction = sdxl.unet(torch.cat([x, x]) if guided else x, t, *told.parts())
        uncond, cond = prediction.chunk(2) if guided else (None, prediction)
        mixed = (
            uncond + guidance * (cond - uncond) if guided else cond
        )  # classifier-free guidance, Ho & Salimans 2022, eq. 6
        x_0, eps = schedule.to_x0_eps(mixed, x, ab)
        if row.fresh:  # c_skip · x_t + c_out · x_0, as LCM's parameterization has it, with diffusers' time times 10 and σ_data 0.5
            x_0 = x / (400 * t * t + 1) + 20 * t / (400 * t * t + 1) ** 0.5 * x_0

        sigma = samplers.sigma(ab, ab_prev, eta, row.fresh)
        z = (
            to_device(
                torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators]), x.device
            ).to(x)
            if sigma
            else None
        )
        towards = x_0, eps
        if (
            row.order == 2 and index and t_prev is not None
        ):  # of the first step there is no last one, and the end is at λ = ∞
            towards = samplers.extrapolate(step, x_0, x, ab, ab_prev)
        step = Step(
            index,
            t,
            t_prev,
            ab,
            ab_prev,
            x,
            schedule.to_x0_eps(uncond, x, ab)[1] if guided else None,
            schedule.to_x0_eps(cond, x, ab)[1],
            eps,
            x_0,
            samplers.step(*towards, ab_prev, sigma, z),
        )
        changed = hook(step) if hook else None
        step.x_prev = step.x_prev if changed is None else changed
        yield step
        x = step.x_prev


def keep_background(known, noise, mask):
    """A hook that holds latents known (B,4,h,w) where mask (1,1,h,w) is 0 and lets the model draw where it is 1.

    The known is noised, with the same noise throughout, to the level that the step has just reached, and is clean at the end; one
    level earlier would leave noise in the result.
    """

    def hook(step):
        ab = step.alpha_bar_prev if step.t_prev is not None else 1.0
        return mask * step.x_prev + (1 - mask) * (ab**0.5 * known + (1 - ab) ** 0.5 * noise)

    return hook
