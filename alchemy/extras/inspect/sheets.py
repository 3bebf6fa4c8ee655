"""Pictures of pictures: labelled sheets, masks over scenes, the loss curve. Small pictures are enlarged without blur, huge ones reduced."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

GAP, INK, PAPER, LINE = 8, (40, 40, 48), (250, 249, 246), (196, 80, 40)


def font(size):
    return ImageFont.load_default(size)


def handy(picture, least=256, most=1024):
    """Enlarged by a whole factor with sharp pixels until the shorter side has `least`; or reduced until the longer has no more than `most`."""
    if max(picture.size) > most:
        return ImageOps.contain(picture, (most, most))
    factor = max(1, min(-(-least // min(picture.size)), most // max(picture.size)))
    return picture.resize((picture.width * factor, picture.height * factor), Image.NEAREST)


def sheet(rows, least=256):
    """A list of rows, each a list of (label, PIL picture), to one picture."""
    rows = [[(label, handy(p.convert("RGB"), least)) for label, p in row] for row in rows]
    text = max(14, rows[0][0][1].height // 18)
    heights = [max(p.height for _, p in row) + int(text * 1.5) + GAP for row in rows]
    width = max(sum(p.width + GAP for _, p in row) for row in rows) + GAP
    page = Image.new("RGB", (width, sum(heights) + GAP), PAPER)
    draw, y = ImageDraw.Draw(page), GAP
    for row, height in zip(rows, heights):
        x = GAP
        for label, picture in row:
            draw.text((x, y), fitting(draw, label, text, picture.width), INK, font(text))
            page.paste(picture, (x, y + int(text * 1.5)))
            x += picture.width + GAP
        y += height
    return page


def fitting(draw, label, text, width):
    """The label, cut with an ellipsis where it is wider than its picture."""
    if draw.textlength(label, font(text)) <= width:
        return label
    while label and draw.textlength(label + "…", font(text)) > width:
        label = label[:-1]
    return label + "…"


def grey(mask):
    """(H,W) tensor in [0,1] to a grey picture."""
    return Image.fromarray((mask.cpu().numpy() * 255).round().astype(np.uint8))


def outlined(picture, mask):
    """The picture dimmed outside the mask (H,W), so that the region can be judged."""
    pixels = np.asarray(picture, dtype=np.float32)
    return Image.fromarray(
        (pixels * (0.35 + 0.65 * mask.cpu().numpy()[:, :, None])).astype(np.uint8)
    )


def curve(values, width=512, height=256):
    """Values per step as dots and their running mean as a line; NaN leaves a gap."""
    page = Image.new("RGB", (width, height), "white")
    draw, values = ImageDraw.Draw(page), np.array(values, dtype=np.float64)
    good = np.isfinite(values)
    if not good.any():
        return page
    margin, top = 52, max(float(np.quantile(values[good], 0.98)), 1e-6)
    total = weight = 0.0
    means = []
    for v in (
        values
    ):  # divided by the weight that there is so far, or the first value would hang on for long
        total, weight = (0.95 * total + v, 0.95 * weight + 1) if np.isfinite(v) else (total, weight)
        means.append(total / weight if weight else None)

    def at(i, v):
        return (
            margin + i / max(len(values) - 1, 1) * (width - margin - 10),
            height - 24 - min(v / top, 1.0) * (height - 40),
        )

    for i, v in enumerate(values):
        if np.isfinite(v):
            x, y = at(i, v)
            draw.ellipse((x - 1.5, y - 1.5, x + 1.5, y + 1.5), fill=(168, 168, 178))
    draw.line([at(i, m) for i, m in enumerate(means) if m is not None], fill=LINE, width=2)
    draw.line([at(0, top), at(0, 0), at(len(values) - 1, 0)], fill=INK)
    for label, x, y in (
        (f"{top:.2g}", 4, 10),
        ("0", margin - 14, height - 32),
        (f"step {len(values)}", width - 76, height - 20),
        ("loss", 4, height // 2 - 8),
    ):
        draw.text((x, y), label, INK, font(13))
    return page
