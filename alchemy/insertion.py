"""The two stages of Image-Alchemy (arXiv 2505.10743).

1. The unmodified model generates the scene with the class word, and its attention segments it.
2. Masked Img2Img with the LoRA puts the subject where the class stands.

The rest of the scene stays bit-identical.
"""

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from . import images, lora, pipeline
from .arguments import checked, resolve_seed
from .images import ImageLike, Size
from .pipeline import Progress
from .samplers import Sampler
from .sdxl import SDXL, Conditioning
from .segmentation import (
    binarize,
    grow,
    model_resolution,
    segment,
    to_pixels,
    warn_if_weak,
    word_maps,
)

FADE_LATENTS = 2  # how far outside a found mask the generated image fades out


class Box(NamedTuple):
    """A rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int

    @classmethod
    def around(cls, mask: Tensor) -> "Box":
        """The smallest box that holds every pixel of a mask (H,W) that is not 0."""
        rows = torch.nonzero(mask.amax(1)).flatten().tolist()
        columns = torch.nonzero(mask.amax(0)).flatten().tolist()
        top, left = rows[0], columns[0]
        return cls(top, left, rows[-1] + 1 - top, columns[-1] + 1 - left)

    @property
    def size(self) -> Size:
        return self.height, self.width

    @property
    def slices(self) -> tuple[slice, slice]:
        """To index a tensor (H,W)."""
        rows = slice(self.top, self.top + self.height)
        return rows, slice(self.left, self.left + self.width)

    def crop(self, image: Image.Image) -> Image.Image:
        right, bottom = self.left + self.width, self.top + self.height
        return image.crop((self.left, self.top, right, bottom))


@dataclass(frozen=True)
class Insertion:
    """What `insert` returns.

    scene, result: PIL images of one size (H,W), before and after.
    soft: the soft mask (H,W) in [0,1] of the class word, or the mask that was given.
    mask: (H,W), where stage 2 generates: 0 or 1, or the values that were given.
    feathered: (H,W), the weight of the generated image in the result. A found mask fades out
        beyond its edge, a given one within it. Where it is 0, the result is bit-identical.
    box: (top, left, height, width), the part of the scene that stage 2 worked on.
    crop, generated: that part before and after stage 2, at the model's resolution.
    """

    scene: Image.Image
    soft: Tensor
    mask: Tensor
    feathered: Tensor
    box: Box
    crop: Image.Image
    generated: Image.Image
    result: Image.Image


def with_token(prompt: str, class_word: str, token: str) -> str:
    """The prompt with the token before the first occurrence of the class word.

    A token that ends in the class word ("sks dog"), or is there already, is not doubled.
    Raises ValueError where the class word is not in the prompt as a whole word.
    """
    words = token.split()
    if len(words) > 1 and words[-1].lower() == class_word.lower():
        token = " ".join(words[:-1])
    found = re.search(rf"(?<!\w){re.escape(class_word)}(?!\w)", prompt, re.IGNORECASE)
    if not found:
        raise ValueError(f"the class word {class_word!r} is not in the prompt {prompt!r}")
    before = prompt[: found.start()]
    if before.endswith(f"{token} "):
        return prompt
    return f"{before}{token} {prompt[found.start() :]}"


def feather(mask: Tensor, width: int) -> Tensor:
    """A mask (H,W) that falls off linearly over `width` pixels towards its edge, all within it.

    A mask that is too thin for that keeps its maximum.
    """
    x = mask.double()
    for _ in range(4):  # from the top, then, turned, from each other side
        ramp = torch.arange(len(x))[:, None] / (width + 1)
        x = ((x - ramp).cummin(0).values + ramp).rot90()  # rises by at most 1/(width + 1) a pixel
    peak = mask.max() / x.max().clamp(min=1e-9)
    return torch.minimum((x * peak).to(mask), mask)


def composite_weight(mask: Tensor, box: Box, fade: int | None) -> Tensor:
    """The weight (H,W) in [0,1] of the generated image in the result, 0 outside the box.

    fade: fall to 0 over so many pixels beyond the mask. There, stage 2 returns the scene up to
    the VAE's error, so that the decoder's own transition remains and no edge shows. None, for a
    mask that was given: fall to 0 within it, over 1/40 of the box.
    """
    region = mask if fade is None else grow(mask, fade)
    in_box = torch.zeros_like(mask)
    in_box[box.slices] = region[box.slices]
    if fade is None:
        fade = max(1, round(min(box.size) / 40))
    return feather(in_box, fade)


def crop_box(sdxl: SDXL, mask: Tensor, crop: bool) -> tuple[Box, Size]:
    """The part of an image that stage 2 works on, and the size (H,W) that it is generated at.

    mask: (H,W), what may change. With crop, the part is the mask with half its size again on each
    side, else the whole image. Its aspect ratio is that of the size, so that nothing is stretched.
    """
    subject = Box.around(mask)
    rows, columns = mask.shape
    height, width = rows, columns
    if crop:
        # Twice the mask, but a tiny one is not enlarged without limit; at most 2 : 1.
        least = sdxl.size[0] // 4
        height = min(max(2 * subject.height, least), rows)
        width = min(max(2 * subject.width, least), columns)
        height, width = max(height, width // 2), max(width, height // 2)
        height, width = min(height, rows), min(width, columns)
    size = model_resolution(sdxl, (height, width))

    # The smallest part of this aspect ratio that covers it, or the largest in the image.
    cover = max(height / size[0], width / size[1])
    scale = min(cover, rows / size[0], columns / size[1])
    height = min(round(size[0] * scale), rows)
    width = min(round(size[1] * scale), columns)

    # Centered on the mask, and moved into the image.
    top = (2 * subject.top + subject.height - height) // 2
    left = (2 * subject.left + subject.width - width) // 2
    top = min(max(top, 0), rows - height)
    left = min(max(left, 0), columns - width)
    return Box(top, left, height, width), size


def generate_scene(
    sdxl: SDXL,
    prompt: str,
    class_word: str,
    encoded: tuple[Conditioning, Conditioning],
    seed: int,
    size: Size,
    progress: Progress | None = None,
    **options: Any,
) -> tuple[Image.Image, Tensor]:
    """Stage 1: the scene, and the soft mask of the class word from the attention of its steps.

    encoded: the prompt and the negative prompt.
    """
    maps = word_maps(sdxl, prompt, class_word, size, sdxl.defaults["window"])

    def follow(steps):
        return maps.follow(progress(steps) if progress else steps)

    scene = pipeline.sample(sdxl, *encoded, seed, size, progress=follow, **options)
    warn_if_weak(class_word, maps, sdxl.defaults["scene_word_strength"])
    return scene, to_pixels(maps.heatmap(sdxl.defaults["walk_iterations"]), scene)


def insert_subject(
    sdxl: SDXL,
    scene: Image.Image,
    soft: Tensor,
    mask: Tensor,
    encoded: tuple[Conditioning, Conditioning],
    seed: int,
    crop: bool | None = None,
    fade_outwards: bool = True,
    **options: Any,
) -> Insertion:
    """Stage 2: masked Img2Img in a part of the scene at the model's resolution, then composite.

    soft, mask: see Insertion. encoded: the prompt with the token, and the negative prompt.
    options: those of pipeline.sample.
    """
    if crop is None:
        usual = sdxl.size[0] * sdxl.size[1]
        crop = scene.width * scene.height > 1.5 * usual
    box, size = crop_box(sdxl, mask, crop)
    part = box.crop(scene).resize(size[::-1], Image.LANCZOS)
    part_mask = F.adaptive_max_pool2d(mask[box.slices][None], size)[0]
    cond, uncond = (conditioning.at_size(size) for conditioning in encoded)
    generated = pipeline.sample(
        sdxl, cond, uncond, seed, size, image=part, mask=part_mask, **options
    )

    # Composite at the scene's own resolution.
    fade = round(FADE_LATENTS * sdxl.vae_scale_factor * box.height / size[0])
    weight = composite_weight(mask, box, fade if fade_outwards else None)
    pasted = scene.copy()
    resized = generated.resize(box.size[::-1], Image.LANCZOS)
    pasted.paste(resized, (box.left, box.top))
    result = images.composite(scene, pasted, weight)
    return Insertion(scene, soft, mask, weight, box, part, generated, result)


@checked
@torch.no_grad()
def insert(
    sdxl: SDXL,
    prompt: str,
    class_word: str,
    token: str,
    *,
    image: ImageLike | None = None,
    mask: Tensor | ImageLike | None = None,
    seed: int | None = 0,
    size: int | Size | None = None,
    strength: float | None = None,
    threshold: float | None = None,
    dilate: float | None = None,
    crop: bool | None = None,
    negative_prompt: str | None = None,
    sampler: str | Sampler | None = None,
    spacing: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    eta: float | None = None,
    progress: Progress | None = None,
    free_text_encoders: bool = False,
) -> Insertion:
    """Replace the class word's object in a scene by the subject that `token class_word` names.

    sdxl: with the subject's LoRA (or embedding); stage 1 runs at LoRA scale 0.
    prompt: the scene, with class_word in it; token: the subject's rare word.
    image: PIL image or path of any size, instead of a generated scene.
    mask: (H,W) in [0,1], PIL image or path, instead of the segmentation; nothing outside changes.
    seed: of the noise; None draws one. size: of the scene, (H, W) or one number.
    strength: in (0, 1], how far stage 2 noises the region.
    threshold, dilate: see segmentation.binarize.
    crop: work on a part around the mask at the model's resolution; None: if the image is large.
    negative_prompt, sampler, spacing, steps, guidance, eta, progress: see alchemy.text_to_image.
        None is the checkpoint's default.
    free_text_encoders: drop them from memory when the prompts are encoded. They are read again
        when next used, without the adapters that a LoRA may have on them.

    Raises ValueError for a mask that is empty, of another size, or covers the whole image.
    """
    subject_prompt = with_token(prompt, class_word, token)
    seed = resolve_seed(seed)
    if image is None:
        image_size = size = pipeline.resolve_size(sdxl, size)
    else:
        image = images.as_image(image)
        image_size = image.size[::-1]
        size = model_resolution(sdxl, image_size)
    mask = mask if mask is None else images.as_mask(mask, image_size)
    options = pipeline.resolve_options(
        sdxl, sampler=sampler, spacing=spacing, steps=steps, guidance=guidance, eta=eta
    )
    limits = pipeline.resolve_options(sdxl, threshold=threshold, dilate=dilate)

    # Encode all prompts, those of stage 1 without the LoRA.
    with lora.lora_scale(sdxl, 0):
        plain = pipeline.encode_pair(sdxl, prompt, negative_prompt, size)
    with_subject = pipeline.encode_pair(sdxl, subject_prompt, negative_prompt, size)
    if free_text_encoders:
        sdxl.free("text_encoders")

    # Stage 1: the scene and what may change, by the unmodified model.
    soft = mask
    mask_is_given = mask is not None
    scene_options = dict(seed=seed, size=size, progress=progress, **options)
    with lora.lora_scale(sdxl, 0):
        if image is None and not mask_is_given:
            image, soft = generate_scene(sdxl, prompt, class_word, plain, **scene_options)
        elif image is None:
            image = pipeline.sample(sdxl, *plain, **scene_options)
        elif not mask_is_given:
            soft = segment(sdxl, image, class_word, prompt=prompt, seed=seed, conditioning=plain[0])

    # Stage 2: the subject, with the LoRA.
    return insert_subject(
        sdxl,
        image,
        soft,
        mask if mask_is_given else binarize(soft, **limits),
        with_subject,
        seed + 1,  # the scene's own noise would lead back to it
        crop,
        fade_outwards=not mask_is_given,
        progress=progress,
        strength=sdxl.defaults["strength"] if strength is None else strength,
        **options,
    )
