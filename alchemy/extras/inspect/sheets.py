"""Contact sheets: labelled images in rows, masks over scenes, the loss curve."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

GAP, INK, PAPER, LINE = 8, (40, 40, 48), (250, 249, 246), (196, 80, 40)


def fit_for_sheet(image: Image.Image, least: int = 256, most: int = 1024) -> Image.Image:
    """Enlarge by a whole factor until the shorter side has `least` pixels, or reduce to `most`."""
    if max(image.size) > most:
        return ImageOps.contain(image, (most, most))
    wanted = math.ceil(least / min(image.size))
    factor = max(1, min(wanted, most // max(image.size)))
    size = (factor * image.width, factor * image.height)
    return image.resize(size, Image.NEAREST)


def sheet(rows: Sequence[Sequence[tuple[str, Image.Image]]], least: int = 256) -> Image.Image:
    """Rows of (label, image) as one image. least: the shorter side of each, see fit_for_sheet."""
    _, first = rows[0][0]
    text = max(14, fit_for_sheet(first, least).height // 18)
    font = ImageFont.load_default(text)
    header = int(text * 1.5)
    strips = [strip(row, least, font, header) for row in rows]
    width = GAP + max(strip.width for strip in strips)
    height = GAP + sum(strip.height for strip in strips)
    page = Image.new("RGB", (width, height), PAPER)
    y = GAP
    for image in strips:
        page.paste(image, (0, y))
        y += image.height
    return page


def strip(
    row: Sequence[tuple[str, Image.Image]], least: int, font: ImageFont.ImageFont, header: int
) -> Image.Image:
    """A row of a sheet; header: the height of the labels in pixels."""
    fitted = [fit_for_sheet(image.convert("RGB"), least) for _, image in row]
    width = sum(image.width + GAP for image in fitted)
    height = header + GAP + max(image.height for image in fitted)
    page = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(page)
    x = GAP
    for (label, _), image in zip(row, fitted, strict=True):
        label = shorten(draw, label, font, image.width)
        draw.text((x, 0), label, INK, font)
        page.paste(image, (x, header))
        x += image.width + GAP
    return page


def shorten(draw: ImageDraw.ImageDraw, label: str, font: ImageFont.ImageFont, width: int) -> str:
    """The label, cut with an ellipsis if it is wider than `width` pixels."""
    if draw.textlength(label, font) <= width:
        return label
    while label and draw.textlength(label + "…", font) > width:
        label = label[:-1]
    return label + "…"


def grey(mask: Tensor) -> Image.Image:
    """A mask (H,W) in [0,1] as a grey image."""
    values = 255 * mask.cpu().numpy()
    return Image.fromarray(values.round().astype(np.uint8))


def outlined(image: Image.Image, mask: Tensor) -> Image.Image:
    """The image, darkened outside the mask (H,W)."""
    pixels = np.asarray(image, dtype=np.float32)
    light = 0.35 + 0.65 * mask.cpu().numpy()
    dimmed = pixels * light[:, :, None]
    return Image.fromarray(dimmed.astype(np.uint8))


def running_mean(values: Sequence[float]) -> list[float | None]:
    """Exponential mean with decay 0.95, without its start-up bias; None before the first number."""
    total = weight = 0.0
    means = []
    for value in values:
        if math.isfinite(value):
            total = 0.95 * total + value
            weight = 0.95 * weight + 1
        means.append(total / weight if weight else None)
    return means


def curve(values: Sequence[float], width: int = 512, height: int = 256) -> Image.Image:
    """The loss of each step as a dot, and its running mean; NaN leaves a gap."""
    page = Image.new("RGB", (width, height), "white")
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return page
    draw = ImageDraw.Draw(page)
    font = ImageFont.load_default(13)
    margin = 52
    top = max(float(np.quantile(finite, 0.98)), 1e-6)
    last = len(values) - 1

    def position(step: int, value: float) -> tuple[float, float]:
        across = step / max(last, 1)
        up = min(value / top, 1.0)
        x = margin + across * (width - margin - 10)
        return x, height - 24 - up * (height - 40)

    for step, value in enumerate(values):
        if math.isfinite(value):
            x, y = position(step, value)
            draw.ellipse((x - 1.5, y - 1.5, x + 1.5, y + 1.5), fill=(168, 168, 178))
    points = []
    for step, mean in enumerate(running_mean(values)):
        if mean is not None:
            points.append(position(step, mean))
    draw.line(points, fill=LINE, width=2)
    axes = [position(0, top), position(0, 0), position(last, 0)]
    draw.line(axes, fill=INK)
    draw.text((4, 10), f"{top:.2g}", INK, font)
    draw.text((4, height // 2 - 8), "loss", INK, font)
    draw.text((margin - 14, height - 32), "0", INK, font)
    draw.text((width - 76, height - 20), f"step {len(values)}", INK, font)
    return page
