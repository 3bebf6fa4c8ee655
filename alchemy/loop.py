"""The denoising loop: the one through which every picture goes, from noise or from a picture, with a mask or without.

denoise(...) is a generator of Steps. Who iterates can look, keep, stop; a hook can change x_prev. Progress bars, previews, masks and
recorders are all one or the other.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from . import images, samplers
from .sdxl import send


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
def denoise(sdxl, noise, conditioning, unconditional=None, *, image=None, strength=1.0, sampler="euler", grid=None, steps=30,
            guidance=5.0, eta=None, generators=None, hook=None):
    """Yield a Step for each pair of the grid, from noise (B,4,h,w), unit Gaussian, to clean latents (the last x_prev).

    sdxl: anything with a .unet and a .schedule. unconditional: what guidance leads away from, or None for no guidance; guidance 1 is
    none either. image: clean latents (B,4,h,w) to start from (Img2Img), noised to the level of `strength` in (0, 1]; at 1 it has no
    part. grid: leading, trailing or linspace (None: the checkpoint's). eta: None is the sampler's own. generators: one per image,
    needed where the sampler draws noise. hook(step) -> x_prev to use instead, or None.
    """
    schedule, row = sdxl.schedule, samplers.find(sampler)
    eta = row.eta if eta is None else eta
    if eta and generators is None:
        raise ValueError(f"sampler {sampler!r} with eta {eta} draws noise at each step: give generators=alchemy.generators(seeds)")
    pairs = schedule.grid(steps, grid or row.grid, strength if image is not None else 1.0, row.fractional)
    guided = unconditional is not None and guidance != 1
    told = type(conditioning).cat([unconditional, conditioning]) if guided else conditioning  # one batch of 2B

    ab = schedule.at(pairs[0][0])
    if image is None or strength == 1:
        x = row.start(noise, ab, grid or schedule.spacing)
    else:
        x = ab ** 0.5 * image + (1 - ab) ** 0.5 * noise
    for index, (t, t_prev) in enumerate(pairs):
        ab = schedule.at(t)
        ab_prev = schedule.at(t_prev) if t_prev is not None else row.last or float(schedule.alpha_bar[0])

        prediction = sdxl.unet(torch.cat([x, x]) if guided else x, t, *told.parts())
        uncond, cond = prediction.chunk(2) if guided else (None, prediction)
        mixed = uncond + guidance * (cond - uncond) if guided else cond  # classifier-free guidance, Ho & Salimans 2022, eq. 6
        x_0, eps = schedule.to_x0_eps(mixed, x, ab)
        if row.fresh:  # c_skip · x_t + c_out · x_0, as LCM's parameterization has it, with diffusers' time times 10 and σ_data 0.5
            x_0 = x / (400 * t * t + 1) + 20 * t / (400 * t * t + 1) ** 0.5 * x_0

        sigma = samplers.sigma(ab, ab_prev, eta, row.fresh)
        z = send(torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators]), x.device).to(x) if sigma else None
        towards = x_0, eps
        if row.order == 2 and index and t_prev is not None:  # of the first step there is no last one, and the end is at λ = ∞
            towards = samplers.extrapolate(step, x_0, x, ab, ab_prev)
        step = Step(index, t, t_prev, ab, ab_prev, x, schedule.to_x0_eps(uncond, x, ab)[1] if guided else None,
                    schedule.to_x0_eps(cond, x, ab)[1], eps, x_0, samplers.step(*towards, ab_prev, sigma, z))
        changed = hook(step) if hook else None
        step.x_prev = step.x_prev if changed is None else changed
        yield step
        x = step.x_prev


def keep(known, noise, mask):
    """A hook that holds latents known (B,4,h,w) where mask (1,1,h,w) is 0 and lets the model draw where it is 1.

    The known is noised, with the same noise throughout, to the level that the step has just reached, and is clean at the end; one
    level earlier would leave noise in the result.
    """
    def hook(step):
        ab = step.alpha_bar_prev if step.t_prev is not None else 1.0
        return mask * step.x_prev + (1 - mask) * (ab ** 0.5 * known + (1 - ab) ** 0.5 * noise)
    return hook


def latent_mask(mask, factor):
    """A pixel mask (H,W) in [0,1] to (1,1,H/f,W/f): the largest of each cell, so that no masked pixel is lost."""
    return F.max_pool2d(mask[None, None], factor)


@torch.no_grad()
def sample(sdxl, conditioning, unconditional, seed, size, *, image=None, mask=None, strength=1.0, hook=None, progress=None, **options):
    """Conditioning of one picture to that picture, PIL, size (H, W). options: sampler, grid, steps, guidance, eta of denoise.

    image: a PIL picture of that size to start from. mask (H,W) in [0,1]: where 0, the latents stay the picture's.
    progress(iterable of Steps, total) -> iterable stands between the loop and its end: a bar, a recorder.
    """
    if size[0] % sdxl.factor or size[1] % sdxl.factor:
        raise ValueError(f"size {size[1]}x{size[0]} does not fit: both sides must be multiples of {sdxl.factor}")
    if mask is not None and image is None:
        raise ValueError("a mask needs an image: it says what of the image may change")
    made = generators([seed])
    start = noise((1, 4, size[0] // sdxl.factor, size[1] // sdxl.factor), made).to(sdxl.device)
    latents = image and sdxl.vae.encode(images.to_tensor(image).to(sdxl.device))[0]
    if mask is not None:
        hook = keep(latents, start, latent_mask(mask.to(start), sdxl.factor))
    steps = denoise(sdxl, start, conditioning, unconditional, image=latents, strength=strength, generators=made, hook=hook, **options)
    for step in progress(steps) if progress else steps:
        pass
    if not step.x_prev.isfinite().all():
        raise FloatingPointError("the UNet's latents became NaN or infinite: is a LoRA damaged, or its scale too large?")
    return images.to_image(sdxl.vae.decode(step.x_prev)[0])


def settings(sdxl, negative_prompt, size, options):
    """Fill in the checkpoint's defaults; the prompt's opposite as Conditioning (zeros where none is given)."""
    size = size or sdxl.size
    chosen = {k: sdxl.defaults[k] for k in ("sampler", "steps", "guidance")} | {k: v for k, v in options.items() if v is not None}
    return size, sdxl.encode_prompt([negative_prompt], size), chosen


def text_to_image(sdxl, prompt, *, size=None, seed=0, negative_prompt=None, progress=None, **options):
    """A prompt to a PIL picture. size (H, W), None: what the checkpoint was trained at; options: see sample."""
    size, unconditional, options = settings(sdxl, negative_prompt, size, options)
    return sample(sdxl, sdxl.encode_prompt([prompt], size), unconditional, seed, size, progress=progress, **options)


def image_to_image(sdxl, prompt, image, *, strength, mask=None, seed=0, negative_prompt=None, progress=None, **options):
    """Redraw a PIL picture (sides multiples of the VAE's factor) after a prompt. strength in (0, 1]: how far back to noise.

    mask (H,W) tensor in [0,1]: only where it is above 0 may anything change, by that much; elsewhere the result is the picture to the bit.
    """
    size, unconditional, options = settings(sdxl, negative_prompt, image.size[::-1], options)
    drawn = sample(sdxl, sdxl.encode_prompt([prompt], size), unconditional, seed, size, image=image, mask=mask, strength=strength,
                   progress=progress, **options)
    return drawn if mask is None else images.composite(image, drawn, mask)
