"""Before training: what is odd about the photos, and a sheet of them with their crops."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from ... import images
from ...methods.captions import bucket
from ...sdxl import SDXL
from .sheets import LINE, sheet

MAX_SHOWN = 60  # images on the sheet
COLUMNS = 6


def no_mask(path: Path) -> None:
    return None


def look(
    sdxl: SDXL,
    pictures: Sequence[tuple[Path, str]],
    size: tuple[int, int],
    buckets: bool = False,
    mask_of: Callable[[Path], Image.Image | None] = no_mask,
) -> tuple[list[str], Image.Image]:
    """Warnings, one line each, and a sheet about images given as (path, caption).

    size: (H,W) trained at; with buckets, of that area and the image's own aspect ratio.
    mask_of(path): its mask or None; what a mask leaves out is dark on the sheet.
    """
    lines, cells, seen = [], [], {}  # there may be thousands: only what is shown is kept
    for path, caption in pictures:
        image = images.read(path)
        target = size
        if buckets:
            target = bucket(image.size[::-1], size[0] * size[1], 8 * sdxl.vae_scale_factor)
        scale = max(target[0] / image.height, target[1] / image.width)
        if scale > 1.5:
            shown = f"{image.width}x{image.height}"
            lines.append(f"{path.name} is small, {shown}: it is enlarged {scale:.1f} times")
        digest = hashlib.sha256(image.resize((64, 64)).tobytes()).hexdigest()
        first = seen.setdefault(digest, path.name)
        if first != path.name:
            lines.append(f"{path.name} is the same image as {first}")
        lost = sdxl.tokenizers[0].truncated_text(caption)
        if lost:
            lines.append(f"{path.name}: the caption is too long; this is cut off: {lost!r}")
        mask = mask_of(path)
        if len(cells) < MAX_SHOWN:
            label = describe(path, image, target, scale, sdxl.vae_scale_factor)
            cells.append((label, thumbnail(image, mask, target)))
    return lines, sheet([cells[k : k + COLUMNS] for k in range(0, len(cells), COLUMNS)])


def describe(
    path: Path, image: Image.Image, target: tuple[int, int], scale: float, factor: int
) -> str:
    """Name, size, whether EXIF rotates it, and along which side training moves the crop."""
    label = f"{path.name} {image.width}x{image.height}"
    with Image.open(path) as file:
        if file.getexif().get(0x0112, 1) != 1:
            label += ", rotated"
    if image.width * scale >= target[1] + factor:
        return label + ", crop moves sideways"
    if image.height * scale >= target[0] + factor:
        return label + ", crop moves up and down"
    return label


def thumbnail(image: Image.Image, mask: Image.Image | None, size: tuple[int, int]) -> Image.Image:
    """The image, reduced, dark outside the mask, with the center crop of size (H,W) framed."""
    if mask:
        image = Image.composite(image, image.point(lambda value: value // 4), mask)
    image.thumbnail((512, 512))
    return frame_crop(image, size)


def frame_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The image with a frame around what the center crop of size (H,W) takes of it."""
    scale = max(size[0] / image.height, size[1] / image.width)
    h, w = size[0] / scale, size[1] / scale
    top = (image.height - h) / 2
    left = (image.width - w) / 2
    image = image.copy()
    line = max(1, round(min(image.size) / 64))
    frame = (left, top, left + w - 1, top + h - 1)
    ImageDraw.Draw(image).rectangle(frame, outline=LINE, width=line)
    return image
