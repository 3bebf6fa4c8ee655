"""Images: files to PIL, PIL to tensors in [-1,1] and back."""

import warnings
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

Size = tuple[int, int]  # (height, width)
ImageLike = Image.Image | str | PathLike  # an image, or the path of one
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
MAX_PIXELS = 100_000_000  # a small file can unpack to gigabytes
MAX_ASPECT_RATIO = 50
TOO_LARGE = f"more than {MAX_PIXELS // 10**6} million pixels; make it smaller"


def read(path: str | PathLike, mode: str = "RGB") -> Image.Image:
    """Read an image file, turned upright as its EXIF says, in mode "RGB" or "L" (for masks).

    Transparency is composited onto white, in a mask onto black.
    Raises ValueError naming the file and what is wrong with it.
    """
    problem = None
    if not Path(path).exists():
        problem = "no such file"
    elif not Path(path).is_file():  # reading a pipe would block
        problem = "not a readable image: it is not a file"
    if problem:
        raise ValueError(f"{path}: {problem}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd EXIF and of size; the limit is size_problem's
            with Image.open(path, formats=FORMATS) as image:
                problem = size_problem(image.size)
                if problem is None:
                    return flatten(ImageOps.exif_transpose(image), mode)
    except Image.DecompressionBombError:
        problem = TOO_LARGE
    except Exception as error:  # Pillow raises many kinds for damaged files
        problem = f"not a readable image (JPEG, PNG, WebP, BMP or TIFF): {error}"
    raise ValueError(f"{path}: {problem}")


def size_problem(size: tuple[int, int]) -> str | None:
    """What is wrong with the size (of width and height in pixels) of an image, or None."""
    if size[0] * size[1] > MAX_PIXELS:
        return TOO_LARGE
    if max(size) > MAX_ASPECT_RATIO * min(size):
        return f"{size[0]}x{size[1]} is longer than {MAX_ASPECT_RATIO}:1; crop it"
    return None


def flatten(image: Image.Image, mode: str) -> Image.Image:
    """The image in mode "RGB" or "L", without transparency."""
    if image.mode.startswith("I"):  # 16 bits; convert would clip at 255
        upper = np.asarray(image) >> 8
        image = Image.fromarray(upper.astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, "white" if mode == "RGB" else "black")
        image = Image.alpha_composite(background, image)
    return image.convert(mode)


def as_image(image: ImageLike) -> Image.Image:
    """An image or the path of one as an RGB image. Raises ValueError for anything else."""
    if isinstance(image, (str, PathLike)):
        return read(image)
    if not isinstance(image, Image.Image):
        raise ValueError(f"the image is a {type(image).__name__}; give a PIL image or a path")
    problem = size_problem(image.size)
    if problem:
        raise ValueError(f"the image: {problem}")
    return image if image.mode == "RGB" else flatten(image, "RGB")


def as_mask(mask: Tensor | ImageLike, size: Size) -> Tensor:
    """A tensor, image or path as a mask (H,W) float32 in [0,1]. Raises ValueError if not of size.

    White, or 1, is where something may change.
    """
    if isinstance(mask, (str, PathLike)):
        mask = read(mask, "L")
    if isinstance(mask, Image.Image):
        mask = mask_to_tensor(flatten(mask, "L"))
    if not isinstance(mask, (Tensor, np.ndarray)):
        kind = type(mask).__name__
        raise ValueError(f"the mask is a {kind}; give a tensor, an array, a PIL image or a path")
    mask = torch.as_tensor(mask)
    if mask.shape != size:
        shape = "x".join(str(side) for side in reversed(mask.shape))
        raise ValueError(f"the mask is {shape}, the image {size[1]}x{size[0]}; both must agree")
    if not mask.any():
        raise ValueError("the mask is empty: nothing may change")
    if not (mask.min() >= 0 and mask.max() <= 1):  # NaN too
        raise ValueError("the mask has values outside 0 to 1; divide one of 0 to 255 by 255")
    return mask if mask.is_floating_point() else mask.float()


def to_tensor(image: Image.Image) -> Tensor:
    """An image to (1,3,H,W) float32 in [-1,1]."""
    pixels = torch.from_numpy(np.array(image.convert("RGB")))  # (H,W,3)
    return pixels.permute(2, 0, 1)[None].float() / 127.5 - 1


def mask_to_tensor(mask: Image.Image) -> Tensor:
    """An image of mode "L" to (H,W) float32 in [0,1]."""
    return torch.from_numpy(np.array(mask)).float() / 255


def to_image(tensor: Tensor) -> Image.Image:
    """(3,H,W) in [-1,1] to an RGB image."""
    pixels = (tensor.float().clamp(-1, 1) + 1) * 127.5
    pixels = pixels.round().byte().permute(1, 2, 0)  # (H,W,3)
    return Image.fromarray(pixels.cpu().numpy())


def composite(old: Image.Image, new: Image.Image, mask: Tensor) -> Image.Image:
    """old + mask · (new − old), of one size, mask (H,W) in [0,1]; bit-identical to old at 0."""
    a = np.asarray(old.convert("RGB"), dtype=np.float32)
    b = np.asarray(new.convert("RGB"), dtype=np.float32)
    weight = mask.cpu().numpy()[:, :, None]
    mixed = a + weight * (b - a)
    return Image.fromarray(np.round(mixed).astype(np.uint8))
