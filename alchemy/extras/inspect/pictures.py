"""Tensors to what a page can show: latents as colours, all steps of a quantity in one picture (a film), pictures as data URIs."""

import base64
import io
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image


def fit(pairs):
    """The linear map (5,3) from latents (4,h,w) and a 1 to pictures (3,H,W) in [-1,1], reduced to (h,w): least squares over all places of
    all pairs (latents, picture), of finite latents. Made from a run's own latents and what they decode to, it fits every VAE."""
    pairs = [(x, picture) for x, picture in pairs if x.isfinite().all()]
    if not pairs:
        return torch.zeros(5, 3, dtype=torch.float64)
    small = [
        F.interpolate(picture[None].double(), x.shape[-2:], mode="area")[0].flatten(1).T
        for x, picture in pairs
    ]
    return torch.linalg.lstsq(
        torch.cat([with_one(x[None]) for x, _ in pairs]), torch.cat(small)
    ).solution


def with_one(latents):
    """(n,4,h,w) to (n·h·w, 5): a place a row, and a 1."""
    return F.pad(latents.double().movedim(1, -1).flatten(0, 2), (0, 1), value=1.0)


def preview(latents, colours):
    """Latents (n,4,h,w) through the map of fit to (n,h,w,3) uint8."""
    n, _, h, w = latents.shape
    return bytes_of((with_one(latents) @ colours).view(n, h, w, 3), -1, 1)


def bytes_of(x, low, high):
    """x to uint8, low to 0 and high to 255; what lies outside is cut, what is no number becomes 0."""
    return (
        ((x - low) / max(high - low, 1e-12) * 255)
        .nan_to_num(0)
        .round()
        .clamp(0, 255)
        .byte()
        .cpu()
        .numpy()
    )


def spread(count, most):
    """Up to `most` of the indices 0 ... count − 1, evenly, with the first and the last."""
    return sorted(
        {round(k * (count - 1) / max(min(count, most) - 1, 1)) for k in range(min(count, most))}
    )


def film(frames, exact=False):
    """uint8 frames (n,h,w) or (n,h,w,3) in one picture, row after row: what page/base.js cuts apart again. Small ones are always exact."""
    n, h, w = frames.shape[:3]
    columns = max(1, min(n, round(math.sqrt(n * h / w))))
    rows = -(-n // columns)
    page = np.zeros((rows * h, columns * w, *frames.shape[3:]), dtype=np.uint8)
    for k, frame in enumerate(frames):
        page[k // columns * h : k // columns * h + h, k % columns * w : k % columns * w + w] = frame
    return {
        "src": uri(Image.fromarray(page), exact or max(h, w) <= 32),
        "n": n,
        "columns": columns,
        "w": w,
        "h": h,
    }


def uri(picture, exact=True):
    """A PIL picture as a data URI: PNG, or, where it need not be exact, WebP, which takes a fifth of the room."""
    file = io.BytesIO()
    picture.save(
        file, **(dict(format="PNG") if exact else dict(format="WEBP", quality=75, method=2))
    )
    return (
        f"data:image/{'png' if exact else 'webp'};base64,"
        + base64.b64encode(file.getvalue()).decode()
    )
