"""Text-to-image and image-to-image: a prompt, through the denoising loop, to a PIL image."""

import torch
import torch.nn.functional as F

from . import images
from .sampling import denoise, generators, keep_background, noise


def latent_mask(mask, factor):
    """A pixel mask (H,W) in [0,1] to (1,1,H/f,W/f): the largest of each cell, so that no masked pixel is lost."""
    return F.max_pool2d(mask[None, None], factor)


@torch.no_grad()
def sample(
    sdxl,
    conditioning,
    unconditional,
    seed,
    size,
    *,
    image=None,
    mask=None,
    strength=1.0,
    hook=None,
    progress=None,
    **options,
):
    """Conditioning of one picture to that picture, PIL, size (H, W). options: sampler, grid, steps, guidance, eta of denoise.

    image: a PIL picture of that size to start from. mask (H,W) in [0,1]: where 0, the latents stay the picture's.
    progress(iterable of Steps, total) -> iterable stands between the loop and its end: a bar, a recorder.
    """
    if size[0] % sdxl.vae_scale_factor or size[1] % sdxl.vae_scale_factor:
        raise ValueError(
            f"size {size[1]}x{size[0]} does not fit: both sides must be multiples of {sdxl.vae_scale_factor}"
        )
    if mask is not None and image is None:
        raise ValueError("a mask needs an image: it says what of the image may change")
    made = generators([seed])
    start = noise(
        (1, 4, size[0] // sdxl.vae_scale_factor, size[1] // sdxl.vae_scale_factor), made
    ).to(sdxl.device)
    latents = image and sdxl.vae.encode(images.to_tensor(image).to(sdxl.device))[0]
    if mask is not None:
        hook = keep_background(latents, start, latent_mask(mask.to(start), sdxl.vae_scale_factor))
    steps = denoise(
        sdxl,
        start,
        conditioning,
        unconditional,
        image=latents,
        strength=strength,
        generators=made,
        hook=hook,
        **options,
    )
    for step in progress(steps) if progress else steps:
        pass
    if not step.x_prev.isfinite().all():
        raise FloatingPointError(
            "the UNet's latents became NaN or infinite: is a LoRA damaged, or its scale too large?"
        )
    return images.to_image(sdxl.vae.decode(step.x_prev)[0])


def resolve_options(sdxl, negative_prompt, size, options):
    """Fill in the checkpoint's defaults; the prompt's opposite as Conditioning (zeros where none is given)."""
    size = size or sdxl.size
    chosen = {k: sdxl.defaults[k] for k in ("sampler", "steps", "guidance")} | {
        k: v for k, v in options.items() if v is not None
    }
    return size, sdxl.encode_prompt([negative_prompt], size), chosen


def text_to_image(
    sdxl, prompt, *, size=None, seed=0, negative_prompt=None, progress=None, **options
):
    """A prompt to a PIL picture. size (H, W), None: what the checkpoint was trained at; options: see sample."""
    size, unconditional, options = resolve_options(sdxl, negative_prompt, size, options)
    return sample(
        sdxl,
        sdxl.encode_prompt([prompt], size),
        unconditional,
        seed,
        size,
        progress=progress,
        **options,
    )


def image_to_image(
    sdxl,
    prompt,
    image,
    *,
    strength,
    mask=None,
    seed=0,
    negative_prompt=None,
    progress=None,
    **options,
):
    """Redraw a PIL picture (sides multiples of the VAE's factor) after a prompt. strength in (0, 1]: how far back to noise.

    mask (H,W) tensor in [0,1]: only where it is above 0 may anything change, by that much; elsewhere the result is the picture to the bit.
    """
    size, unconditional, options = resolve_options(sdxl, negative_prompt, image.size[::-1], options)
    drawn = sample(
        sdxl,
        sdxl.encode_prompt([prompt], size),
        unconditional,
        seed,
        size,
        image=image,
        mask=mask,
        strength=strength,
        progress=progress,
        **options,
    )
    return drawn if mask is None else images.composite(image, drawn, mask)
