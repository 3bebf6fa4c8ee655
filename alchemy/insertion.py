"""The two stages of Image-Alchemy (arXiv 2505.10743): the unmodified model draws the scene with the class word, then the subject is put
where the class stands, by masked Img2Img with the LoRA. The rest of the scene stays as it is, to the bit.
"""

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image

from . import images, lora, pipeline, sampling
from .segmentation import AttentionMaps, positions, segment, to_mask, to_pixels, working_size


@dataclass(frozen=True)
class Insertion:
    """scene and result: PIL, of one size (H,W); soft, mask and feathered: (H,W) in [0,1], the mask of 0 and 1 (or the user's own).
    box: (top, left, height, width) of what was worked on; crop and drawn: that part before and after, at the working size."""

    scene: Image.Image
    soft: torch.Tensor
    mask: torch.Tensor
    feathered: torch.Tensor
    box: tuple
    crop: Image.Image
    drawn: Image.Image
    result: Image.Image


def with_token(prompt, class_word, token):
    """The prompt with the token before the class word, where it first stands as a word."""
    named, count = re.subn(
        rf"(?<!\w){re.escape(class_word)}(?!\w)",
        lambda m: f"{token} {m[0]}",
        prompt,
        count=1,
        flags=re.I,
    )
    if not count:
        raise ValueError(f"the class word {class_word!r} is not in the prompt {prompt!r}")
    return named


def feather(mask, width):
    """A mask (H,W) that falls off linearly over `width` pixels towards its edge, all within it. One too thin for that keeps its peak."""
    x = mask.double()
    for _ in range(
        4
    ):  # coming from the top, it climbs by at most 1/(width + 1) a pixel; then the next side is turned to the top
        ramp = torch.arange(len(x))[:, None] / (width + 1)
        x = ((x - ramp).cummin(0).values + ramp).rot90()
    return torch.minimum((x * (mask.max() / x.max().clamp(min=1e-9))).to(mask), mask)


def work_box(sdxl, mask, crop):
    """(top, left, height, width) to work on, and its working size (H,W): the whole picture, or a part around the mask.

    The part has the mask and half its size again around it, and the working size its aspect ratio: nothing is stretched.
    """
    picture, least = mask.shape, sdxl.size[0] // 4  # a tiny mask is not magnified without end
    rows, cols = (torch.nonzero(mask.amax(dim)).flatten() for dim in (1, 0))
    spans = [(int(s[0]), int(s[-1]) + 1) for s in (rows, cols)]
    wanted = [
        min(max(2 * (b - a), least), side) if crop else side for (a, b), side in zip(spans, picture)
    ]
    # No more than twice as long as wide, where the picture has the room.
    wanted = [
        min(max(own, other // 2), side) for own, other, side in zip(wanted, wanted[::-1], picture)
    ]
    size = working_size(sdxl, wanted)
    # The smallest box of the working size's aspect ratio that covers what is wanted, or the largest that the picture has room for.
    scale = min(max(w / s for w, s in zip(wanted, size)), min(p / s for p, s in zip(picture, size)))
    box = [min(round(s * scale), p) for s, p in zip(size, picture)]
    starts = [
        min(max((a + b - length) // 2, 0), side - length)
        for (a, b), length, side in zip(spans, box, picture)
    ]
    return (*starts, *box), size


def draw_scene(sdxl, prompt, class_word, size, progress, **drawing):
    """The scene, and the soft mask of the class word from the attention with which it was drawn."""
    maps = AttentionMaps(
        sdxl.unet,
        positions(sdxl, prompt, class_word),
        (size[0] // sdxl.vae_scale_factor, size[1] // sdxl.vae_scale_factor),
        len(sdxl.schedule.alpha_bar),
        sdxl.defaults["window"],
    )
    scene = pipeline.text_to_image(
        sdxl,
        prompt,
        size=size,
        progress=lambda steps: maps.follow(progress(steps) if progress else steps),
        **drawing,
    )
    return scene, to_pixels(maps.heat(sdxl.defaults["sharpening"]), scene)


@torch.no_grad()
def insert(
    sdxl,
    prompt,
    class_word,
    token,
    *,
    image=None,
    mask=None,
    seed=0,
    size=None,
    strength=None,
    threshold=None,
    dilate=None,
    crop=None,
    negative_prompt=None,
    progress=None,
    **options,
):
    """Put the subject that `token class_word` names (a LoRA is on sdxl) where class_word stands in the scene of the prompt: an Insertion.

    image: a PIL picture of any size in the scene's place. mask: (H,W) in [0,1] instead of the segmentation; nothing outside it changes.
    strength in (0, 1]: how far back to noise in stage 2. threshold, dilate: see segmentation.to_mask. crop: work on a part around the
    mask, brought to full resolution (None: only where the picture is larger than what the checkpoint draws). options: of denoise.
    """
    named = with_token(prompt, class_word, token)
    if mask is not None and not mask.any():
        raise ValueError("the mask is empty: nothing may change")
    chosen = {
        k: sdxl.defaults[k] if v is None else v
        for k, v in (("strength", strength), ("threshold", threshold), ("dilate", dilate))
    }
    image = image.convert("RGB") if image and image.mode != "RGB" else image
    soft, drawing = (
        mask,
        dict(seed=seed, negative_prompt=negative_prompt, progress=progress, **options),
    )
    with lora.lora_scale(sdxl, 0):  # stage 1 is the unmodified model's
        if image is None and mask is None:
            image, soft = draw_scene(sdxl, prompt, class_word, size or sdxl.size, **drawing)
        elif image is None:
            image = pipeline.text_to_image(sdxl, prompt, size=size, **drawing)
        elif mask is None:
            soft = segment(sdxl, image, class_word, prompt=prompt, seed=seed)
    if mask is None:
        mask = to_mask(soft, chosen["threshold"], chosen["dilate"])
    elif mask.shape != image.size[::-1]:
        raise ValueError(
            f"the mask is {mask.shape[1]}x{mask.shape[0]}, the picture {image.width}x{image.height}"
        )

    # Stage 2, on a part of the picture at the working size.
    own = (
        image.size[0] * image.size[1] > 1.5 * sdxl.size[0] * sdxl.size[1] if crop is None else crop
    )
    (top, left, height, width), work = work_box(sdxl, mask, own)
    part = image.crop((left, top, left + width, top + height)).resize(work[::-1], Image.LANCZOS)
    in_box = torch.zeros_like(mask)
    in_box[top : top + height, left : left + width] = mask[top : top + height, left : left + width]
    feathered = feather(in_box, max(1, round(min(height, width) / 40)))
    inside = F.adaptive_max_pool2d(mask[None, top : top + height, left : left + width], work)[
        0
    ]  # the largest: no masked pixel is lost
    _, unconditional, options = pipeline.resolve_options(sdxl, negative_prompt, work, options)
    # Another noise than the scene's, which would lead back to it.
    drawn = pipeline.sample(
        sdxl,
        sdxl.encode_prompt([named], work),
        unconditional,
        seed + 1,
        work,
        image=part,
        mask=inside,
        strength=chosen["strength"],
        progress=progress,
        **options,
    )

    # Back into the picture at its own resolution.
    pasted = image.copy()
    pasted.paste(drawn.resize((width, height), Image.LANCZOS), (left, top))
    return Insertion(
        image,
        soft,
        mask,
        feathered,
        (top, left, height, width),
        part,
        drawn,
        images.composite(image, pasted, feathered),
    )
