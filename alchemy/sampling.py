"""The denoising loop, through which every image is generated: a generator of Steps.

Whoever iterates can look at a Step and stop; `hook` is the one way to change it. Progress bars,
previews, masks and recorders are one or the other.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral

import torch
from torch import Tensor

from .arguments import checked
from .samplers import Sampler, find_sampler
from .sdxl import SDXL, Conditioning, to_device


@dataclass
class Step:
    """One step of the denoising loop, from timestep t to t_prev (None: the end).

    alpha_bar, alpha_bar_prev: ᾱ before and after. All tensors are (B,4,h,w).
    x_t: the UNet's input. eps_uncond (None without guidance), eps_cond: its predictions as ε.
    eps, x_0: the guided prediction as ε and as clean latents. x_prev: the latents after the step.
    """

    index: int
    t: float
    t_prev: float | None
    alpha_bar: float
    alpha_bar_prev: float
    x_t: Tensor
    eps_uncond: Tensor | None
    eps_cond: Tensor
    eps: Tensor
    x_0: Tensor
    x_prev: Tensor | None = None


Hook = Callable[[Step], Tensor | None]


@checked
def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per seed, so that an image depends on its own seed alone."""
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]


@checked
def noise(shape: Sequence[int], seeds: Sequence[int] | Sequence[torch.Generator]) -> Tensor:
    """Unit Gaussian noise of that shape (B,4,h,w), float32 on the CPU.

    seeds: B integers, or B generators, which advance.
    """
    rngs = generators(seeds) if isinstance(seeds[0], Integral) else seeds
    if len(rngs) != shape[0]:
        raise ValueError(f"{len(rngs)} seeds for a batch of {shape[0]}")
    return torch.stack([torch.randn(shape[1:], generator=rng) for rng in rngs])


def classifier_free_guidance(
    unet: Callable[..., Tensor],
    conditioning: Conditioning,
    unconditional: Conditioning | None,
    guidance: float,
) -> Callable[[Tensor, float], tuple[Tensor, Tensor, Tensor | None]]:
    """A function (x_t, t) -> (guided, conditional, unconditional) predictions of the UNet.

        guided = uncond + w · (cond − uncond)          Ho & Salimans 2022, eq. 6

    There is no unconditional prediction (None) where w is 1 or `unconditional` is None.
    """
    if unconditional is None or guidance == 1:

        def predict_conditional(x_t, t):
            cond = unet(x_t, t, *conditioning.parts())
            return cond, cond, None

        return predict_conditional

    both = type(conditioning).cat([unconditional, conditioning])  # one batch of 2B

    def predict_guided(x_t, t):
        prediction = unet(torch.cat([x_t, x_t]), t, *both.parts())
        uncond, cond = prediction.chunk(2)
        return uncond + guidance * (cond - uncond), cond, uncond

    return predict_guided


def fresh_noise(like: Tensor, rngs: list[torch.Generator]) -> Tensor:
    return to_device(noise(like.shape, rngs), like.device).to(like)


@checked
@torch.no_grad()
def denoise(
    sdxl: SDXL,
    noise: Tensor,
    conditioning: Conditioning,
    unconditional: Conditioning | None = None,
    *,
    image: Tensor | None = None,
    strength: float = 1.0,
    sampler: str | Sampler = "euler",
    spacing: str | None = None,
    steps: int = 30,
    guidance: float = 5.0,
    eta: float | None = None,
    generators: list[torch.Generator] | None = None,
    hook: Hook | None = None,
) -> Iterator[Step]:
    """Yield a Step per timestep, from noise to clean latents; the result is the last x_prev.

    sdxl: an SDXL, or anything with a .unet and a .schedule.
    noise: unit Gaussian (B,4,h,w), see alchemy.noise.
    conditioning, unconditional: from sdxl.encode_prompt, B prompts each. Without an
        unconditional there is no guidance.
    image: clean latents (B,4,h,w) to start from (Img2Img): sdxl.vae.encode(...)[0].
    strength: in (0, 1], how far `image` is noised; at 1 it has no influence.
    sampler: a name in samplers.SAMPLERS, or a Sampler of your own.
    spacing: timesteps "leading", "trailing" or "linspace"; None is the checkpoint's.
    steps: number of steps at strength 1.
    guidance: weight of classifier-free guidance; 1 is none.
    eta: how much of the noise is drawn anew at each step, 0 to 1; None is the sampler's own.
    generators: one per image (alchemy.generators), for samplers that draw noise.
    hook: called with each Step; a tensor that it returns replaces step.x_prev.

    Raises ValueError for options out of range, when the iteration begins.
    """
    schedule = sdxl.schedule
    sampler = find_sampler(sampler)
    eta = sampler.eta if eta is None else eta
    if eta > 0 and generators is None:
        raise ValueError(
            f"this sampler draws noise at each step (eta is {eta:g}): "
            "give generators=alchemy.generators(seeds)"
        )
    timesteps = sampler.timesteps(schedule, steps, spacing, strength if image is not None else 1.0)
    predict = classifier_free_guidance(sdxl.unet, conditioning, unconditional, guidance)

    # Start from noise, or from the image at the first noise level.
    ab_t = schedule.alpha_bar_at(timesteps[0][0])
    if image is None or strength == 1:
        x_t = sampler.start(noise, ab_t, spacing or schedule.spacing)
    else:
        x_t = ab_t**0.5 * image + (1 - ab_t) ** 0.5 * noise

    randn = partial(fresh_noise, x_t, generators)
    previous = None
    for index, (t, t_prev) in enumerate(timesteps):
        ab_t = schedule.alpha_bar_at(t)
        ab_prev = sampler.target_alpha_bar(schedule, t_prev)

        # Predict the clean latents and the noise.
        pred, pred_cond, pred_uncond = predict(x_t, t)
        x_0, eps = schedule.to_x0_eps(pred, x_t, ab_t)
        _, eps_cond = schedule.to_x0_eps(pred_cond, x_t, ab_t)
        eps_uncond = None
        if pred_uncond is not None:
            _, eps_uncond = schedule.to_x0_eps(pred_uncond, x_t, ab_t)
        step = Step(index, t, t_prev, ab_t, ab_prev, x_t, eps_uncond, eps_cond, eps, x_0)

        # Move to the next noise level; the hook may replace the result.
        step.x_prev = sampler.update(step, previous, eta, randn)
        replacement = hook(step) if hook else None
        if replacement is not None:
            step.x_prev = replacement
        yield step
        x_t, previous = step.x_prev, step


def keep_background(known: Tensor, noise: Tensor, mask: Tensor) -> Hook:
    """A hook for masked Img2Img: latents change only where the mask (1,1,h,w) in [0,1] is not 0.

    Elsewhere they are the known latents (B,4,h,w), with the same noise throughout, at the noise
    level that the step has just reached, and clean at the end. At the level before the step,
    noise would remain in the result.
    """

    def blend(step: Step) -> Tensor:
        ab = step.alpha_bar_prev if step.t_prev is not None else 1.0
        background = ab**0.5 * known + (1 - ab) ** 0.5 * noise
        return mask * step.x_prev + (1 - mask) * background

    return blend
