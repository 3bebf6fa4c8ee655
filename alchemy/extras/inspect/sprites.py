"""Tensors as a page shows them: latents in colours, all steps in one sprite sheet, data URIs."""

import base64
import io
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def fit_colors(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The linear map (5,3) from latents and a constant to RGB that fits `pairs` best.

    pairs: latents (4,h,w) and what they decode to, (3,H,W) in [-1,1]. Least squares over all their
    pixels; latents that are not finite are left out. Fitted to a run, it suits every VAE.
    """
    features, targets = [], []
    for latents, image in pairs:
        if latents.isfinite().all():
            features.append(with_constant(latents[None]))
            small = F.interpolate(image[None].double(), latents.shape[-2:], mode="area")
            targets.append(small[0].flatten(1).T)
    if not features:
        return torch.zeros(5, 3, dtype=torch.float64)
    return torch.linalg.lstsq(torch.cat(features), torch.cat(targets)).solution


def with_constant(latents: Tensor) -> Tensor:
    """Latents (n,4,h,w) to (n·h·w, 5): one row per pixel, with a 1 at its end."""
    pixels = latents.double().movedim(1, -1).flatten(0, 2)
    return F.pad(pixels, (0, 1), value=1.0)


def preview(latents: Tensor, colors: Tensor) -> np.ndarray:
    """Latents (n,4,h,w) in the colours of fit_colors: (n,h,w,3) uint8."""
    n, _, h, w = latents.shape
    rgb = with_constant(latents) @ colors  # (n·h·w, 3)
    return to_uint8(rgb.view(n, h, w, 3), -1, 1)


def to_uint8(x: Tensor, low: float, high: float) -> np.ndarray:
    """x from [low, high] to 0 ... 255; values outside are clipped, NaN becomes 0."""
    scaled = (x - low) / max(high - low, 1e-12) * 255
    levels = scaled.nan_to_num(0).round().clamp(0, 255)
    return levels.byte().cpu().numpy()


def even_indices(count: int, most: int) -> list[int]:
    """At most `most` of the indices 0 ... count − 1, evenly spaced, with the first and the last."""
    chosen = min(count, most)
    return sorted({round(k * (count - 1) / max(chosen - 1, 1)) for k in range(chosen)})


def sprite_sheet(frames: np.ndarray, lossless: bool = False) -> dict:
    """uint8 frames (n,h,w) or (n,h,w,3) in one image, row by row; page/base.js cuts them apart.

    Frames of at most 32 x 32 are always lossless.
    """
    n, h, w = frames.shape[:3]
    square = round(math.sqrt(n * h / w))
    columns = max(1, min(n, square))
    rows = math.ceil(n / columns)
    channels = frames.shape[3:]
    sheet = np.zeros((rows * h, columns * w, *channels), dtype=np.uint8)
    for k, frame in enumerate(frames):
        row, column = divmod(k, columns)
        top, left = row * h, column * w
        sheet[top : top + h, left : left + w] = frame
    is_small = max(h, w) <= 32
    src = data_uri(Image.fromarray(sheet), lossless or is_small)
    return {"src": src, "n": n, "columns": columns, "w": w, "h": h}


def single_sprite(mask: Tensor) -> dict:
    """A map (H,W) in [0,1] as a sprite sheet of one frame, lossless."""
    return sprite_sheet(to_uint8(mask, 0, 1)[None], lossless=True)


def data_uri(image: Image.Image, lossless: bool = True) -> str:
    """The image as a data URI: PNG, or, where it may lose detail, WebP at a fifth of the size."""
    file = io.BytesIO()
    if lossless:
        image.save(file, format="PNG")
    else:
        image.save(file, format="WEBP", quality=75, method=2)
    kind = "png" if lossless else "webp"
    encoded = base64.b64encode(file.getvalue()).decode()
    return f"data:image/{kind};base64,{encoded}"
