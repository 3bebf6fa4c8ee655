"""Before training: what the pictures are like, what is told of them, what it will cost. A line each for whoever reads it, and a sheet."""

import hashlib

from PIL import Image, ImageDraw

from ... import images
from ...methods.captions import bucket
from .sheets import LINE, sheet

SHOWN = 60  # pictures on the sheet


def pieces(sdxl, token):
    """How many pieces a token has in each tokenizer."""
    return [len(tokenizer.tokens(token)) for tokenizer in sdxl.tokenizers]


def cropped(picture, size):
    """The picture with a frame around what the middle crop of size (H,W) takes of it."""
    scale = max(size[0] / picture.height, size[1] / picture.width)
    h, w = size[0] / scale, size[1] / scale
    top, left = (picture.height - h) / 2, (picture.width - w) / 2
    picture = picture.copy()
    width = max(1, round(min(picture.size) / 64))
    ImageDraw.Draw(picture).rectangle(
        (left, top, left + w - 1, top + h - 1), outline=LINE, width=width
    )
    return picture


def look(sdxl, pictures, size, buckets=False, mask_of=lambda path: None):
    """(lines, sheet) about pictures, a list of (path, caption). size: (H,W) trained at; buckets: whether each has its own of that area;
    mask_of(path): its mask, or None. What a mask leaves out is dark on the sheet."""
    lines, cells, seen = (
        [],
        [],
        {},
    )  # no picture is kept but what the sheet shows, and that reduced: there may be thousands
    for path, caption in pictures:
        picture = images.read(path)
        with Image.open(path) as file:
            turned = ", turned" if file.getexif().get(0x0112, 1) != 1 else ""
        target = (
            bucket(picture.size[::-1], size[0] * size[1], 8 * sdxl.vae_scale_factor)
            if buckets
            else size
        )
        grown = max(target[0] / picture.height, target[1] / picture.width)
        if grown > 1.5:
            lines.append(
                f"{path.name} is tiny, {picture.width}x{picture.height}: it is enlarged {grown:.1f} times"
            )
        same = seen.setdefault(
            hashlib.sha256(picture.resize((64, 64)).tobytes()).hexdigest(), path.name
        )
        if same != path.name:
            lines.append(f"{path.name} is the same picture as {same}")
        lost = sdxl.tokenizers[0].truncated_text(caption)
        if lost:
            lines.append(f"{path.name}: its caption is too long, these words are lost: {lost!r}")
        mask = mask_of(path)
        if len(cells) < SHOWN:
            # The frame is the middle crop, and training's lies anywhere along the side that is not whole in it.
            across, down = (
                whole * grown >= side + sdxl.vae_scale_factor
                for whole, side in zip(picture.size, target[::-1])
            )
            moves = (
                ", crop moves " + ("sideways" if across else "up and down")
                if across or down
                else ""
            )
            label = f"{path.name} {picture.width}x{picture.height}{turned}{moves}"
            picture = (
                Image.composite(picture, picture.point(lambda value: value // 4), mask)
                if mask
                else picture
            )
            picture.thumbnail((512, 512))
            cells.append((label, cropped(picture, target)))
    return lines, sheet([cells[k : k + 6] for k in range(0, len(cells), 6)])
