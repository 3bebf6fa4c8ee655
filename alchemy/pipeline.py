"""Text-to-image and image-to-image: from a prompt, through the denoising loop, to a PIL image."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from . import images
from .arguments import checked, resolve_seed
from .images import ImageLike, Size
from .samplers import Sampler
from .sampling import Hook, Step, denoise, generators, keep_background, noise
from .sdxl import SDXL, Conditioning

Progress = Callable[[Iterable[Step]], Iterable[Step]]  # e.g. tqdm


def resolve_options(sdxl: SDXL, **options: Any) -> dict[str, Any]:
    """The options with the checkpoint's defaults (defaults.py) in place of None.

    An option that has no default there is left out.
    """
    chosen = {}
    for name, value in options.items():
        if value is None:
            value = sdxl.defaults.get(name)
        if value is not None:
            chosen[name] = value
    return chosen


def resolve_size(sdxl: SDXL, size: int | Size | None) -> Size:
    """A size as (H, W): one number is a square, None what the checkpoint was trained at."""
    if size is None:
        return sdxl.size
    if not isinstance(size, (tuple, list)):
        size = (size, size)
    height, width = size
    return int(height), int(width)


def encode_pair(
    sdxl: SDXL, prompt: str, negative_prompt: str | None, size: Size
) -> tuple[Conditioning, Conditioning]:
    """The conditioning of one prompt, and of the prompt that guidance leads away from."""
    return sdxl.encode_prompt([prompt], size), sdxl.encode_prompt([negative_prompt], size)


@torch.no_grad()
def sample(
    sdxl: SDXL,
    conditioning: Conditioning,
    unconditional: Conditioning | None,
    seed: int | None,
    size: Size,
    *,
    image: Image.Image | None = None,
    mask: Tensor | None = None,
    strength: float = 1.0,
    hook: Hook | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Image.Image:
    """One image of size (H, W) from its encoded prompt. options: those of denoise.

    seed: determines the noise; None draws one.
    image: of that size, to start from (Img2Img).
    mask: (H,W) in [0,1]; where it is 0, the latents stay the image's.
    progress: wraps the iterator of Steps, as tqdm does.
    """
    f = sdxl.vae_scale_factor
    check_size(size, f)
    if mask is not None and image is None:
        raise ValueError("a mask needs an image: it says what of the image may change")
    rngs = generators([resolve_seed(seed)])
    shape = (1, 4, size[0] // f, size[1] // f)
    start = noise(shape, rngs).to(sdxl.device)
    latents = None
    if image is not None:
        pixels = images.to_tensor(image).to(sdxl.device)
        latents, _ = sdxl.vae.encode(pixels)
    if mask is not None:
        hook = keep_background(latents, start, latent_mask(mask.to(start), f))
    steps = denoise(
        sdxl,
        start,
        conditioning,
        unconditional,
        image=latents,
        strength=strength,
        generators=rngs,
        hook=hook,
        **options,
    )
    *_, last = progress(steps) if progress else steps
    if not last.x_prev.isfinite().all():
        raise FloatingPointError(
            "the latents became NaN or infinite: is a LoRA damaged, or its scale too large?"
        )
    return images.to_image(sdxl.vae.decode(last.x_prev)[0])


def check_size(size: Size, factor: int) -> None:
    """Raise ValueError for a size (H, W) at which no image can be generated."""
    height, width = size
    if min(size) < factor or height % factor or width % factor:
        raise ValueError(f"size {width}x{height}: both sides must be multiples of {factor}")
    problem = images.size_problem((width, height))
    if problem:
        raise ValueError(f"size {width}x{height}: {problem}")


def latent_mask(mask: Tensor, factor: int) -> Tensor:
    """A pixel mask (H,W) in [0,1] to (1,1,H/f,W/f), by the maximum: no masked pixel is lost."""
    return F.max_pool2d(mask[None, None], factor)


@checked
def text_to_image(
    sdxl: SDXL,
    prompt: str,
    *,
    size: int | Size | None = None,
    seed: int | None = 0,
    negative_prompt: str | None = None,
    sampler: str | Sampler | None = None,
    spacing: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    eta: float | None = None,
    hook: Hook | None = None,
    progress: Progress | None = None,
) -> Image.Image:
    """Generate an image from a prompt.

    size: (H, W) in pixels or one number; None is the size that the checkpoint was trained at.
    seed: determines the noise; None draws one.
    negative_prompt: what guidance leads away from; None is SDXL's empty conditioning (zeros).
    sampler, spacing, steps, guidance, eta: see alchemy.denoise; None is the checkpoint's default.
    hook: called with each Step; a tensor that it returns replaces step.x_prev.
    progress: wraps the iterator of Steps, as tqdm does.

    Raises ValueError for a size that is not a multiple of the VAE's factor, or wrong options.
    """
    size = resolve_size(sdxl, size)
    cond, uncond = encode_pair(sdxl, prompt, negative_prompt, size)
    options = resolve_options(
        sdxl, sampler=sampler, spacing=spacing, steps=steps, guidance=guidance, eta=eta
    )
    return sample(sdxl, cond, uncond, seed, size, hook=hook, progress=progress, **options)


@checked
def image_to_image(
    sdxl: SDXL,
    prompt: str,
    image: ImageLike,
    *,
    strength: float | None = None,
    mask: Tensor | ImageLike | None = None,
    seed: int | None = 0,
    negative_prompt: str | None = None,
    sampler: str | Sampler | None = None,
    spacing: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    eta: float | None = None,
    progress: Progress | None = None,
) -> Image.Image:
    """Change an image according to a prompt (Img2Img).

    image: PIL image or path. It is scaled and cropped to sides that are multiples of the VAE's
        factor, where they are not.
    strength: in (0, 1], how far the image is noised; None is the checkpoint's default.
    mask: (H,W) in [0,1], PIL image or path, of the image's size: what may change, and by how much.
        Where it is 0 the result is bit-identical to the image.
    seed, negative_prompt, sampler, spacing, steps, guidance, eta, progress: see text_to_image.
    """
    image = images.as_image(image)
    if mask is not None:
        mask = images.as_mask(mask, image.size[::-1])
    image, mask = fit_to_latents(image, mask, sdxl.vae_scale_factor)
    size = image.size[::-1]
    cond, uncond = encode_pair(sdxl, prompt, negative_prompt, size)
    options = resolve_options(
        sdxl,
        strength=strength,
        sampler=sampler,
        spacing=spacing,
        steps=steps,
        guidance=guidance,
        eta=eta,
    )
    generated = sample(
        sdxl, cond, uncond, seed, size, image=image, mask=mask, progress=progress, **options
    )
    return generated if mask is None else images.composite(image, generated, mask)


def fit_to_latents(
    image: Image.Image, mask: Tensor | None, factor: int
) -> tuple[Image.Image, Tensor | None]:
    """Scale and crop an image, and its mask (H,W), to the next smaller multiples of factor."""
    size = tuple(max(side // factor, 1) * factor for side in image.size)  # (W, H)
    if size == image.size:
        return image, mask
    if mask is not None:
        resized = F.interpolate(mask[None, None], size[::-1], mode="area")
        mask = resized[0, 0]
    return ImageOps.fit(image, size, Image.LANCZOS), mask
