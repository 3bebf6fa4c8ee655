"""The styles of the toy world: an image, float32 (3, H, W) in [0, 1], redrawn.

`STYLES[style] = (phrase of a caption, function of (rgb, rng))`; a function keeps shape and range.
"""

import numpy as np
from PIL import Image, ImageFilter

from .backgrounds import Canvas


def grey(rgb):
    return np.tensordot(np.float32((0.299, 0.587, 0.114)), rgb, 1)[None]  # (1, H, W)


def filtered(rgb, radius, median=False):
    """Each channel blurred, or its median, over `radius` pixels at 128, more at larger sizes."""
    reach = max(1, round(radius * min(rgb.shape[1:]) / 128))
    pixels = (np.clip(rgb, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0).squeeze()
    kernel = ImageFilter.MedianFilter(2 * reach + 1) if median else ImageFilter.BoxBlur(reach)
    soft = np.asarray(Image.fromarray(pixels).filter(kernel), dtype=np.float32) / 255
    return soft[None] if soft.ndim == 2 else soft.transpose(2, 0, 1)


def watercolor(rgb, rng):
    wash = filtered(rgb, 2, median=True)  # flat patches of colour
    rim = abs(wash - filtered(wash, 2)).max(0)  # pigment gathers where a patch ends
    paper = Canvas(rng, rgb.shape[1:]).noise(0.1)
    return np.clip(0.26 + 0.74 * wash**0.85 - 0.55 * rim + 0.05 * paper, 0, 1)


def poster(rgb, rng):
    """Few tones, strong colours: the brightness goes in four steps, the hue stays."""
    flat = filtered(rgb, 1, median=True)
    tone = grey(flat) + 0.02
    step = np.ceil(tone * 4) / 4
    return np.clip(step + 1.35 * (flat - tone) * step / tone, 0, 1)


def monochrome(rgb, rng):
    return np.repeat(grey(rgb), 3, 0)


def sepia(rgb, rng):
    light = np.float32((0.98, 0.84, 0.64))[:, None, None]
    dark = np.float32((0.02, 0.03, 0.03))[:, None, None]
    return grey(rgb) ** 0.9 * light + dark


def pencil(rgb, rng):
    """Colour dodge: divided by its own blur, a picture keeps only lines on white paper."""
    tone = grey(rgb)
    lines = np.minimum(1, (tone + 0.02) / (filtered(tone, 3) + 0.02))
    return np.repeat(np.clip(lines**2.2 * (0.8 + 0.2 * tone), 0, 1), 3, 0)


def pixel(rgb, rng):
    """Blocks of 1/32 of the shorter side, six levels per channel."""
    height, width = rgb.shape[1:]
    block = max(2, round(min(height, width) / 32))
    picture = Image.fromarray((rgb * 255).astype(np.uint8).transpose(1, 2, 0))
    small = picture.resize((-(-width // block), -(-height // block)), Image.BOX)
    big = np.asarray(small, dtype=np.float32).repeat(block, 0).repeat(block, 1)[:height, :width]
    return np.round(big.transpose(2, 0, 1) / 51) / 5


STYLES = {
    "photo": ("a photo of", lambda rgb, rng: rgb),
    "watercolor": ("a watercolor of", watercolor),
    "poster": ("a poster of", poster),
    "monochrome": ("a black and white photo of", monochrome),
    "sepia": ("a sepia photo of", sepia),
    "pencil": ("a pencil drawing of", pencil),
    "pixel": ("a pixel art picture of", pixel),
}
